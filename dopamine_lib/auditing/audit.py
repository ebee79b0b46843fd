"""Empirical epsilon: a lower bound on what a training run spent, to compare with the accountant's upper bound.

one run     many canaries, each put among the patients or left out by a fair coin; guess which are in. Training that
            keeps (epsilon, delta) does not let many guesses be right (Steinke, Nasr, Jagielski 2023)
many runs   the same release many times with and without one canary; ``checker`` counts, and its bound is compared here
            with all of the accountant's claims: a fault may break one of them long before the others

Both can prove, at their confidence, that more was spent than accounted: a fault of the code, or of the accountant.
Neither can prove that there is none: another canary or guess might have shown one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import betainc, expit

from dopamine_lib.errors import InputError, check_delta, check_epsilon, check_within
from dopamine_lib.privacy.accounting import DpEvent, epsilon
from dopamine_lib.privacy.checker import Event, chosen_event, clopper_pearson, strongest_event

#: Where an accountant's curve is tested: a small delta shows rare disasters, a large one a spread that is too narrow.
DELTAS = (1e-5, 1e-3, 1e-2, 1e-1)
#: Risks at which an event is sought, besides the audit's own: the smaller the risk, the more often it must happen.
_SURER = (1e-4, 1e-8)
_MIN_CANARIES, _MAX_EPSILON = 10, 50.0


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of ``correct`` or more right guesses, if training is (epsilon, delta)-private.

    f(v) + 2 m delta max_i (f(v - i) - f(v)) / i, with m canaries, r guesses, v of them right, i = 1 ... v and
    f(v) = P(Binomial(r, e^epsilon / (e^epsilon + 1)) >= v): Steinke, Nasr, Jagielski 2023, theorem 5.2. Canaries
    without a guess count as abstentions. Raises InputError unless 0 <= v <= r <= m, epsilon >= 0 and delta in [0, 1).

    >>> one_run_p_value(canaries=4, guesses=4, correct=4, epsilon=0.0, delta=0.0)  # four fair coins
    0.0625
    """
    check_within("canaries", canaries, 1, 10**7, "count those whose coin was thrown", low_open=False)
    check_within("guesses", guesses, 0, canaries, "at most one for each canary", low_open=False)
    check_within("correct guesses", correct, 0, guesses, "at most all of them", low_open=False)
    check_epsilon(epsilon, zero=True)
    check_delta(delta, zero=True)
    least = np.arange(correct, 0, -1)  # v, v - 1 ... 1, and for 0 f is 1
    f = np.append(betainc(least, guesses - least + 1, expit(epsilon)), 1.0)
    slope = ((f[1:] - f[0]) / np.arange(1, correct + 1)).max(initial=0.0)
    return float(min(1.0, f[0] + 2 * canaries * delta * slope))


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon whose ``one_run_p_value`` is below 1 - confidence, to 1e-6 and rounded down; else 0.

    >>> round(one_run_bound(canaries=100, guesses=100, correct=90, delta=0.0), 2)
    1.63
    """
    check_within("confidence", confidence, 0, 1, "0.95 is usual", high_open=True)

    def excess(epsilon):  # grows with epsilon; where it is negative, epsilon is rejected
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    if excess(_MAX_EPSILON) < 0:
        return _MAX_EPSILON
    return max(0.0, brentq(excess, 0.0, _MAX_EPSILON, xtol=4e-7) - 5e-7)


@dataclass(frozen=True)
class OneRun:
    """The result of one run with canaries: ``epsilon`` is at most the true one, with probability ``confidence``."""

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int


def one_run_audit(
    scores: ArrayLike,
    included: ArrayLike,
    delta: float,
    *,
    guesses: Sequence[float] = (0.1, 0.3),
    confidence: float = 0.95,
) -> OneRun:
    """Guess that the highest scores belong to canaries that were in, the lowest to those that were out.

    scores, included  (m,): the score of each canary, and its fair coin
    guesses  shares of the canaries to guess at, half of them at either end; fixed before looking at the scores.
             The best of several shares is taken, each at its part of the risk (Bonferroni)
    Raises InputError for fewer than 10 canaries, scores that are not finite, or a share outside (0, 1].
    """
    scores, included = np.asarray(scores, dtype=float), np.asarray(included, dtype=bool)
    if scores.ndim != 1 or scores.shape != included.shape or len(scores) < _MIN_CANARIES:
        raise InputError(
            f"scores have shape {scores.shape} and coins {included.shape}, but both must be (m,) with m >= "
            f"{_MIN_CANARIES}: one for each canary"
        )
    if not np.isfinite(scores).all():
        raise InputError("a score is not finite and cannot be ordered: look for overflow")
    found, order = [], np.argsort(scores, kind="stable")
    for share in guesses:
        check_within("share of the canaries guessed at", share, 0, 1, "0.1 to 0.3 are usual")
        half = max(1, min(round(share * len(scores) / 2), len(scores) // 2))
        correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        sure = 1 - (1 - confidence) / len(guesses)
        bound = one_run_bound(len(scores), 2 * half, correct, delta, sure)
        found.append(OneRun(bound, delta, confidence, len(scores), 2 * half, correct))
    return max(found, key=lambda run: run.epsilon)


@dataclass(frozen=True)
class Claim:
    """What an accountant claims: (epsilon, delta)."""

    epsilon: float
    delta: float


def claims(
    events: DpEvent | Sequence[DpEvent], deltas: Sequence[float] = DELTAS, accountant: str = "prv"
) -> tuple[Claim, ...]:
    """What an accountant claims of ``events``, at those of several deltas where it has a bound; all must hold."""
    found = [(epsilon(events, delta, accountant), delta) for delta in deltas]
    return tuple(Claim(spent, delta) for spent, delta in found if spent is not None)


@dataclass(frozen=True)
class Verdict:
    """The claim that looked weakest, and what the other half of the samples shows about it.

    epsilon  lower bound of the true epsilon at ``claim.delta``
    delta    lower bound of the true delta at ``claim.epsilon``
    Either is above the truth with probability at most 1 - ``confidence``; both exceed the claim or neither does.
    """

    claim: Claim
    epsilon: float
    delta: float
    event: Event
    confidence: float

    @property
    def broken(self) -> bool:
        """Whether the claim is disproved."""
        return self.epsilon > self.claim.epsilon

    def __str__(self) -> str:
        return (
            f"{'BROKEN' if self.broken else 'holds'}: epsilon at least {self.epsilon:.2f}, claimed "
            f"{self.claim.epsilon:.2f} at delta {self.claim.delta:g}"
        )


def audit(on_d: ArrayLike, on_d_prime: ArrayLike, claimed: Sequence[Claim], confidence: float = 0.95) -> Verdict:
    """Test an accountant's claims with samples on D and on its neighbour D'.

    on_d, on_d_prime  scores (n,) and (m,) of independent releases, at least 200 of each
    claimed           the claims; the one to test and the event to test it by are chosen on the first half of the
                      samples, so that the second half decides one question, at the full confidence
    Raises InputError as ``checker.epsilon_lower_bound`` does, and without claims.
    """
    if not claimed:
        raise InputError("there is nothing to test: give at least one claim")
    risk, sides = 1 - confidence, (np.asarray(on_d), np.asarray(on_d_prime))
    chosen_event(*sides, claimed[0].delta, confidence)  # refuses samples that cannot be ordered
    seen, kept = zip(*(np.array_split(side, [len(side) // 2]) for side in sides), strict=True)
    # events that stand out clearly and events that stand out far, for every claim
    tries = [(claim, strongest_event(*seen, claim.delta, sure)[0]) for claim in claimed for sure in (risk, *_SURER)]
    claim, event = max(tries, key=lambda pair: _excess(*pair, *seen))
    likely, other = reversed(kept) if event.reverse else kept
    p, _ = clopper_pearson(event.hits(likely), len(likely), risk / 2)
    _, q = clopper_pearson(event.hits(other), len(other), risk / 2)
    lower = float(np.log(max(1.0, (p - claim.delta) / q)))
    return Verdict(claim, lower, float(max(0.0, p - np.exp(claim.epsilon) * q)), event, confidence)


def _excess(claim: Claim, event: Event, on_d: np.ndarray, on_d_prime: np.ndarray) -> float:
    """How many standard errors the event's probability lies above what the claim allows."""
    likely, other = (on_d_prime, on_d) if event.reverse else (on_d, on_d_prime)
    (p, n), (q, m) = [((event.hits(side) + 1) / (len(side) + 2), len(side)) for side in (likely, other)]
    allowed = np.exp(claim.epsilon)
    return (p - claim.delta - allowed * q) / np.sqrt(p * (1 - p) / n + allowed**2 * q * (1 - q) / m)
