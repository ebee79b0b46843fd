"""Utility curves: every point meets its epsilon, and nothing is chosen by looking at test images."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dopamine_lib.fairness.figures import draw_alternatives, draw_measures, draw_subgroups, draw_utility
from dopamine_lib.fairness.scores import METRICS
from dopamine_lib.fairness.utility import (
    WITHOUT_NOISE,
    at_epsilon,
    mean_interval,
    runs_at,
    utility_curve,
    validate_rule,
)
from dopamine_lib.federation import experiment as experiment_module
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.settings import CHOICES, SETTINGS, Choice, slower
from dopamine_lib.reproduction.figure1 import paper_points


@pytest.fixture(scope="module")
def options(tmp_path_factory, make_aptos):
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    return Options(
        data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4, runs=2, seed=1, accountant="rdp"
    )


@pytest.fixture(scope="module")
def experiment(options):
    return Experiment.load(options, progress=False)


@pytest.mark.parametrize("name", list(WITHOUT_NOISE))
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_sigma_meets_epsilon_and_wastes_little_of_it(experiment, name, target):
    used, choice = at_epsilon(experiment, name, target)
    declared = SETTINGS[name]
    assert (used.sample_rate, used.rounds) == (declared.sample_rate, declared.rounds)
    spent = experiment.training(name, setting=used, choice=choice, budget=target).bound.epsilon(used.steps, "rdp")
    assert 0.99 * target < spent <= target


@pytest.mark.parametrize("name", list(WITHOUT_NOISE))
def test_at_infinity_nothing_is_clipped_or_noised(experiment, name):
    used, choice = at_epsilon(experiment, name, math.inf)
    assert not used.private and math.isinf(choice.max_grad_norm)
    assert choice == CHOICES["head"][WITHOUT_NOISE[name]]


def test_the_learning_rate_falls_with_the_noise_and_never_rises():
    choice = Choice(0.4, 1.0)
    assert slower(choice, 0.25).learning_rate == pytest.approx(0.1)
    assert slower(choice, 0.25, 0.5).learning_rate == pytest.approx(0.2)
    assert slower(choice, 0.25, 0.0) == slower(choice, 3.0) == choice


def test_the_rule_is_the_experiments_own(experiment):
    tight = Experiment.load(replace(experiment.options, epsilon=1.0), progress=False)
    used, choice = at_epsilon(experiment, "FSCDP", 1.0)
    assert used.noise_multiplier == tight.plan("FSCDP").setting.noise_multiplier
    assert choice.learning_rate == pytest.approx(tight.plan("FSCDP").choice.learning_rate)


def test_fewer_rounds_have_longer_steps_and_less_noise(experiment):
    whole, part = (at_epsilon(experiment, "FSCDP", 1.0, shorter=s) for s in (1, 5))
    assert part[0].rounds == 600 and part[0].noise_multiplier < whole[0].noise_multiplier
    # noise moves the model by eta sigma sqrt(T) in a run: as far as in the whole run
    drift = [choice.learning_rate * used.noise_multiplier * math.sqrt(used.rounds) for used, choice in (whole, part)]
    assert drift[0] == pytest.approx(drift[1], rel=0.01)


def test_one_row_per_setting_and_epsilon_with_every_score(options):
    rows = utility_curve(options, epsilons=(1.0, math.inf), names=("FPDP", "FSCDP"), shorter=100)
    assert [(row["setting"], row["epsilon"]) for row in rows] == [
        (name, target) for name in ("FPDP", "FSCDP") for target in (1.0, math.inf)
    ]
    for row in rows:
        assert (row["noise_multiplier"] is None) == math.isinf(row["epsilon"])
        for metric in METRICS:
            score = row[metric]
            assert score["low"] <= score["mean"] <= score["high"] and len(score["runs"]) == 2
    assert len(draw_utility(rows, paper_points("rdp")).axes) == 4


def test_the_intervals_are_students():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3 and found["high"] - 3 == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert found["runs"] == [1, 2, 3, 4, 5]
    alone = mean_interval([0.7])
    assert alone["low"] == alone["mean"] == alone["high"] == 0.7


def test_the_rule_is_validated_without_looking_at_test_images(options, monkeypatch):
    """Test labels made nonsense change nothing; validation labels made nonsense do."""
    terms = dict(epsilons=(3.0,), exponents=(0.0, 1.0), shorter=100)
    plain = validate_rule(options, "FSCDP", **terms)
    assert set(plain) == {0.0, 1.0} and len(plain[0.0]) == 1
    load = experiment_module.data.load

    def spoiled(part):
        def loaded(*arguments, **more):
            dataset = load(*arguments, **more)
            labels = dataset.labels.copy()
            where = getattr(dataset, part)
            labels[where] = (labels[where] + 1) % 5
            return replace(dataset, labels=labels)

        monkeypatch.setattr(experiment_module.data, "load", loaded)
        return validate_rule(options, "FSCDP", **terms)

    assert spoiled("test") == plain
    assert spoiled("train") != plain


def test_the_papers_points_are_the_golden_ones():
    points = paper_points("rdp_classic")
    assert [round(points[name]["epsilon"], 2) for name in ("CDP", "FPDP", "FSCDP")] == [9.13, 19.08, 10.83]
    assert [round(points[name]["accuracy"], 3) for name in ("CDP", "FPDP", "FSCDP")] == [0.741, 0.732, 0.740]


def test_runs_are_those_of_the_setting_at_its_epsilon(experiment):
    _, _, graded = runs_at(experiment, "FSCDP", 3.0, shorter=50)
    assert graded.shape == (2, len(experiment.test), 5) and np.allclose(graded.sum(2), 1)
    assert not np.array_equal(graded[0], graded[1])


def test_pictures_show_what_is_handed_in():
    score = {"mean": 0.7, "low": 0.6, "high": 0.9}
    table = [
        {"by": "camera", "group": g, "patients": 40, "accuracy": score, "ece": s}
        for g, s in zip("AB", (score, None), strict=True)
    ]
    panels = draw_subgroups({1.0: table, math.inf: table}, "camera").axes
    assert [len(axes.containers) for axes in panels] == [4, 2]  # a point without a score is left out
    measures = draw_measures([{"measure": "as it is", "accuracy": score}], [("accuracy", "accuracy")])
    assert measures.axes[0].get_xlabel() == "accuracy"
    rows = [{"method": m, "epsilon": e, "accuracy": score} for m in "ab" for e in (1.0, math.inf)]
    assert len(draw_alternatives(rows).axes[0].containers) == 2


def test_bad_input_is_refused(experiment, refuses):
    with refuses("setting 'C' has no epsilon", "FSCDP"):
        at_epsilon(experiment, "C", 1.0)
    with refuses("shorter is 0.5"):
        at_epsilon(experiment, "CDP", 1.0, shorter=0.5)
    with refuses("boost is 40"):
        at_epsilon(experiment, "FSCDP", 1.0, boost=40)
    with refuses("epsilon is 0"):
        at_epsilon(experiment, "CDP", 0.0)
