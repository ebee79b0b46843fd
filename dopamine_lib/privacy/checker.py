"""Does a mechanism keep the epsilon it declares? A lower bound on the true one, from samples alone.

Run the mechanism many times on D and equally often on a neighbour D'. One half of the samples chooses the event that
tells the two apart best, the other half counts it; Clopper and Pearson's exact limits of the two counts and Eq. 1 give
a bound that is wrong with probability at most 1 - confidence (Ding et al. 2018; Jagielski et al. 2020). A bound above
the declared epsilon proves a fault. One below proves nothing: the neighbour or the event may be the wrong one, or the
samples too few.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from dopamine_lib.errors import InputError, check_delta, check_within

MIN_SAMPLES = 200
#: Thresholds tried: evenly in the bulk, geometrically towards both tails, where a small delta is decided.
_RANKS = np.unique(np.concatenate([np.geomspace(1e-6, 0.5, 200), 1 - np.geomspace(1e-6, 0.5, 200)]))
#: A value as frequent as this among the scores of one side is tried as an event of its own.
_FREQUENT = 0.01


def clopper_pearson(hits: ArrayLike, trials: int, risk: float) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    """Exact lower and upper limits of a probability after ``hits`` (scalar or array) in ``trials``.

    Each limit by itself is wrong with probability at most ``risk`` (Clopper and Pearson 1934).

    >>> [round(float(limit), 3) for limit in clopper_pearson(hits=5, trials=10, risk=0.025)]
    [0.187, 0.813]
    """
    hits = np.asarray(hits, dtype=float)
    low = betaincinv(np.maximum(hits, 1), trials - hits + 1, risk)
    high = betaincinv(hits + 1, np.maximum(trials - hits, 1), 1 - risk)
    return np.where(hits > 0, low, 0.0)[()], np.where(hits < trials, high, 1.0)[()]


def _epsilon(hits_p, trials_p, hits_q, trials_q, delta, risk):
    """ln((p - delta) / q) of Eq. 1 with p at its lower and q at its upper limit, but at least 0."""
    p, _ = clopper_pearson(hits_p, trials_p, risk / 2)
    _, q = clopper_pearson(hits_q, trials_q, risk / 2)
    return np.log(np.maximum((p - delta) / q, 1.0))


@dataclass(frozen=True)
class Event:
    """A set Y of outputs, by their scores: ``<=`` or ``>=`` a threshold, ``==`` or ``!=`` a frequent value.

    reverse  whether Y is likelier on D', so that Eq. 1 is used with D and D' exchanged
    """

    relation: str
    threshold: float
    reverse: bool = False

    def hits(self, scores: np.ndarray) -> int:
        """How many of the scores (n,) are in Y."""
        compare = {"<=": np.less_equal, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal}[self.relation]
        return int(np.count_nonzero(compare(scores, self.threshold)))

    def __str__(self):
        return f"score {self.relation} {self.threshold:.6g}, likelier on {'D-prime' if self.reverse else 'D'}"


def strongest_event(on_d: np.ndarray, on_d_prime: np.ndarray, delta: float, risk: float) -> tuple[Event, float]:
    """The event with the largest epsilon on these scores, (n,) and (m,), and that (optimistic) epsilon."""
    first, second = np.sort(on_d), np.sort(on_d_prime)
    both = np.sort(np.concatenate([first, second]))
    thresholds = both[np.minimum((_RANKS * len(both)).astype(int), len(both) - 1)]
    frequent = [np.unique(side, return_counts=True) for side in (first, second)]
    atoms = np.unique(np.concatenate([v[c >= _FREQUENT * c.sum()] for v, c in frequent]))

    def counts(scores):
        at = {side: np.searchsorted(scores, thresholds, side) for side in ("left", "right")}
        equal = np.searchsorted(scores, atoms, "right") - np.searchsorted(scores, atoms, "left")
        return np.concatenate([at["right"], len(scores) - at["left"], equal, len(scores) - equal])

    values = np.concatenate([thresholds, thresholds, atoms, atoms])
    relations = ["<="] * len(thresholds) + [">="] * len(thresholds) + ["=="] * len(atoms) + ["!="] * len(atoms)
    here, there, n, m = counts(first), counts(second), len(first), len(second)
    found = np.concatenate(
        [_epsilon(here, n, there, m, delta, risk), _epsilon(there, m, here, n, delta, risk)]  # D / D', then D' / D
    )
    best = int(np.argmax(found))
    reverse, which = divmod(best, len(values))
    return Event(relations[which], float(values[which]), bool(reverse)), float(found[best])


def epsilon_lower_bound(
    samples_on_d: ArrayLike,
    samples_on_d_prime: ArrayLike,
    delta: float,
    confidence: float = 0.99,
    *,
    score: Callable[[ArrayLike], np.ndarray] | None = None,
) -> float:
    """A lower bound on the mechanism's true epsilon at ``delta`` that holds with probability ``confidence``.

    samples_on_d, samples_on_d_prime  independent outputs on D and on its neighbour D', (n,) and (m,), or
                                      (n, …) and (m, …) with a ``score``
    delta       in [0, 1): 0 asks for pure DP
    score       function from all outputs of a side to real numbers (n,), fixed before looking at them: a projection
                onto what the patient changes, or a log-likelihood ratio. It is post-processing, so it can hide a fault
                but never invent one
    Returns a float >= 0. Raises InputError for fewer than 200 samples per side, a value that is not finite, scores
    that are not one number per sample, delta outside [0, 1), or confidence outside (0, 1).

    >>> rng = np.random.default_rng(0)  # noise of scale 1 on a count: epsilon is 1
    >>> 0.8 < epsilon_lower_bound(rng.laplace(0, 1, 50_000), rng.laplace(1, 1, 50_000), delta=0.0) <= 1.0
    True
    """
    halves, event, risk = _chosen(samples_on_d, samples_on_d_prime, delta, confidence, score)
    (_, d), (_, d_prime) = halves
    likely, other = (d_prime, d) if event.reverse else (d, d_prime)
    return float(_epsilon(event.hits(likely), len(likely), event.hits(other), len(other), delta, risk))


def chosen_event(
    samples_on_d: ArrayLike,
    samples_on_d_prime: ArrayLike,
    delta: float,
    confidence: float = 0.99,
    *,
    score: Callable[[ArrayLike], np.ndarray] | None = None,
) -> Event:
    """The event that ``epsilon_lower_bound`` tests on the second half of the same samples."""
    return _chosen(samples_on_d, samples_on_d_prime, delta, confidence, score)[1]


def _chosen(samples_on_d, samples_on_d_prime, delta, confidence, score):
    check_delta(delta, zero=True)
    check_within("confidence", confidence, 0, 1, "0.99 is usual", high_open=True)
    halves = []
    for name, samples in (("D", samples_on_d), ("D-prime", samples_on_d_prime)):
        scores = np.asarray(samples if score is None else score(samples))
        if scores.ndim != 1:
            raise InputError(f"samples on {name} have shape {scores.shape}, but must be (n,): give a score for vectors")
        if len(scores) < MIN_SAMPLES:
            raise InputError(
                f"{len(scores)} samples on {name} are too few, at least {MIN_SAMPLES} are needed: run it more often"
            )
        if not np.isfinite(scores).all():
            raise InputError(f"a sample on {name} is not finite, but samples must be ordered: look for an overflow")
        halves.append((scores[: len(scores) // 2], scores[len(scores) // 2 :]))
    risk = 1 - confidence
    event, _ = strongest_event(halves[0][0], halves[1][0], delta, risk)
    return halves, event, risk
