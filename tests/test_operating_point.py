"""Thresholds from the last rounds' noisy histograms: what one patient adds, what they find, in every setting."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from held_noise import shorten
from safetensors import safe_open

from dopamine_lib.__main__ import main
from dopamine_lib.data.dataset import GRADES
from dopamine_lib.errors import InputError
from dopamine_lib.federation.metrics import at_thresholds, screening
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.training import Training
from dopamine_lib.federation.transports import make_aggregation
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.operating_point import OperatingPoint, severity
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.report.collect import write_report
from dopamine_lib.report.verification import verify
from dopamine_lib.reproduction import run

PATIENTS, HOSPITALS, FEATURES = 240, 4, 30
POINT = OperatingPoint(0.9, (2, 3), 5)


@pytest.fixture
def task():
    """Features that tell the grade, but for noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(PATIENTS) % 7 % 5
    features = torch.randn(PATIENTS, FEATURES, generator=generator)
    features[:, 0] += 2 * labels
    return HeadTask(torch.nn.Linear(FEATURES, 5), features / features.norm(dim=1, keepdim=True), labels)


def make_training(task, name="FSCDP", kind="plain", *, rounds=20, sigma=1.0, seed=0, more=None, **terms):
    changes = {"rounds": rounds, "epochs": min(rounds, 5), "sample_rate": 0.5} | (more or {})
    declared = replace(SETTINGS[name], **changes)
    declared = declared.with_noise(sigma) if declared.private else declared
    if declared.averages:
        declared = replace(declared, local_steps=changes.get("local_steps", 3))
    patients = np.array_split(np.arange(PATIENTS), HOSPITALS) if declared.federated else [np.arange(PATIENTS)]
    choice = replace(CHOICES["head"][name], mean_noise_multiplier=None, learning_rate=0.5)
    terms = {"operating_point": POINT, "aggregation": kind} | terms
    plan = Plan.of(declared, choice, task, patients, **terms)
    return Training(plan, task, patients, Randomness(seed), aggregation=make_aggregation(plan))


def test_a_patient_is_a_vector_of_norm_one_at_most_that_rounding_hardly_moves():
    logits = 4 * torch.randn(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[:4] = torch.tensor([math.nan, math.inf, 1e300, -math.inf])[:, None]
    labels = torch.arange(500) % 5
    own = torch.stack([POINT.histogram(logits[i : i + 1], labels[i : i + 1]) for i in range(500)])
    assert own.norm(dim=1).max() <= 1 and (own[labels >= 3] == 0).all() and (own[[0, 1, 3]] == 0).all()
    assert own[4:][labels[4:] < 3].sum(1).sub(1).abs().max() < 1e-12
    assert torch.allclose(POINT.histogram(logits, labels), own.sum(0))
    # half way between two knots a hard one-hot would jump by 1
    middle = float(torch.logit(torch.tensor(3.5 / 8, dtype=torch.float64)))
    below, beyond = (
        POINT.histogram(torch.tensor([[0.0, z, -1e4, -1e4, -1e4]], dtype=torch.float64), torch.tensor([0]))
        for z in (middle - 1e-9, middle + 1e-9)
    )
    assert 0 < (below - beyond).abs().max() < 1e-7 and below.count_nonzero() == 2


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.98])
def test_a_threshold_has_its_specificity_on_those_it_was_found_on(specificity):
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(20_000) % 5
    logits = torch.randn(20_000, 5, generator=generator) - 0.3 * (torch.arange(5) - labels[:, None]) ** 2
    point = replace(POINT, specificity=specificity)
    found = point.thresholds(point.histogram(logits, labels))
    for first, threshold in zip(point.firsts, found, strict=True):
        below = (severity(logits)[labels < first] <= threshold).double().mean()
        assert abs(below - specificity) < 0.01
    scores = at_thresholds(labels.numpy(), torch.softmax(logits, 1).numpy(), GRADES, found)
    assert [own["specificity"] for own in scores.values()] == pytest.approx([specificity] * 2, abs=0.01)


def test_noise_alone_calls_nobody_or_finds_a_threshold_within_the_grades():
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        assert all(0 <= found <= 4 for found in POINT.thresholds(torch.randn(POINT.cells, generator=generator)))
    assert POINT.thresholds(torch.zeros(POINT.cells)) == [4.0, 4.0]


