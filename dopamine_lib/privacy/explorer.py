"""The plain functions behind chapter 2's explorers: numbers first, then a picture of them.

Every function here answers a slider, so numbers and picture together take less than a tenth of a second. Without
widgets the same functions draw the same pictures. Figures for reading are in the notebooks and in ``figures``.
"""

import functools
import io

import numpy as np

from dopamine_lib.privacy.accounting import ORDERS, SampledGaussian, check_delta, rdp_epsilon
from dopamine_lib.privacy.composition import rdp_curve
from dopamine_lib.privacy.gaussian import analytic_sigma, classic_sigma, gaussian_delta

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
#: Values of epsilon on the horizontal axis of the calibration picture.
EPSILONS = np.geomspace(0.05, 50, 31)


def calibration(epsilon: float, delta: float) -> dict[str, float]:
    """Noise by Definition 2 and by the analytic mechanism, and the delta that each really spends.

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


def draw_calibration(epsilon: float = 1.0, delta: float = 1e-4):
    """Both sigmas against epsilon, and in the legend how much of delta each spends at ``epsilon``; returns a Figure."""
    chosen, rows = calibration(epsilon, delta), _calibration_curves(delta)
    figure, axes = _panel()
    for key, colour, name in (("classic", ORANGE, "Definition 2"), ("analytic", BLUE, "analytic")):
        label = f"{name}: {chosen[key]:.3f}, spends {chosen[f'delta_{key}'] / delta:.3g} delta"
        axes.plot(EPSILONS, [row[key] for row in rows], color=colour, label=label)
        axes.plot(epsilon, chosen[key], "o", color=colour)
    axes.axvline(1, color=GREY, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="epsilon", title="noise needed: sigma / sensitivity")
    for axis, powers in ((axes.xaxis, (0.1, 1, 10)), (axes.yaxis, (0.1, 1, 10, 100))):  # labels take the time: few
        axis.set_ticks(powers, [f"{power:g}" for power in powers])
        axis.set_minor_locator(_no_ticks())
    axes.set(xlim=(0.05, 50), ylim=(0.05, 200))
    axes.legend(loc="upper right")
    return figure


def budget(noise_multiplier: float, sample_rate: float, steps: int, delta: float, points: int = 41) -> dict:
    """What training has spent after 0 … ``steps`` steps of DP-SGD.

    Returns ``steps`` (n,) with n <= points, and epsilon (n,) as ``rdp_classic`` and ``rdp``; one Renyi curve serves
    them all. Raises InputError as ``SampledGaussian`` and ``rdp_curve`` do.
    """
    SampledGaussian(noise_multiplier, sample_rate, steps)
    check_delta(delta)
    done = np.unique((steps * np.linspace(0, 1, points) ** 2).astype(int))  # epsilon is steepest at the beginning
    rdp = done[:, None] * rdp_curve(noise_multiplier, sample_rate)
    spent = {"steps": done}
    for name, improved in (("rdp_classic", False), ("rdp", True)):
        spent[name] = np.where(done > 0, rdp_epsilon(rdp, ORDERS, delta, improved), 0.0)
    return spent


def draw_budget(noise_multiplier: float = 1.15, sample_rate: float = 0.034, steps: int = 3001, delta: float = 1e-4):
    """Epsilon against the steps of training, by the classic and the improved conversion; returns a Figure."""
    spent = budget(noise_multiplier, sample_rate, steps, delta)
    figure, axes = _panel()
    for key, colour, name in (("rdp_classic", ORANGE, "classic RDP"), ("rdp", BLUE, "improved RDP")):
        axes.plot(spent["steps"], spent[key], color=colour, label=f"{name}: {spent[key][-1]:.2f}")
    axes.set(xlabel="steps", title="epsilon spent", xlim=(0, None), ylim=(0, None))
    axes.locator_params(nbins=4)
    axes.legend(loc="lower right")
    return figure


def png(figure) -> bytes:
    """The picture as a PNG file, drawn once (Jupyter's own display measures, then draws again)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=72)
    return buffer.getvalue()


def explorer(draw, **sliders):
    """Sliders above the picture that ``draw(**values)`` returns, redrawn when a slider is let go; an ipywidgets box."""
    import ipywidgets

    image = ipywidgets.Image(format="png")

    def react(_=None):
        image.value = png(draw(**{name: slider.value for name, slider in sliders.items()}))

    for slider in sliders.values():
        slider.observe(react, names="value")
    react()
    return ipywidgets.VBox([*sliders.values(), image])


def _no_ticks():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _panel():
    """A small figure with fixed margins: a layout engine would draw everything twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.2), dpi=72)
    axes = figure.add_axes((0.1, 0.16, 0.87, 0.73))
    return figure, axes
