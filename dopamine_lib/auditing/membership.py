"""Membership inference: was a model trained on this patient? Scores, the ROC curve, and what a bound allows.

The attacker is an outsider who holds a finished model and a patient's image and grade. Two attacks:

loss threshold    "small loss, so the model has seen it" (Yeom et al. 2018)
likelihood ratio  LiRA, offline (Carlini et al. 2022): how unusual is the model's confidence on this patient, compared
                  with shadow models that the attacker trained without it

Both need one number per patient and model, phi = ln(p / (1 - p)), where p is the model's probability of the true grade.
Over different training sets phi is nearly normal, and the loss ln(1 + e^-phi) falls as it grows. This module has no
models: ``shadow_models`` trains them. The figure that matters is the true-positive rate at a small false-positive rate:
an attack that is right about a few patients, and knows it, does harm however little it learns about the average one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from dopamine_lib.errors import InputError, check_delta, check_within
from dopamine_lib.privacy.definitions import check_epsilons

#: With fewer shadow models each patient's own spread is too noisy, and all share one (Carlini et al. 2022).
ENOUGH_SHADOWS = 64
#: A false-positive rate is reported if it stands for at least this many of the pooled non-members.
MIN_FALSE_POSITIVES = 10


def confidence(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """phi (..., N) of the true grades ``labels`` (N,), from logits (..., N, classes); no overflow near p = 1.

    >>> confidence([[0.0, 0.0], [0.0, 3.0]], [0, 1])  # p is 1/2, then 1 / (1 + e^-3)
    array([0., 3.])
    """
    logits, labels = np.asarray(logits, dtype=float), np.asarray(labels)
    own = np.arange(logits.shape[-1]) == labels[:, None]
    return logits[..., own] - logsumexp(np.where(own, -np.inf, logits), axis=-1)


def loss_scores(phi: ArrayLike) -> np.ndarray:
    """The loss-threshold attack's scores, of phi's shape: minus the loss."""
    return -np.logaddexp(0, -np.asarray(phi))


def likelihood_scores(phi: ArrayLike, shadows: ArrayLike) -> np.ndarray:
    """LiRA's scores (T, N): phi (T, N) of the targets in standard deviations above the models without the patient.

    shadows  phi (M, N) of other models; NaN where the model was trained on the patient, and does not count
    The score grows as the probability of a phi this large in a model without the patient falls. Raises InputError
    if the numbers of patients differ, or fewer than two models were trained without some patient.
    """
    phi, shadows = np.asarray(phi, dtype=float), np.asarray(shadows, dtype=float)
    without = np.sum(~np.isnan(shadows), axis=0)
    if shadows.shape[1:] != phi.shape[1:] or without.min() < 2:
        raise InputError(
            f"{shadows.shape} values of shadow models for {phi.shape} of targets, with {without.min()} models without "
            "some patient: both must have the same patients, and each at least 2 models without it; train more"
        )
    spread = np.nanstd(shadows, axis=0, ddof=1)
    if without.min() < ENOUGH_SHADOWS:
        spread = np.sqrt(np.mean(spread**2))
    return (phi - np.nanmean(shadows, axis=0)) / np.maximum(spread, 1e-12)


class Roc:
    """True- against false-positive rates over all targets and patients together, with bootstrap intervals.

    scores   (T, N), larger where the attack believes in membership
    members  bool (T, N), whether target t was trained on patient n
    Ties count as one step: an attack that scores everybody alike gains nothing. Raises InputError for other shapes,
    for scores that are NaN, and without members or non-members.

    >>> Roc([[3.0, 2.0, 1.0, 0.0]], [[True, True, False, False]]).auc()
    1.0
    """

    def __init__(self, scores: ArrayLike, members: ArrayLike):
        scores, members = np.asarray(scores, dtype=float), np.asarray(members, dtype=bool)
        if scores.ndim != 2 or scores.shape != members.shape:
            raise InputError(
                f"scores are {scores.shape} and members {members.shape}, but both must be (targets, patients): "
                "give one row per target"
            )
        if np.isnan(scores).any():
            raise InputError("a score is NaN and cannot be ordered: look for a model that diverged")
        self.shape, self.others = scores.shape, int(np.sum(~members))
        if not 0 < self.others < members.size:
            raise InputError(f"{self.others} of {members.size} are non-members, but both kinds are needed")
        flat = scores.ravel()
        self._order = np.argsort(-flat, kind="stable")
        ordered = flat[self._order]
        self._ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        self._members = members.ravel()[self._order]

    def curve(self, weights: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray]:
        """False- and true-positive rate (m,) at every threshold, from 0 to 1; ``weights`` (T, N) are the scores'."""
        weights = np.ones(self._order.size) if weights is None else np.ravel(weights)[self._order]
        rates = []
        for kind in (~self._members, self._members):
            reached = np.cumsum(weights * kind)[self._ends]
            rates.append(np.append(0.0, reached / reached[-1]))
        return rates[0], rates[1]

    def rate(self, false_positives: float, weights: ArrayLike | None = None) -> float:
        """True-positive rate at a false-positive rate of at most ``false_positives``.

        Raises InputError for a rate outside (0, 1), or one that stands for fewer than 10 non-members.
        """
        self._check(false_positives)
        return _at(*self.curve(weights), false_positives)

    def auc(self, weights: ArrayLike | None = None) -> float:
        """The area under the curve: the probability that a member scores above a non-member; 0.5 is guessing."""
        return float(np.trapezoid(*self.curve(weights)[::-1]))

    def bootstrap(
        self, false_positives: Sequence[float], *, resamples: int = 200, confidence: float = 0.95, seed: int = 0
    ) -> dict[float | str, tuple[float, float, float]]:
        """Rates with intervals over targets and patients: ``{rate: (value, low, high), ..., "auc": ...}``.

        Targets and patients are both drawn with replacement, and a score's weight is the product of the two counts,
        because neither the scores of one patient nor those of one model are independent (Owen 2007).
        """
        for rate in false_positives:
            self._check(rate)
        rng, (targets, patients) = np.random.default_rng(seed), self.shape
        drawn = []
        for _ in range(resamples):
            rows, columns = (rng.multinomial(size, np.full(size, 1 / size)) for size in (targets, patients))
            drawn.append(self._figures(false_positives, np.outer(rows, columns)))
        tail = 100 * (1 - confidence) / 2
        low, high = np.percentile(drawn, (tail, 100 - tail), axis=0)
        value = self._figures(false_positives, None)
        names = [*false_positives, "auc"]
        return {name: tuple(map(float, entry)) for name, *entry in zip(names, value, low, high, strict=True)}

    def _figures(self, false_positives: Sequence[float], weights: np.ndarray | None) -> list[float]:
        curve = self.curve(weights)
        return [*(_at(*curve, rate) for rate in false_positives), float(np.trapezoid(*curve[::-1]))]

    def _check(self, rate: float) -> None:
        check_within("false-positive rate", rate, 0, 1, "1 % is usual", high_open=True)
        if rate * self.others < MIN_FALSE_POSITIVES:
            raise InputError(
                f"a false-positive rate of {rate:g} is {rate * self.others:.1f} of {self.others} pooled non-members, "
                f"but {MIN_FALSE_POSITIVES} are needed: attack more targets"
            )


def _at(fpr: np.ndarray, tpr: np.ndarray, rate: float) -> float:
    return float(tpr[np.searchsorted(fpr, rate, "right") - 1])


def most_true_positives(false_positives: ArrayLike, epsilon: float, delta: float) -> np.ndarray:
    """The largest true-positive rate of any attack on an (epsilon, delta) model, at each false-positive rate f.

    Eq. 1 for the event "judged a member", and for its complement (Kairouz, Oh, Viswanath 2015): at most
    e^epsilon f + delta, and at most 1 - e^-epsilon (1 - delta - f).

    >>> most_true_positives([0.01, 0.5], epsilon=np.log(2), delta=0.0)
    array([0.02, 0.75])
    """
    check_epsilons(epsilon, zero=True)
    check_delta(delta, zero=True)
    f = np.asarray(false_positives, dtype=float)
    return np.minimum(np.minimum(np.exp(epsilon) * f + delta, 1 - np.exp(-epsilon) * (1 - delta - f)), 1.0)
