"""The kit's pictures. Each is drawn from data handed in, and returned as a matplotlib Figure."""

import csv
from importlib.resources import files

import numpy as np
from matplotlib.figure import Figure

#: Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = {"C": "#000000", "CDP": "#0072B2", "F": "#999999", "FPDP": "#D55E00", "FSCDP": "#009E73"}


def paper_figure1() -> dict[str, np.ndarray]:
    """Figure 1's upper panel, read off the paper's picture: ``epoch`` and, per setting, accuracy in % (99,)."""
    with files("dopamine_lib").joinpath("assets/figure1_accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def figure1(results: dict, *, paper: bool = True) -> Figure:
    """Accuracy with its spread over runs (above) and epsilon (below) against epochs, from ``results.json``.

    paper  draw the paper's own curves dashed behind
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    published = paper_figure1()
    for name, result in results["settings"].items():
        history, colour = result["history"], COLOURS[name]
        epoch = [record["epoch"] for record in history]
        mean = 100 * np.array([record["accuracy_mean"] for record in history])
        spread = 100 * np.array([record["accuracy_std"] for record in history])
        final = 100 * result["test_accuracy"]["mean"]
        above.plot(epoch, mean, color=colour, label=f"{name}: {final:.1f} %")
        above.fill_between(epoch, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        if paper:
            above.plot(published["epoch"], published[name], color=colour, linestyle="--", linewidth=0.9, alpha=0.6)
        if result["epsilon"] is not None:
            spent = [record["epsilon_rdp_classic"] for record in history]
            total = result["epsilon"]["rdp_classic"]
            below.plot(epoch, spent, color=colour, label=rf"{name}: $\varepsilon$ = {total:.2f}")
    runs = max((len(result["test_accuracy"]["runs"]) for result in results["settings"].values()), default=0)
    above.set_ylabel("test accuracy (%)")
    above.set_title(
        f"{results['data']}, {results['model']}, {runs} run{'s' if runs != 1 else ''}"
        + ("; dashed: the paper's Figure 1 (APTOS-2019, SqueezeNet)" if paper else ""),
        fontsize=10,
    )
    above.legend(loc="lower right")
    below.set_xlabel("epoch")
    below.set_ylabel(rf"$\varepsilon$ at $\delta$ = {results['delta']:g} (classic RDP)")
    if below.lines:
        below.legend(loc="upper left")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def contact_sheet(dataset, *, columns: int = 8) -> Figure:
    """The first training images of each grade, a row a grade."""
    figure = Figure(figsize=(1.3 * columns, 1.4 * len(dataset.grades)), layout="constrained")
    axes = figure.subplots(len(dataset.grades), columns, squeeze=False)
    for grade, row in enumerate(axes):
        members = dataset.train[dataset.labels[dataset.train] == grade][:columns]
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis, index in zip(row, members, strict=False):
            axis.imshow(dataset.images[index])
        row[0].set_ylabel(dataset.grades[grade], fontsize=8)
    return figure


def hospital_split(dataset, hospitals: list[np.ndarray], *, by: str = "grade") -> Figure:
    """Patients of each hospital, stacked by grade or by an attribute such as ``camera``."""
    if by == "grade":
        names, values = list(dataset.grades), np.array(dataset.grades)[dataset.labels]
    else:
        values = dataset.attributes[by]
        names = sorted(set(values.tolist()))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    numbers, bottom = np.arange(1, len(hospitals) + 1), np.zeros(len(hospitals))
    for shade, name in enumerate(names):
        counts = np.array([np.sum(values[own] == name) for own in hospitals])
        axis.bar(numbers, counts, bottom=bottom, label=name, color=f"C{shade}")
        bottom += counts
    axis.set_xticks(numbers)
    axis.set_xlabel("hospital")
    axis.set_ylabel("patients")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
