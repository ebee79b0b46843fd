"""``compare``: result folders side by side, in one table, one file and one picture."""

import csv
import json
from copy import deepcopy

import pytest
from PIL import Image

from dopamine_lib.__main__ import main
from dopamine_lib.federation.metrics import SCORES
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.results import spread
from dopamine_lib.report.comparison import compare, picture, table


def results(accuracy=0.75, camera_b=0.625, **options):
    """What ``reproduce`` writes, made up, as far as ``compare`` reads it."""
    asked = Options(settings=("F", "FPDP"), runs=2, **options).record()
    result = {key: spread([value - 0.01, value + 0.01]) for key, value in zip(SCORES, [0.5] * len(SCORES), strict=True)}
    result["test_accuracy"] = spread([accuracy - 0.01, accuracy + 0.01])
    del result["accuracy"]
    result |= {
        "group_accuracy": {"camera: A": spread([0.75, 0.75]), "camera: B": spread([camera_b] * 2)},
        "delta": 1e-4,
    }
    scale = options.get("epsilon") or 9
    spent = {"rdp_classic": 1.2 * scale, "rdp": 1.1 * scale, "prv": None, "pld": 1.0 * scale}
    private = {"epsilon": {key: value and value / 2 for key, value in spent.items()}, "epsilon_worst": spent}
    return {
        "data": "synthetic",
        "model": "head",
        "weights": "embedded",
        "weights_sha256": None,
        "delta": 1e-4,
        "patients": {"train": 2931, "test": 739, "counted": False},
        "hospitals": [293] * 9 + [294],
        "randomness": "operating system",
        "options": asked | {"weights_sha256": None},
        "settings": {"F": result | {"epsilon": None}, "FPDP": result | private},
    }


def folder(place, content):
    place.mkdir(parents=True)
    (place / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(place)


@pytest.fixture
def two(tmp_path):
    return [folder(tmp_path / "a", results()), folder(tmp_path / "b", results(0.5, 0.375, epsilon=1.0))]


def test_two_folders_in_one_table_file_and_picture(two, tmp_path, capsys):
    assert main(["compare", *two, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in said[2:6]]
    assert [row[:3] for row in rows] == [
        ["epsilon=-", "F", "-"],
        ["epsilon=-", "FPDP", "9.00"],  # the worst hospital's, by the tightest accountant that has a bound
        ["epsilon=1.0", "F", "-"],
        ["epsilon=1.0", "FPDP", "1.00"],
    ]
    assert rows[3][3:6] == ["50.0", "±", "1.4"] and said[5].endswith("37.5 ±  0.0  camera: B")
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["setting"] for row in written] == ["F", "FPDP"] * 2
    assert (written[0]["epsilon"], float(written[3]["epsilon"]), written[3]["runs"]) == ("", 1.0, "2")
    assert {float(row["balanced_accuracy"]) for row in written} == {0.5}
    assert [(float(row["worst_group_accuracy"]), row["worst_group"]) for row in written[1:3]] == [
        (0.625, "camera: B"),
        (0.375, "camera: B"),
    ]
    with Image.open(tmp_path / "out" / "compare.png") as image:
        assert image.size[0] > 1000


def test_the_picture_has_each_score_against_epsilon(two):
    figure = picture(compare(two))
    assert len(figure.axes) == 3
    for axes, wanted in zip(figure.axes, ([50, 75], [50, 50], [37.5, 62.5]), strict=True):
        (line,) = (line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-")
        assert list(line.get_xdata()) == [1.0, 9.0] and list(line.get_ydata()) == pytest.approx(wanted)
        assert sum(line.get_linestyle() == "--" for line in axes.lines) == 2  # F, which has no epsilon, in each folder


def test_folders_that_no_option_tells_apart_go_by_their_paths(tmp_path):
    same = [folder(tmp_path / name, results()) for name in ("one", "two")]
    assert {row.results for row in compare(same)} == set(same)
    other = folder(tmp_path / "three", results(hospitals=10, split="unequal"))
    assert {row.results for row in compare([*same, other])} == {*same, "split=unequal"}


def test_a_folder_of_an_older_version_has_fewer_scores(tmp_path):
    old = results()
    for result in old["settings"].values():
        for key in (*SCORES[1:2], *SCORES[3:], "group_accuracy"):
            del result[key]
    rows = compare([folder(tmp_path / "old", old)])
    assert rows[0].means == {"accuracy": 0.75, "quadratic_kappa": 0.5} and rows[0].worst is None
    assert table(rows).splitlines()[2].split()[-3:] == ["-", "-", "-"]
    assert [text.get_text() for axes in picture(rows).axes for text in axes.texts] == ["not recorded"] * 2


def test_bad_folders_are_one_line_and_status_2(two, tmp_path, capsys):
    broken = deepcopy(results())
    del broken["settings"]["FPDP"]["test_accuracy"]
    other = deepcopy(results())
    other["options"]["model"] = "oracle"
    cases = [
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([folder(tmp_path / "torn", "{")], "JSON"),
        ([folder(tmp_path / "empty", '{"settings": {}}')], "no settings"),
        ([folder(tmp_path / "thin", '{"settings": {"F": {}}}')], "not what reproduce writes"),
        ([folder(tmp_path / "broken", broken)], "no 'test_accuracy'"),
        ([folder(tmp_path / "other", other)], "oracle"),
        ([two[0]], "given twice"),
    ]
    for bad, said in cases:
        assert main(["compare", two[0], *bad]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and (bad[0] in error or said == "given twice")
    (tmp_path / "taken").write_text("mine")
    assert main(["compare", two[0], "--out", str(tmp_path / "taken")]) == 2
    assert "--out" in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"
