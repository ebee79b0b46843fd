"""The plain functions behind chapter 2's explorers: numbers first, then a picture of them.

Every function here answers a slider, so numbers and picture together take less than a tenth of a second. Without
widgets the same functions draw the same pictures. Figures for reading are in the notebooks and in ``figures/``.
"""

import functools

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.errors import check_delta, check_whole
from dopamine_lib.pictures import BLUE, GREY, LIGHT_GREY, RED, explorer_panel, ticks
from dopamine_lib.privacy.accounting import ORDERS, SampledGaussian, rdp_epsilon
from dopamine_lib.privacy.composition import rdp_curve
from dopamine_lib.privacy.gaussian import analytic_sigma, classic_sigma, gaussian_delta
from dopamine_lib.privacy.pld import loss_distribution, pld_epsilon

#: Values of epsilon on the horizontal axis of the calibration picture.
EPSILONS = np.geomspace(0.05, 50, 31)
#: Noise multiplier and sample rate of the paper's FSCDP.
FSCDP = (1.15, 100 / 2930)


def calibration(epsilon: float, delta: float) -> dict[str, float]:
    """The noise of Definition 2 and of the analytic mechanism, and the delta that each really spends.

    Keys: classic, analytic (sigma in units of the sensitivity), delta_classic, delta_analytic. Raises InputError
    for epsilon outside (0, 1000] or delta outside (0, 1).
    """
    classic, analytic = classic_sigma(epsilon, delta), analytic_sigma(epsilon, delta)
    return {
        "classic": classic,
        "analytic": analytic,
        "delta_classic": gaussian_delta(classic, epsilon),
        "delta_analytic": gaussian_delta(analytic, epsilon),
    }


@functools.lru_cache(maxsize=64)
def _calibration_curves(delta: float) -> tuple[dict[str, float], ...]:
    return tuple(calibration(float(epsilon), delta) for epsilon in EPSILONS)


def draw_calibration(epsilon: float = 1.0, delta: float = 1e-4) -> Figure:
    """Both sigmas against epsilon, and in the legend how much of delta each spends at ``epsilon``."""
    chosen, rows = calibration(epsilon, delta), _calibration_curves(delta)
    figure, axes = explorer_panel()
    for key, colour, name in (("classic", RED, "Definition 2"), ("analytic", BLUE, "analytic")):
        label = f"{name}: {chosen[key]:.3f}, spends {chosen[f'delta_{key}'] / delta:.3g} delta"
        axes.plot(EPSILONS, [row[key] for row in rows], color=colour, label=label)
        axes.plot(epsilon, chosen[key], "o", color=colour)
    axes.axvline(1, color=GREY, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="epsilon", title="noise needed: sigma / sensitivity")
    ticks(axes.xaxis, 0.1, 1, 10)
    ticks(axes.yaxis, 0.1, 1, 10, 100)
    axes.set(xlim=(0.05, 50), ylim=(0.05, 200))
    axes.legend(loc="upper right")
    return figure


def budget(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> dict[str, np.ndarray]:
    """What training has spent after 0 … ``steps`` steps of DP-SGD.

    Returns ``steps`` (n,) with n <= 41, and epsilon (n,) as ``rdp_classic`` and ``rdp``; one Renyi curve serves them
    all. Raises InputError as ``SampledGaussian`` and ``rdp_curve`` do.
    """
    SampledGaussian(noise_multiplier, sample_rate, steps)
    check_delta(delta)
    done = np.unique((steps * np.linspace(0, 1, 41) ** 2).astype(int))  # epsilon is steepest at the beginning
    rdp = done[:, None] * rdp_curve(noise_multiplier, sample_rate)
    spent = {"steps": done}
    for name, improved in (("rdp_classic", False), ("rdp", True)):
        spent[name] = np.where(done > 0, rdp_epsilon(rdp, ORDERS, delta, improved), 0.0)
    return spent


def draw_budget(
    noise_multiplier: float = 1.15, sample_rate: float = 0.034, steps: int = 3001, delta: float = 1e-4
) -> Figure:
    """Epsilon against the steps of training, by the classic and the improved conversion."""
    spent = budget(noise_multiplier, sample_rate, steps, delta)
    figure, axes = explorer_panel()
    for key, colour, name in (("rdp_classic", RED, "classic RDP"), ("rdp", BLUE, "improved RDP")):
        axes.plot(spent["steps"][1:], spent[key][1:], color=colour, label=f"{name}: {spent[key][-1]:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="steps", title="epsilon spent")
    ticks(axes.xaxis, 1, 10, 100, 1000, 10_000)
    ticks(axes.yaxis, 0.1, 1, 10, 100)
    axes.set(xlim=(1, 30_001), ylim=(0.02, 1000))
    axes.legend(loc="lower right")
    return figure


def draw_losses(steps: int = 3001) -> Figure:
    """The privacy loss of the paper's FSCDP after this many steps, and the part of it beyond epsilon at delta = 1e-4.

    In grey, after 1, 10, 100 and 1,000 steps: every step adds a loss, mostly next to nothing. Raises InputError for
    steps outside [1, 3001].
    """
    check_whole("steps", steps, 1, 3001, "the paper takes 3001")
    epsilon = pld_epsilon(((*FSCDP, steps),), 1e-4)
    figure, axes = explorer_panel()
    for number in (1, 10, 100, 1000):
        axes.plot(*_density(number), color=LIGHT_GREY, linewidth=0.8)
    losses, density = _density(steps)
    axes.plot(losses, density, color=BLUE)
    beyond = losses > epsilon
    axes.fill_between(losses[beyond], density[beyond], 1e-9, color=RED, alpha=0.6, linewidth=0)
    axes.axvline(epsilon, color=RED, linestyle="--", label=f"epsilon = {epsilon:.2f}")
    axes.set(
        yscale="log", xlim=(-6, 14), ylim=(1e-7, 100), xlabel="privacy loss", title=f"density after {steps:,} steps"
    )
    axes.set_xticks((-5, 0, 5, 10))
    ticks(axes.yaxis, 1e-6, 0.001, 1)
    axes.legend(loc="upper left")
    figure.set_label(
        f"The density of the privacy loss after {steps:,} steps, on a logarithmic axis: with more steps it moves "
        f"to the right and grows wider. A dashed line at epsilon = {epsilon:.2f}; what lies beyond it makes up delta."
    )
    return figure


def _density(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and their density, 500 points: enough for a picture."""
    losses, masses = loss_distribution(*FSCDP, steps)
    mid, sums = losses[32::64], masses.reshape(-1, 64).sum(axis=1)
    shown = (mid > -6.5) & (mid < 14.5)
    return mid[shown], np.maximum(sums[shown] / (64 * (losses[1] - losses[0])), 1e-9)
