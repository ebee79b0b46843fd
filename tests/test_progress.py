"""Long work is seen: bars in terminals and notebooks, lines in logs, and a last line with time, memory and place."""

import io
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from tqdm.notebook import tqdm as notebook_tqdm

from dopamine_lib import __main__ as command_line
from dopamine_lib import progress
from dopamine_lib.benchmarks import scaling, wires
from dopamine_lib.course import gallery, grading
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation.wires import party
from dopamine_lib.inference.offline import parties as alone
from dopamine_lib.inference.workers import client
from dopamine_lib.progress import progress_bar

#: In tests, progress is turned off by the environment (``conftest.py``).
SHOWN = {"disable": False}
EPSILON = "epsilon --noise-multiplier 2 --sample-rate 0.01 --steps 10 --delta 1e-5".split()


class Terminal(io.StringIO):
    """A standard error that people look at."""

    def isatty(self):
        return True


@pytest.fixture
def at_once(monkeypatch):
    """What is shown after five seconds, from the first."""
    monkeypatch.setattr(progress, "SHORT", 0.0)


def test_a_log_has_lines_with_an_estimate(at_once, capsys):
    assert list(progress_bar(range(3), title="adding", unit="number", **SHOWN)) == [0, 1, 2]
    said = capsys.readouterr().err
    assert re.match(r"adding: +\d+ %, \d of 3 \(number\), 00:00 so far, about \S+ to go\n", said)
    assert "\r" not in said and "\n\n" not in said


def test_a_log_s_lines_grow_rarer(monkeypatch):
    now, file = iter([0, 1, 4, 5, 9, 10, 19, 20, 39]), io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    log = progress._Log(file)
    for state in range(8):
        log.write(f"\r{state} \n")
    assert file.getvalue().split() == ["2", "4", "6"]  # after 5, 10 and 20 seconds


def test_a_terminal_has_a_bar(at_once, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(title="adding", unit="number", total=2, **SHOWN) as bar:
        bar.update(2)
    assert "\radding: 100%|" in sys.stderr.getvalue()


def test_a_notebook_has_its_own_bar(monkeypatch):
    given = []

    class Bar(notebook_tqdm):
        def __init__(self, *items, **terms):
            given.append(terms)
            super().__init__(disable=True)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    progress_bar([1], title="adding", unit="number")
    assert given == [{"desc": "adding", "unit": "number", "delay": progress.SHORT}]


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_said_of_what_is_short_or_silenced(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setattr(progress, "SHORT", 1e6)
    list(progress_bar(range(9), title="adding", unit="number", **SHOWN))
    monkeypatch.setattr(progress, "SHORT", 0.0)
    list(progress_bar(range(9), title="adding", unit="number", show=False))
    assert sys.stderr.getvalue() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="it does not count a process' largest memory this way")
def test_a_long_command_ends_with_time_memory_and_place(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(progress, "SHORT", 0.0)
    assert command_line.main(EPSILON) == 0 and capsys.readouterr().err == ""  # turned off, as in all tests
    monkeypatch.delenv("TQDM_DISABLE")
    assert command_line.main(EPSILON) == 0
    assert re.fullmatch(r"epsilon: \d+ s, \d+\.\d GB in the largest process\n", capsys.readouterr().err)
    monkeypatch.setattr("dopamine_lib.course.slides.build_slides", lambda out: [])
    assert command_line.main(["slides", str(tmp_path)]) == 0
    assert capsys.readouterr().err.endswith(f" process; {tmp_path}\n")
    monkeypatch.setattr("dopamine_lib.course.grading.grade_folder", lambda *_, **__: None)
    assert command_line.main(["homework", "grade", "in", "--to", "marks"]) == 0
    assert capsys.readouterr().err.endswith(" process; marks\n")
    assert command_line.main(["epsilon", *EPSILON[1:-1], "2"]) == 2
    assert "process" not in capsys.readouterr().err


def test_a_short_command_ends_without(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(progress, "SHORT", 1e6)
    assert command_line.main(EPSILON) == 0 and capsys.readouterr().err == ""


def test_what_takes_minutes_shows_how_far_it_is(monkeypatch, tmp_path):
    shown = []

    def bar(items=None, *, title, total=None, show=True, **_):
        shown.append((title, total or len(items)) if show else None)
        return progress_bar(items, title=title, unit="one", total=total)

    for module in (gallery, grading, client, alone, scaling, wires):
        monkeypatch.setattr(module, "progress_bar", bar)
    monkeypatch.setattr(gallery, "PICTURES", {"a.png": list, "b.png": list})
    monkeypatch.setattr(gallery, "save", lambda figure, path: path)
    monkeypatch.setattr(gallery, "figure1", lambda found: None)
    monkeypatch.setattr(gallery, "_read", lambda path: {})
    assert len(list(gallery.draw_gallery(tmp_path, tmp_path))) == 3
    monkeypatch.setattr(grading, "find_submissions", lambda folder: dict.fromkeys(("ada", "grace"), []))
    monkeypatch.setattr(grading, "find_homework", lambda folder: [])
    grading.grade_folder(tmp_path, tmp_path / "graded")
    patient = client.PatientClient.__new__(client.PatientClient)
    patient.inputs, patient.plan = None, SimpleNamespace(to_input=lambda image: image)
    monkeypatch.setattr(patient, "_in_session", lambda work: work(), raising=False)
    monkeypatch.setattr(patient, "_infer", lambda rest, progress: rest[:2], raising=False)
    assert patient.infer_all([1, 2, 3]) == [1, 2, 3] and patient.infer_all([4]) == [4]
    without = alone.Patient.__new__(alone.Patient)
    without.plan = SimpleNamespace(operations=[(0, SimpleNamespace(patient=SimpleNamespace(nbytes=0)))])
    with pytest.raises(AttributeError):  # this operation is none
        monkeypatch.setattr(without, "_next_key", lambda: (0, b""), raising=False)
        monkeypatch.setattr(without, "_spare", [], raising=False)
        without._prepare()
    monkeypatch.setattr(scaling, "_measure", lambda *_: [])
    scaling.run(hospitals=(2, 5), kinds=())
    monkeypatch.setattr(wires, "_over", lambda *_: {})
    wires.run(hospitals=(2, 4), turns=3)
    queries, benches = ("randomness for a query", 1), [("measuring", 2), ("measuring", 18)]
    assert shown == [("gallery", 2), ("grading", 2), ("grading", 3), None, queries, *benches]


def test_every_party_ends_with_time_memory_and_place(monkeypatch, capsys, tmp_path):
    """Over threads, MPI and gRPC alike."""
    for name in ("claim", "writing"):
        monkeypatch.setattr(party, name, lambda *_: nullcontext())
    monkeypatch.setattr(party, "check_plan", lambda plan: None)
    monkeypatch.setattr(party, "_sessions", lambda *_: {})
    options = SimpleNamespace(settings=("FSCDP",), record=dict)
    experiment = SimpleNamespace(options=options, plan=lambda name: None, weights=SimpleNamespace(sha256=None))
    monkeypatch.setattr(progress, "SHORT", 0.0)
    monkeypatch.delenv("TQDM_DISABLE")
    for number, who in ((SERVER, "the server"), (2, "hospital 2")):
        party.take_part(experiment, lambda: None, tmp_path, party=number)
        assert re.fullmatch(rf"{who}: 0 s.*; {tmp_path}\n", capsys.readouterr().err)
