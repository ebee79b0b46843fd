"""The functions behind the auditing chapter's explorer: what a bound allows, beside what attacks achieved."""

import numpy as np
from matplotlib.figure import Figure
from scipy.special import ndtr, ndtri

from dopamine_lib.auditing.membership import most_true_positives
from dopamine_lib.errors import InputError, check_within
from dopamine_lib.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, ticks
from dopamine_lib.privacy.gaussian import analytic_sigma

#: What the sliders offer.
EPSILONS, DELTAS, PRIORS = (0.01, 100.0), (1e-10, 0.1), (0.001, 0.999)
RATES = np.geomspace(1e-4, 1, 121)
#: For what was measured; the bounds have the other two colours of the palette.
COLOURS = (BLACK, GREEN, PURPLE, ORANGE, SKY)


def allowed(epsilon: float = 1.0, delta: float = 1e-4, prior: float = 0.5, rate: float = 0.01) -> dict:
    """What an (epsilon, delta) bound allows an attacker whose false-positive rate is ``rate``.

    prior  the attacker's probability that a patient is a member, before the attack
    Returns most, the largest true-positive rate; gaussian, that of the best attack on one Gaussian release with just
    this bound; and belief, the largest probability of membership after a hit. Raises InputError outside the sliders'
    bounds.

    >>> round(allowed(epsilon=1.0, delta=0.001, prior=0.5, rate=0.01)["most"], 4)  # e^epsilon rate + delta
    0.0282
    """
    check_within("epsilon", epsilon, *EPSILONS, "a useful bound is below 10", low_open=False)
    check_within("delta", delta, *DELTAS, "take much less than 1 / patients", low_open=False)
    check_within("prior", prior, *PRIORS, "1/2 is a coin", low_open=False)
    check_within("false-positive rate", rate, RATES[0], 1, "1 % is usual", low_open=False)
    most = float(most_true_positives(rate, epsilon, delta))
    return {
        "most": most,
        "gaussian": float(_gaussian(rate, epsilon, delta)),
        "belief": prior * most / (prior * most + (1 - prior) * rate),
    }


def draw_allowed(
    epsilon: float = 1.0,
    delta: float = 1e-4,
    prior: float = 0.5,
    rate: float = 0.01,
    measured: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Figure:
    """The bound of ``allowed`` on logarithmic axes.

    measured  curves to draw beside it: name -> (false-positive rates, true-positive rates), both ascending
    Raises InputError as ``allowed`` does, and for more curves than colours.
    """
    values = allowed(epsilon, delta, prior, rate)
    measured = measured or {}
    if len(measured) > len(COLOURS):
        raise InputError(f"{len(measured)} measured curves are too many to tell apart; give at most {len(COLOURS)}")
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.add_axes((0.14, 0.13, 0.83, 0.77))
    bound = most_true_positives(RATES, epsilon, delta)
    axes.fill_between(RATES, bound, 2, color=GREY, alpha=0.25, linewidth=0)
    axes.plot(RATES, bound, color=RED, label="no attack can pass")
    axes.plot(RATES, _gaussian(RATES, epsilon, delta), color=BLUE, label="best attack on one Gaussian release")
    axes.plot(RATES, RATES, color=GREY, linestyle=":", label="guessing")
    for colour, (name, (false, true)) in zip(COLOURS, measured.items(), strict=False):
        axes.plot(*_thinned(false, true), color=colour, linewidth=1, label=name)
    axes.plot(rate, values["most"], "o", color=RED)
    axes.set(xscale="log", yscale="log", xlim=(RATES[0], 1), ylim=(RATES[0], 1.2))
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        ticks(axis, 1e-4, 1e-3, 0.01, 0.1, 1)
    axes.set_title(
        f"at {rate:.2g}: at most {values['most']:.2g}; belief {prior:.0%} -> at most {values['belief']:.1%}",
        fontsize=11,
    )
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _gaussian(rate: float | np.ndarray, epsilon: float, delta: float) -> float | np.ndarray:
    """Phi(Phi^-1(f) + 1 / sigma): the likelihood-ratio test of N(0, sigma^2) against N(1, sigma^2)."""
    return ndtr(ndtri(rate) + 1 / analytic_sigma(epsilon, delta))


def _thinned(false: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve of many thousand steps, at the rates of the picture; NaN below its first rate."""
    at = np.searchsorted(false, RATES, "right") - 1
    return RATES, np.where(at < 0, np.nan, np.maximum(np.asarray(true)[np.maximum(at, 0)], 1e-9))
