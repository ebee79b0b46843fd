"""The project "Find the leak": each leaves a kit that works, and is caught by an audit that the sound kit passes."""

import json
import os
import subprocess
import sys

import pytest

from dopamine_lib.course import leaks
from dopamine_lib.course.leaks import LEAKS, PACKAGE, plant_leak

#: Where each leak shows, as a ``Scene``, and releases enough to see it.
SCENES = (
    ("Scene(hospitals=9, sample_rate=1.0, noise_multiplier=2.1)", 1000),
    ("Scene('CDP', noise_multiplier=4.0)", 1000),
    ("Scene(hospitals=1, sample_rate=0.04, noise_multiplier=1.0, rounds=32)", 800),
)
AUDIT = """
from dopamine_lib.auditing.canaries import Scene
for scene, releases in ({scenes},):
    print(scene.audit(releases, seed=7).broken)
"""


def audits(root, scenes):
    """What an audit of each scene finds with the package in this folder, from a process of its own."""
    script = AUDIT.format(scenes=", ".join(f"({scene}, {releases})" for scene, releases in scenes))
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize("leak", LEAKS, ids=range(1, 1 + len(LEAKS)))
def test_a_leak_changes_one_place_of_the_source(leak):
    assert (PACKAGE / leak.file).read_text(encoding="utf-8").count(leak.sound) == 1


def test_the_folder_has_the_kit_with_one_change_and_does_not_say_which(tmp_path, refuses):
    plant_leak(tmp_path / "out", 1, run=False)
    copied = tmp_path / "out" / "dopamine_lib"
    changed = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if not (copied / path.relative_to(PACKAGE)).exists()
        or (copied / path.relative_to(PACKAGE)).read_bytes() != path.read_bytes()
    ]
    assert sorted(changed) == ["course/leaks.py", "privacy/dpsgd.py"]
    times = {
        path.stat().st_mtime_ns - (PACKAGE / path.relative_to(copied)).stat().st_mtime_ns
        for path in copied.rglob("*.py")
    }
    assert times == {0}, "the newest file would be the one"
    with refuses("not an empty folder"):
        plant_leak(tmp_path / "out", 2, run=False)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with refuses("file/out cannot be written", "name another folder"):
        plant_leak(tmp_path / "file" / "out", 2, run=False)
    for number in (0, len(LEAKS) + 1):
        with refuses("leak"):
            plant_leak(tmp_path / "other", number, run=False)


@pytest.mark.slow
def test_an_audit_catches_each_leak_and_passes_the_sound_kit(tmp_path):
    for number, scene in enumerate(SCENES, 1):
        plant_leak(tmp_path / str(number), number, run=False)
        assert audits(tmp_path / str(number), [scene]) == ["True"], LEAKS[number - 1].breaks
    assert audits(PACKAGE.parent, SCENES) == ["False"] * len(SCENES)


@pytest.mark.slow
def test_the_run_with_a_leak_looks_like_any_other(tmp_path):
    plant_leak(tmp_path / "out", len(LEAKS))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dopamine_lib", "results"}
    assert (
        "FSCDP" in json.loads((tmp_path / "out" / "results" / "results.json").read_text(encoding="utf-8"))["settings"]
    )


def test_a_run_says_how_far_it_is_and_one_that_fails_leaves_no_folder_behind(tmp_path, refuses, monkeypatch, capfd):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho a table\necho half of it >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(leaks.sys, "executable", str(program))
    with refuses("the run with the leak failed"):
        plant_leak(tmp_path / "out", 1)
    assert list(tmp_path.iterdir()) == [program] and capfd.readouterr() == ("", "half of it\n")
