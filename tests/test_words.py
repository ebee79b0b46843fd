"""What a stranger is told: what was read, what has no score of its own, and in the words of their data."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dopamine_lib.__main__ import main
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.metrics import LEAST, MOST_VALUES, left_out
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.results_table import table
from dopamine_lib.federation.run_folder import check_out
from dopamine_lib.report.collect import collect
from dopamine_lib.report.text import markdown

SETTING = '[Quick]\nlike = "FSCDP"\nrounds = 2\nepochs = 1\n'


@pytest.fixture(scope="module")
def heart():
    return Experiment.load(Options(data="heart"), progress=False)


def test_the_first_line_says_what_was_read_and_nothing_of_a_training_patient(heart):
    told = heart.in_words
    for part in ("rows of 29 numbers", "2 classes: No disease, Disease", "613 training patients (declared)"):
        assert part in told
    assert (
        "4 hospitals (Cleveland, Budapest, Long Beach, Switzerland); 290 to test on; recorded: sex, age, site" in told
    )
    fewer = heart.dataset.rows(np.setdiff1d(np.arange(len(heart.dataset)), heart.train[:7]))
    assert replace(heart, dataset=fewer, train=fewer.train, test=fewer.test).in_words == told


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run of the heart patients, and what was said on the way."""
    folder = tmp_path_factory.mktemp("heart")
    (folder / "quick.toml").write_text(SETTING)
    words = f"reproduce --data heart --settings {folder}/quick.toml --runs 1 --workers 1 --out {folder}/out"
    return folder / "out", words.split()


def test_a_run_in_the_words_of_its_data(made, heart, capsys):
    """No grade and no image where there are none; one run has no spread; what was replaced or left out is named."""
    out, words = made
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.startswith(heart.in_words + "\n") and "±" not in said.out
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["Quick"]["test_accuracy"]["std"] == 0.0 and results["groups_left_out"] == []
    facts = collect(out, progress=False)
    facts["results"] |= {"group_norm_for_batch_norm": ["bn1", "layer1.0.bn2"], "groups_left_out": ["sex: other (few)"]}
    text = markdown(facts)
    assert not any(word in text for word in ("grade", "image", "±")), text
    assert "290 test rows" in text and "| rows |" in text and "class: Disease" in text
    assert "in the place of batch normalisation, layers: 2 (bn1, layer1.0.bn2)" in text
    assert "Without a score of their own: sex: other (few). " in text
    facts["sheet"]["grades"]["Disease"] = LEAST - 1
    assert f"sex: other (few); class: Disease (fewer than {LEAST} test rows). " in markdown(facts)
    facts["subgroups"]["Quick"].append(facts["subgroups"]["Quick"][1] | {"by": "sharpness", "group": "blurred"})
    facts["subgroups"]["Quick"][-1]["accuracy"] = {"mean": 0.0, "low": 0.0, "high": 0.1}
    text = markdown(facts)
    assert "| sharpness: blurred |" in text and "Worst group by what is recorded: Quick: blurred" not in text
    facts["results"]["settings"]["Quick"]["test_accuracy"]["runs"] *= 2
    assert "±" in markdown(facts) and "±" in table(facts["results"])


def test_groups_that_are_too_small_are_named(heart):
    data, test = heart.dataset, heart.test
    assert left_out(data, test) == []
    sex = data.attributes["sex"].astype("<U9")
    sex[test[:3]] = "not known"
    number = np.array([str(i) for i in range(len(data))])
    data = replace(data, attributes={"sex": sex, "number": number})
    said = [f"sex: not known (fewer than {LEAST} test rows)", f"number (more than {MOST_VALUES} values)"]
    assert left_out(data, test) == said


def test_a_resumed_path_is_compared_as_a_path(tmp_path, monkeypatch, refuses):
    (tmp_path / "scans").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "w.npz").write_text("")
    monkeypatch.chdir(tmp_path)
    begun = {"data": "./scans", "data_dir": "scans", "weights": "w.npz", "backbone": "resnet50:w.npz", "split": "scans"}
    (tmp_path / "options.json").write_text(json.dumps(begun))
    here = {"data": str(tmp_path / "scans"), "data_dir": "./other/../scans", "weights": str(tmp_path / "w.npz")}
    check_out(tmp_path, begun | here | {"backbone": f"resnet50:{tmp_path}/w.npz"}, resume=True)
    for key, value in (("data", "./other"), ("backbone", "resnet18:w.npz"), ("data_dir", None), ("split", "./scans")):
        with refuses(f"was begun with {key} = "):
            check_out(tmp_path, begun | {key: value}, resume=True)
