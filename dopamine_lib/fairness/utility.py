"""Utility at a fixed bound: what CDP, FPDP and FSCDP score at several epsilons, and without noise.

For each epsilon sigma is calibrated anew; q and T stay the paper's. The learning rate follows from sigma by one fixed
rule, ``rounds.rescaled``, whose exponent is chosen on validation patients (``validate_rule``), never on test images.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.fairness.scores import METRICS, scores
from dopamine_lib.federation.bounds import calibrated
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.rounds import rescaled
from dopamine_lib.federation.settings import Choice, Setting, setting
from dopamine_lib.federation.training import Training

EPSILONS = (0.5, 1.0, 3.0, 8.0, math.inf)
#: The setting whose choice a private one takes where there is no noise.
WITHOUT_NOISE = {"CDP": "C", "FPDP": "F", "FSCDP": "C"}
#: The exponent of the learning rate's rule: of 0, 1/2 and 1 the best on validation patients.
EXPONENT = 1.0
#: Without clipping: the learning rate beyond which longer steps no longer make up for there being fewer.
LONGEST = 2.0


def at_epsilon(
    experiment: Experiment,
    name: str,
    target: float,
    *,
    shorter: float = 1,
    boost: float = 1.0,
    exponent: float = EXPONENT,
) -> tuple[Setting, Choice]:
    """A private setting and its choice at epsilon ``target``; at infinity without noise and clipping.

    shorter  take 1 / shorter of the rounds, with steps ``shorter`` times as long: for chapters that must be quick
    boost    multiply the paper's q, e.g. for a group that is sampled more often
    Raises InputError for a setting without privacy, or arguments out of bounds.
    """
    declared = setting(name)
    if not declared.private:
        raise InputError(f"setting '{name}' has no epsilon; choose from {', '.join(WITHOUT_NOISE)}")
    check_within("shorter", shorter, 1, 100, "1 is the paper's number of rounds", low_open=False)
    check_within("boost", boost, 1, 1 / declared.sample_rate, "q is a probability", low_open=False)
    rounds, rate = max(1, round(declared.rounds / shorter)), boost * declared.sample_rate
    used, options = replace(declared, rounds=rounds, sample_rate=rate), experiment.options
    if math.isinf(target):
        choice = options.choice(WITHOUT_NOISE[name])
        longer = min(LONGEST, shorter * choice.learning_rate)
        return replace(used, noise_multiplier=None), replace(choice, learning_rate=longer)
    choice = replace(options, epsilon=target).choice(name)
    shares = options.shares(declared, len(experiment.sizes))
    used = calibrated(used, choice, shares, target, options.delta, options.accountant)
    return used, rescaled(choice, declared, used, exponent)


@torch.no_grad()
def probabilities(experiment: Experiment, training: Training) -> np.ndarray:
    """float64 (N, classes): the grades' probabilities for the test images, by the model handed out."""
    logits = training.task.logits(training.server.model, torch.as_tensor(experiment.test))
    return logits.double().softmax(1).numpy()


def runs_at(experiment: Experiment, name: str, target: float, **tailoring: Any) -> tuple[Setting, Choice, np.ndarray]:
    """Train ``options.runs`` runs ``at_epsilon``: the setting, its choice, and probabilities (R, N, classes)."""
    used, choice = at_epsilon(experiment, name, target, **tailoring)
    budget = target if used.private else math.inf
    runs = (
        experiment.training(name, run, setting=used, choice=choice, budget=budget).run()
        for run in range(experiment.options.runs)
    )
    return used, choice, np.array([probabilities(experiment, training) for training in runs])


def mean_interval(values: ArrayLike) -> dict:
    """Mean over runs with a 95 % interval (Student's t: 5 runs are few), and the runs; of no width for one run.

    >>> found = mean_interval([0.7, 0.8])
    >>> round(found["low"], 3), round(found["high"], 3)
    (0.115, 1.385)
    """
    values = np.asarray(values, dtype=float)
    mean, half = float(values.mean()), 0.0
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "runs": values.tolist()}


def utility_curve(
    options: Options,
    *,
    epsilons: Sequence[float] = EPSILONS,
    names: Sequence[str] = tuple(WITHOUT_NOISE),
    shorter: float = 1,
) -> list[dict]:
    """One row per setting and epsilon: "setting", "epsilon", "noise_multiplier", "learning_rate", "runs" and scores.

    Scores (``scores.METRICS``) are on test images, with mean and interval over runs, which differ in noise and samples,
    not in patients. Raises InputError as ``at_epsilon`` does.
    """
    experiment = Experiment.load(replace(options, epsilon=None), progress=False)
    labels, rows = experiment.dataset.labels[experiment.test], []
    for name in names:
        for target in epsilons:
            used, choice, graded = runs_at(experiment, name, target, shorter=shorter)
            found = scores(labels, graded)
            row = {"setting": name, "epsilon": target, "noise_multiplier": used.noise_multiplier}
            row |= {"learning_rate": choice.learning_rate, "runs": options.runs}
            rows.append(row | {metric: mean_interval(found[metric][0]) for metric in METRICS})
    return rows


def validate_rule(
    options: Options,
    name: str,
    *,
    epsilons: Sequence[float] = EPSILONS[:4],
    exponents: Sequence[float] = (0.0, 0.5, 1.0),
    shorter: float = 1,
) -> dict[float, list[float]]:
    """Accuracy on validation patients, never trained on, of each exponent at each epsilon: {exponent: [accuracies]}.

    That looking is not in epsilon.
    """
    experiment = Experiment.load(replace(options, epsilon=None), progress=False).held_out()
    labels = experiment.dataset.labels[experiment.test]
    found = {}
    for exponent in exponents:
        graded = [runs_at(experiment, name, target, shorter=shorter, exponent=exponent)[2] for target in epsilons]
        found[exponent] = [float(scores(labels, runs)["accuracy"].mean()) for runs in graded]
    return found