def test_a_message_moves_by_c_with_a_patient_and_names_nobody_else(task):
    w = torch.randn(task.d, generator=torch.Generator().manual_seed(4))
    everybody = torch.arange(PATIENTS)
    counted = task.histogram_sum(w, everybody, 0.5, POINT)
    assert counted.shape == (task.d,) and (counted[POINT.cells :] == 0).all()
    for gone in range(0, PATIENTS, 7):
        apart = counted - task.histogram_sum(w, everybody[everybody != gone], 0.5, POINT)
        assert apart.norm() <= 0.5 * (1 + 1e-12)
        assert (apart.norm() > 0.3) == (task.labels[gone] < 3)
    assert task.histogram_sum(w, everybody[:0], 0.5, POINT).abs().sum() == 0
    assert torch.allclose(task.histogram_sum(w, everybody, math.inf, POINT), 2 * counted)  # without privacy in ones


@pytest.mark.parametrize("name, discrete", [*((name, False) for name in SETTINGS), ("FSCDP", True)])
def test_every_setting_finds_the_thresholds_of_the_model_that_it_hands_out(task, name, discrete):
    sigma = 1.0 if discrete else 0.05
    training = make_training(task, name, sigma=sigma, rounds=40, discrete=discrete)
    seen = []
    training.run(after=lambda epoch: seen.append(training.server.steps))
    assert training.server.steps == seen[-1] == 36  # a tenth of the rounds train nothing
    logits = task.logits(training.server.model, torch.arange(PATIENTS))
    exact = POINT.thresholds(POINT.histogram(logits, task.labels))
    assert training.thresholds == pytest.approx(exact, abs=0.35 if discrete else 0.2)
    assert exact[0] < exact[1]


@pytest.mark.parametrize("name", ["FSCDP", "F"])
def test_patients_are_counted_under_the_model_that_is_handed_out(task, name, monkeypatch):
    """The averaged one, which no local step moves, and neither the last iterate nor what counts would make of it."""
    training, counted = make_training(task, name), []

    def spy(self, w, index, *terms):
        counted.append(w.clone())
        return histogram_sum(self, w, index, *terms)

    histogram_sum = HeadTask.histogram_sum
    monkeypatch.setattr(HeadTask, "histogram_sum", spy)
    training.run()
    assert len(counted) == 2 * (4 if name == "FSCDP" else 2 * 3)  # rounds, hospitals and local steps
    assert all(torch.equal(w, training.server.model) for w in counted)
    assert not torch.allclose(training.server.model, training.server.w, atol=1e-4)


@pytest.mark.parametrize("name", ["FSCDP", "FPDP"])
def test_counting_rounds_spend_what_others_do(task, name):
    one, other = (make_training(task, name, operating_point=point) for point in (POINT, None))
    assert one.plan.charged() == other.plan.charged()
    steps = max(one.plan.charged())
    events = [training.plan.bound.events(steps) for training in (one, other)]
    assert [replace(event, failure=0.0) for event in events[0]] == [replace(event, failure=0.0) for event in events[1]]
    assert max(event.failure for event in events[0]) < 1e-50


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_the_same_thresholds_encrypted_and_masked(task, kind):
    plain, secure = (make_training(task, kind=k, rounds=4).run() for k in ("plain", kind))
    assert plain.thresholds == secure.thresholds and torch.equal(plain.histogram, secure.histogram)


@pytest.mark.parametrize("name, kind", [("F", "masks"), ("F", "bfv"), ("FPDP", "masks")])
def test_counts_have_room_where_changes_of_the_model_are_sent(task, name, kind):
    """Steps as long as the head's, 25 a round: summed like gradients, counts were larger than any change may be."""
    more = {"local_steps": 25, "participation": 1.0, "sample_rate": 1.0}
    training = make_training(task, name, kind, rounds=10, sigma=0.05, more=more).run()
    logits = task.logits(training.server.model, torch.arange(PATIENTS))
    exact = POINT.thresholds(POINT.histogram(logits, task.labels))
    assert training.thresholds == pytest.approx(exact, abs=0.2)


def test_counts_are_asked_for_before_budgets_end(task):
    """Where each hospital has a budget of its own, a run's last rounds may have nobody in them."""
    free, bounded = (
        make_training(task, "FPDP", rounds=40, more={"epochs": 40}, budget=budget, accountant="rdp")
        for budget in (math.inf, 8.0)
    )
    asked = [[number for number in range(40) if training.plan.counts_in(number, run=1)] for training in (free, bounded)]
    assert asked[0] == [36, 37, 38, 39] and asked[1][0] < 30
    opened = [number for number, invited in enumerate(bounded.schedule) if invited]
    assert [bounded.plan.counts_in(number) for number in opened] == [False] * (len(opened) - 1) + [True]
    assert bounded.run().thresholds is not None and bounded.server.steps == len(opened) - 1


