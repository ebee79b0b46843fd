"""The plain functions behind chapter 2's explorers: numbers first, then a picture of them.

Every function here answers a slider, so numbers and picture together take less than a tenth of a second. Without
widgets the same functions draw the same pictures. Figures for reading are in the notebooks and in ``figures/``.
"""

import functools

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.errors import check_delta
from dopamine_lib.pictures import BLUE, GREY, RED, explorer_panel, ticks
from dopamine_lib.privacy.accounting import ORDERS, SampledGaussian, rdp_epsilon
from dopamine_lib.privacy.composition import rdp_curve
from dopamine_lib.privacy.gaussian import analytic_sigma, classic_sigma, gaussian_delta

#: Values of epsilon on the horizontal axis of the calibration picture.
EPSILONS = np.geomspace(0.05, 50, 31)


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
        axes.plot(spent["steps"], spent[key], color=colour, label=f"{name}: {spent[key][-1]:.2f}")
    axes.set(xlabel="steps", title="epsilon spent", xlim=(0, None), ylim=(0, None))
    axes.locator_params(nbins=4)
    axes.legend(loc="lower right")
    return figure
