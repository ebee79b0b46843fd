"""The pictures in figures/ are those that the command draws, in the size it draws them, and are small."""

import json
import shutil

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pins import REPOSITORY

from dopamine_lib.__main__ import main
from dopamine_lib.course import gallery

FIGURES = REPOSITORY / "figures"
#: Photographs of the patient's page, which the test of that page takes.
PAGES = {"patient_page.png", "patient_page_phone.png"}
#: These take half a minute: the set of synthetic eyes, and a query of private inference.
HEAVY = {"masked_message.png", "synthetic_eyes.png"}


def results() -> dict:
    """What ``reproduce`` writes, made up, as far as Figure 1 reads it."""
    history = [{"epoch": e, "accuracy_mean": 0.5, "accuracy_std": 0.1, "epsilon_rdp_classic": e} for e in range(3)]
    private = {"test_accuracy": {"mean": 0.5, "runs": [0.5]}, "epsilon": {"rdp_classic": 2.0}, "history": history}
    settings = {"C": private | {"epsilon": None}, "FSCDP": private}
    return {"settings": settings, "data": "synthetic", "model": "head", "delta": 1e-4}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What the command draws, without the heavy ones; Figure 1 comes from made-up results."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "results.json").write_text(json.dumps(results()))
    light = {name: draw for name, draw in gallery.PICTURES.items() if name not in HEAVY}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "PICTURES", light)
        with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 200, "savefig.bbox": "tight"}):  # a user's own
            assert main(["gallery", str(folder / "out"), "--results", str(folder)]) == 0
    return folder / "out"


def differences(one, other) -> list[str]:
    """The names of files that only one gallery has, or that differ in size."""
    sizes = [{path.name: size(path) for path in folder.iterdir() if path.name not in PAGES} for folder in (one, other)]
    return sorted(name for name in sizes[0].keys() | sizes[1].keys() if sizes[0].get(name) != sizes[1].get(name))


def size(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_the_gallery_is_what_the_command_draws(drawn):
    assert differences(FIGURES, drawn) == sorted(HEAVY) and HEAVY < gallery.PICTURES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HEAVY))
def test_the_heavy_ones_are_what_the_command_draws(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DOPAMINE_KERNELS", "numpy")  # the compiled kernels would take longer to compile
    drawn = gallery.save(gallery.PICTURES[name](), tmp_path / name)
    assert size(drawn) == size(FIGURES / name) and drawn.stat().st_size < gallery.MAX_BYTES


@pytest.mark.parametrize("folder", ["figures", "drawn"])
def test_every_picture_is_small_and_shows_something(folder, drawn):
    paths = sorted((FIGURES if folder == "figures" else drawn).glob("*"))
    assert len(paths) > len(gallery.PICTURES) - len(HEAVY)
    for path in paths:
        assert path.suffix == ".png" and path.stat().st_size < gallery.MAX_BYTES, path.name
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, f"{path.name} is blank"


def test_a_missing_or_stretched_picture_is_found(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "faulty")
    (tmp_path / "faulty" / "schematic.png").unlink()
    Image.new("P", (10, 10)).save(tmp_path / "faulty" / gallery.FIGURE1)
    assert differences(tmp_path / "faulty", drawn) == [gallery.FIGURE1, "schematic.png"]


def test_a_picture_keeps_its_colours(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.patch.set_facecolor("#0072B2")
    with Image.open(gallery.save(figure, tmp_path / "blue.png")) as picture:
        assert picture.size == (200, 100) and picture.convert("RGB").getpixel((5, 5)) == (0, 0x72, 0xB2)


def test_without_results_there_is_a_run(tmp_path, monkeypatch):
    """A run takes a minute, so only its options are looked at."""
    asked = []
    monkeypatch.setattr(gallery, "reproduce", lambda options, out: asked.append(options) or results())
    monkeypatch.setattr(gallery, "PICTURES", {})
    assert main(["gallery", str(tmp_path)]) == 0
    assert asked[0].runs == 5 and asked[0].data == "synthetic" and asked[0].seed is None
    assert size(tmp_path / gallery.FIGURE1) == size(FIGURES / gallery.FIGURE1)


def test_refusals(tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(gallery, "PICTURES", {})
    with refuses("results.json cannot be read", "--results"):
        list(gallery.draw_gallery(tmp_path / "out", tmp_path))
    (tmp_path / "results.json").write_text("{")
    with refuses("results.json cannot be read"):
        list(gallery.draw_gallery(tmp_path / "out", tmp_path))
    assert not (tmp_path / "out").exists()
    with refuses("out cannot be made", "name another folder"):
        list(gallery.draw_gallery(tmp_path / "results.json" / "out"))
