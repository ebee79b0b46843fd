"""Figure 1 of the paper: accuracy and epsilon against epochs, from results handed in, beside the published curves."""

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.federation.results_table import on_the_papers_task, paper_figure1
from dopamine_lib.federation.settings import SETTINGS
from dopamine_lib.pictures import setting_colours
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon


def paper_points(accountant: str = "prv", delta: float = 1e-4) -> dict[str, dict[str, float]]:
    """The paper's private settings: epsilon of the declared sigma by ``accountant``, and Figure 1's last accuracy."""
    published, points = paper_figure1(), {}
    for name, declared in SETTINGS.items():
        if declared.private:
            spent = SampledGaussian(declared.noise_multiplier, declared.sample_rate, declared.steps)
            points[name] = {
                "epsilon": epsilon(spent, delta, accountant),
                "accuracy": float(published[name][-10:].mean()) / 100,
            }
    return points


def figure1(results: dict) -> Figure:
    """Accuracy with its spread over runs (above) and epsilon (below) against epochs, from ``results.json``.

    The paper's own curves are dashed, where the classes are the paper's; those of runs that have not come to their
    end are dotted.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    published = paper_figure1() if on_the_papers_task(results) else {}
    begun = results.get("unfinished", [])
    colours = setting_colours([*results["settings"], *(record["setting"] for record in begun)])
    for name, result in results["settings"].items():
        history, colour = result["history"], colours[name]
        epoch = [record["epoch"] for record in history]
        mean = 100 * np.array([record["accuracy_mean"] for record in history])
        spread = 100 * np.array([record["accuracy_std"] for record in history])
        final = 100 * result["test_accuracy"]["mean"]
        above.plot(epoch, mean, color=colour, label=f"{name}: {final:.1f} %")
        above.fill_between(epoch, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        if name in published:
            above.plot(published["epoch"], published[name], color=colour, linestyle="--", linewidth=0.9, alpha=0.6)
        if result["epsilon"] is not None:
            spent = [record["epsilon_rdp_classic"] for record in history]
            total = result["epsilon"]["rdp_classic"]
            below.plot(epoch, spent, color=colour, label=rf"{name}: $\varepsilon$ = {total:.2f}")
    for record in begun:
        epoch, accuracy = ([entry[key] for entry in record["history"]] for key in ("epoch", "accuracy"))
        above.plot(epoch, 100 * np.array(accuracy), color=colours[record["setting"]], linestyle=":")
    runs = max((len(result["test_accuracy"]["runs"]) for result in results["settings"].values()), default=0)
    above.set_ylabel("test accuracy (%)")
    above.set_title(
        f"{results['data']}, {results['model']}, {runs} run{'s' if runs != 1 else ''}"
        + ("; dashed: the paper's Figure 1 (APTOS-2019, SqueezeNet)" if published else ""),
        fontsize=10,
    )
    if results["settings"]:
        above.legend(loc="lower right")
    below.set_xlabel("epoch")
    below.set_ylabel(rf"$\varepsilon$ at $\delta$ = {results['delta']:g} (classic RDP)")
    if below.lines:
        below.legend(loc="upper left")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure
