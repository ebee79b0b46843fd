"""Scores on test images: scikit-learn's to the last digits, and None where they are undefined."""

import csv
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    recall_score,
    roc_auc_score,
)

from dopamine_lib.data.dataset import GRADES
from dopamine_lib.errors import InputError
from dopamine_lib.federation import metrics
from dopamine_lib.federation.metrics import SCORES, SCREENING, auroc, evaluate, group_accuracy, worst_group
from dopamine_lib.federation.results import spread
from dopamine_lib.federation.tidy import check_tensorboard, tidy, write_events, write_metrics


def model(seed, present=range(5), patients=300, ties=False):
    """Labels (N,) of the grades ``present``, and a mediocre model's probabilities (N, 5)."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([list(present), rng.choice(list(present), patients - len(present))])
    scores = rng.normal(size=(patients, 5)) + 1.5 * np.eye(5)[labels]
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return labels, np.round(probabilities, 1) if ties else probabilities


def oracle(labels, probabilities):
    """What scikit-learn says, without the grades that no image has."""
    predicted, present = probabilities.argmax(1), np.unique(labels)
    found = {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": recall_score(labels, predicted, labels=present, average="macro", zero_division=0),
        "quadratic_kappa": cohen_kappa_score(labels, predicted, weights="quadratic", labels=range(5)),
        "auroc": np.mean([roc_auc_score(labels == grade, probabilities[:, grade]) for grade in present]),
    }
    if len(present) == 5:
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    for what, first in SCREENING.items():
        ill, called = labels >= first, predicted >= first
        found[f"{what}_sensitivity"] = recall_score(ill, called)
        found[f"{what}_specificity"] = recall_score(~ill, ~called)
        found[f"{what}_auroc"] = roc_auc_score(ill, probabilities[:, first:].sum(1))
    return found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("present", [(0, 1, 2, 3, 4), (0, 2, 4), (1, 3)])
def test_scores_are_those_of_scikit_learn(present, ties):
    for seed in range(10):
        labels, probabilities = model(seed, present, ties=ties)
        if ties:
            assert len(np.unique(probabilities)) <= 11
        found, wanted = evaluate(labels, probabilities, GRADES), oracle(labels, probabilities)
        assert tuple(wanted) == SCORES and found.keys() == {*SCORES, "recall_per_grade"}
        for score, value in wanted.items():
            assert found[score] == pytest.approx(value, abs=1e-12), score
        recall = recall_score(labels, probabilities.argmax(1), labels=range(5), average=None, zero_division=0)
        for grade, value in enumerate(found["recall_per_grade"]):
            assert value == pytest.approx(recall[grade], abs=1e-12) if grade in present else value is None
        ours = metrics.confusion_matrix(labels, probabilities.argmax(1), 5)
        assert (ours == confusion_matrix(labels, probabilities.argmax(1), labels=range(5))).all()


def test_the_probabilities_of_all_grades_that_count_are_added():
    """Severe and proliferative together outweigh what either has alone."""
    labels = np.array([0, 2, 3, 4])
    probabilities = np.array([[0.9, 0, 0, 0.1, 0], [0, 0, 0.6, 0.4, 0], [0, 0, 0.5, 0.25, 0.25], [0, 0, 0, 0.3, 0.7]])
    assert evaluate(labels, probabilities, GRADES)["sight_threatening_auroc"] == 1.0
    assert auroc(labels >= 3, probabilities[:, 3]) < 1 and auroc(labels >= 3, probabilities[:, 4]) == 1.0


def test_other_classes_have_no_screening_scores():
    labels, probabilities = model(0)
    found = evaluate(labels, probabilities, ("shirt", "coat", "bag", "boot", "dress"))
    assert found.keys() == {*SCORES[:4], "recall_per_grade"}
    assert {key: found[key] for key in SCORES[:4]} == {
        key: evaluate(labels, probabilities, GRADES)[key] for key in SCORES[:4]
    }


def test_what_is_undefined_is_none():
    labels, probabilities = np.zeros(4, int), np.tile([0.6, 0.1, 0.1, 0.1, 0.1], (4, 1))
    found = evaluate(labels, probabilities, GRADES)
    assert found["accuracy"] == found["balanced_accuracy"] == found["referable_specificity"] == 1.0
    for score in ("quadratic_kappa", "auroc", "referable_sensitivity", "referable_auroc"):
        assert found[score] is None
    assert found["recall_per_grade"] == [1.0, None, None, None, None]
    json.dumps(found, allow_nan=False)
    assert spread([None, None]) == {"mean": None, "std": None, "runs": [None, None]}


def test_groups_are_scored_where_they_are_large_enough():
    camera = np.array(["A"] * 40 + ["B"] * 35 + ["C"] * 5)
    dataset = SimpleNamespace(labels=np.zeros(80, int), attributes={"camera": camera, "eye": np.full(80, "left")})
    index, predicted = np.arange(1, 80), np.r_[np.zeros(60, int), np.ones(19, int)]
    found = group_accuracy(dataset, index, predicted)
    assert found == {"camera: A": 1.0, "camera: B": 21 / 35}  # C is too small, and one group is no comparison
    assert worst_group({name: spread([value]) for name, value in found.items()}) == "camera: B"
    assert worst_group({}) is None


def records():
    """A setting with two runs of two epochs, and one whose record is of a version that had accuracy and kappa alone."""
    runs = []
    for run in range(2):
        history = [
            {"epoch": epoch, "accuracy": 0.5 + run / 8, "auroc": None, "epsilon_rdp_classic": epoch} for epoch in (1, 2)
        ]
        final = {"accuracy": 0.5 + run / 8, "balanced_accuracy": 0.25, "auroc": None}
        runs.append(
            final | {"recall_per_grade": [0.5, None], "group_accuracy": {"camera: A": 0.75}, "history": history}
        )
    entry = {"epoch": 7, "accuracy": 0.5, "epsilon_rdp_classic": None}
    old = {"accuracy": 0.5, "quadratic_kappa": 0.25, "recall_per_grade": [1.0, 0.0], "history": [entry]}
    return {("FSCDP", 0): runs[0], ("FSCDP", 1): runs[1], ("F", 0): old}


def test_a_row_for_each_score_of_each_epoch(tmp_path):
    write_metrics(tmp_path / "metrics.csv", records())
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["setting", "run", "epoch", "score", "value"]
    assert [row[2:] for row in rows if row[:2] == ["FSCDP", "1"]] == [
        ["1", "accuracy", "0.625"],
        ["1", "epsilon_rdp_classic", "1"],
        ["2", "accuracy", "0.625"],
        ["2", "balanced_accuracy", "0.25"],
        ["2", "epsilon_rdp_classic", "2"],
        ["2", "recall_0", "0.5"],
        ["2", "accuracy (camera: A)", "0.75"],
    ]
    assert {tuple(row[3:]) for row in rows if row[0] == "F"} == {
        ("accuracy", "0.5"),
        ("quadratic_kappa", "0.25"),
        ("recall_0", "1.0"),
        ("recall_1", "0.0"),
    }


def test_tensorboard_gets_the_same_rows_and_no_host_name(tmp_path, monkeypatch):
    """Against a stand-in for the package, which need not be installed: one that names its files as it does."""
    written = []

    class SummaryWriter:
        def __init__(self, place):
            self.place = place
            place.mkdir(parents=True, exist_ok=True)
            (place / "events.out.tfevents.1700000000.the-host.77.0").write_text("")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_scalar(self, score, value, epoch):
            written.append((self.place.name, epoch, score, value))

    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    for _ in range(2):  # what an earlier call has written does not stay beside it
        written.clear()
        write_events(tmp_path, records())
        files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        assert files == [f"{run}/events.out.tfevents" for run in ("F-0", "FSCDP-0", "FSCDP-1")]
    assert written == [(f"{name}-{run}", *row) for name, run, *row in tidy(records())]


def test_without_tensorboard_the_option_says_what_to_do(monkeypatch):
    monkeypatch.setattr("dopamine_lib.federation.tidy.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        check_tensorboard()