def test_room_for_all_patients_in_one_cell(task):
    """Half of all patients are healthy, and may be in one cell: a box for gradients would clamp them unseen."""
    task.labels[:] = 0
    training = make_training(task, more={"sample_rate": 1.0}, sigma=0.05).run()
    w = training.server.model
    exact = task.histogram_sum(w, torch.arange(PATIENTS), 0.5, POINT)[: POINT.cells]
    assert torch.allclose(training.histogram / 2, exact.float(), atol=1.0) and exact.max() > 30


def test_a_run_goes_on_with_its_counts(task, tmp_path):
    whole = make_training(task, more={"epochs": 20}).run()
    first = make_training(task, more={"epochs": 20}).run(after=lambda epoch: epoch == 19)
    assert first.histogram is not None and not torch.equal(first.histogram, whole.histogram)
    save_checkpoint(tmp_path / "run.safetensors", first)
    second = make_training(task, more={"epochs": 20})
    load_checkpoint(tmp_path / "run.safetensors", second)
    assert second.run().thresholds == whole.thresholds
    vectors, record = first.state()
    for point, histogram in ((POINT, torch.zeros(3)), (None, vectors["histogram"])):
        other = make_training(task, more={"epochs": 20}, operating_point=point)
        with pytest.raises(ValueError, match="histogram of shape"):
            other.restore(vectors | {"histogram": histogram}, record)
        assert other.progress.epoch == 0


def test_a_network_of_any_kind_counts_its_patients():
    """On logits of float32, in micro-batches."""
    x, y = torch.randn(60, 3, generator=torch.Generator().manual_seed(5)), torch.arange(60) % 2
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    task, point = Task(net, lambda index: x[index], y, chunk=7, classes=2), OperatingPoint(0.8, (1,), 2)
    exact = point.histogram(net(x).detach(), y)
    counted = task.histogram_sum(task.start, torch.arange(60), 1.0, point)
    assert torch.allclose(counted[: point.cells], exact, atol=1e-5)


def test_refusals(task, refuses):
    assert screening(GRADES) == {"referable": 2, "sight_threatening": 3} and screening("abc") == {}
    for value in (0.0, 1.0, 1.5, math.nan):
        with refuses("specificity", str(value)):
            Options(specificity=value)
    with refuses("specificity", "3 classes", "leave it out"):
        make_plan(Options(specificity=0.9), "FSCDP", (30,) * 10, 2565, "abc")
    with refuses("specificity", "66 counts", "40 numbers"):
        make_plan(Options(specificity=0.9), "FSCDP", (30,) * 10, 40)
    with refuses("specificity", "rounds"):
        make_training(task, rounds=1)


def test_what_a_run_leaves(make_aptos, tmp_path, capsys, monkeypatch):
    """Thresholds in results, model and table; scores on test images; and a statement that says where they come from."""
    shorten(monkeypatch.setitem)
    monkeypatch.setattr(run, "fitting_workers", lambda jobs: 1)
    folder, out = make_aptos(tmp_path / "eyes"), tmp_path / "out"
    words = ["--data", "aptos", "--data-dir", str(folder), "--size", "32", "--weights", "random", "--hospitals", "3"]
    words += ["--settings", "F,FSCDP", "--runs", "2"]
    assert main(["reproduce", *words, "--specificity", "0.9", "--out", str(out)]) == 0
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text(encoding="utf-8"))
    verify(results, out)
    for name, result in results["settings"].items():
        found = result["operating_point"]
        assert list(found) == ["referable", "sight_threatening"]
        assert found["referable"].keys() == {"threshold", "sensitivity", "specificity"}
        assert f"{name}" in said and "called beyond severity" in said
        with safe_open(out / f"{name}-1.safetensors", "np") as file:
            thresholds = json.loads(file.metadata()["thresholds"])
        assert thresholds == {what: own["threshold"]["runs"][1] for what, own in found.items()}
    assert "with a specificity of 0.9" in results["settings"]["FSCDP"]["statement"]
    rows = (out / "metrics.csv").read_text(encoding="utf-8")
    assert rows.count("referable sensitivity (operating point)") == 4
    (written, _) = write_report(out, progress=False)
    for name, result in results["settings"].items():
        own = {key: score["mean"] for key, score in result["operating_point"]["sight_threatening"].items()}
        shares = f"{100 * own['sensitivity']:.0f} % | {100 * own['specificity']:.0f} %"
        row = f"| {name} | sight-threatening | {own['threshold']:.2f} | {shares} |"
        assert row in written.read_text(encoding="utf-8").split("## Whom its thresholds call")[1]
    results["settings"]["F"]["operating_point"]["referable"]["sensitivity"]["mean"] = 0.99
    with pytest.raises(InputError, match="referable sensitivity"):
        verify(results, out)
