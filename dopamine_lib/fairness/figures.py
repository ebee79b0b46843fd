"""Pictures of subgroups, measures, utility and alternatives, from rows handed in."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dopamine_lib.pictures import GREY, PALETTE, setting_colours

NAMES = {"accuracy": "accuracy", "quadratic_kappa": "quadratic kappa", "auroc": "AUROC", "ece": "calibration error"}


def _bar(score: dict) -> list[list[float]]:
    """Lengths (2, 1) of an error bar, below and above the mean."""
    return [[max(0.0, score["mean"] - score["low"])], [max(0.0, score["high"] - score["mean"])]]


def _epsilon_axis(axes: Axes, epsilons: list[float]) -> dict[float, float]:
    """Put epsilons on a logarithmic axis, with infinity at the right end; returns each one's place."""
    finite = [e for e in epsilons if math.isfinite(e)]
    where = {e: e if math.isfinite(e) else 3 * max(finite) for e in epsilons}
    axes.set_xscale("log")
    axes.set_xticks(list(where.values()), ["no noise" if math.isinf(e) else f"{e:g}" for e in where])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("epsilon")
    return where


def _curve(axes: Axes, where: dict[float, float], rows: list[dict], metric: str, shift: float = 1.0, **style) -> None:
    """One line of a score's mean, with its interval as an error bar, against epsilon."""
    mean = np.array([row[metric]["mean"] for row in rows])
    ends = np.array([[row[metric]["low"], row[metric]["high"]] for row in rows]).T
    x = [where[row["epsilon"]] * shift for row in rows]
    axes.errorbar(x, mean, np.abs(ends - mean), fmt="o-", ms=4, capsize=2, **style)


def draw_subgroups(tables: dict[float, list[dict]], by: str) -> Figure:
    """Accuracy and calibration error of each group of a division against epsilon.

    tables  epsilon -> the rows of ``subgroup_table``
    by      the division, such as "age": rows of other divisions are left out
    """
    figure = Figure(figsize=(8.8, 3.2), layout="constrained")
    groups = [row["group"] for row in next(iter(tables.values())) if row["by"] == by]
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "ece"), strict=True):
        where = _epsilon_axis(axes, list(tables))
        for number, group in enumerate(groups):
            rows = {e: next(r for r in t if r["by"] == by and r["group"] == group) for e, t in tables.items()}
            shift = 1.04 ** (number - (len(groups) - 1) / 2)  # bars side by side
            label = f"{group} ({next(iter(rows.values()))['patients']})"
            for e, row in rows.items():
                if row[metric] is not None:
                    mean, bar = row[metric]["mean"], _bar(row[metric])
                    axes.errorbar(where[e] * shift, mean, bar, fmt="o", ms=4, color=PALETTE[number % 8], label=label)
                    label = None
        axes.set_ylabel(NAMES[metric])
        axes.grid(alpha=0.3)
    axes.legend(title=by, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_measures(rows: list[dict], columns: list[tuple[str, str]]) -> Figure:
    """Measures side by side: a panel of means with intervals for each (key, title) of ``columns``.

    rows  dicts with "measure" and, by key, a dict of mean, low and high. The first row is the one to compare with.
    """
    figure = Figure(figsize=(2.6 * len(columns) + 1.6, 0.45 * len(rows) + 1.0), layout="constrained")
    heights = np.arange(len(rows))[::-1]
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(panels, columns, strict=True):
        axes.axvline(rows[0][key]["mean"], color=GREY, linestyle=":")
        for height, row, colour in zip(heights, rows, PALETTE, strict=False):
            axes.errorbar(row[key]["mean"], height, xerr=_bar(row[key]), fmt="o", color=colour)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(heights, [row["measure"] for row in rows])
    panels[0].set_ylim(-0.6, len(rows) - 0.4)
    return figure


def draw_utility(rows: list[dict], paper: dict[str, dict[str, float]] | None = None) -> Figure:
    """Accuracy, kappa, AUROC and calibration error against epsilon, one line per setting, from ``utility_curve``.

    paper  ``paper_points``: the accuracy as a star, epsilon as a dotted line
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    epsilons = sorted({row["epsilon"] for row in rows})
    names = list(dict.fromkeys(row["setting"] for row in rows))
    colours = setting_colours(names)
    for axes, metric in zip(figure.subplots(2, 2).ravel(), NAMES, strict=True):
        where = _epsilon_axis(axes, epsilons)
        for number, name in enumerate(names):
            colour, own = colours[name], [row for row in rows if row["setting"] == name]
            _curve(axes, where, own, metric, 1.05 ** (number - 1), color=colour, label=name)
            if paper is not None:
                axes.axvline(paper[name]["epsilon"], color=colour, linestyle=":", linewidth=1)
            if paper is not None and metric == "accuracy":
                point = paper[name]["epsilon"], paper[name]["accuracy"]
                axes.plot(*point, "*", ms=11, color=colour, markeredgecolor="white")
        axes.set_ylabel(NAMES[metric])
        axes.grid(alpha=0.3)
        if metric == "auroc":
            axes.legend(fontsize=8, loc="lower right")
    return figure


def draw_alternatives(rows: list[dict]) -> Figure:
    """Accuracy against epsilon, one line per method: rows with "method", "epsilon" and "accuracy" with its interval."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    where = _epsilon_axis(axes, sorted({row["epsilon"] for row in rows}))
    for name, colour in zip(dict.fromkeys(row["method"] for row in rows), PALETTE, strict=False):
        _curve(axes, where, [row for row in rows if row["method"] == name], "accuracy", color=colour, label=name)
    axes.set_ylabel(NAMES["accuracy"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
