"""Pictures of a data set: its images by grade, and its patients by hospital."""

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.data.dataset import Dataset
from dopamine_lib.pictures import shades


def contact_sheet(dataset: Dataset, *, columns: int = 8) -> Figure:
    """The first training images of each grade, one row per grade."""
    size = (1.3 * columns, 1.4 * len(dataset.grades))
    figure = Figure(figsize=size, dpi=72, layout="constrained")  # photographs make large files
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


def hospital_split(dataset: Dataset, hospitals: list[np.ndarray]) -> Figure:
    """The patients of each hospital, stacked by grade."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    numbers, bottom = np.arange(1, len(hospitals) + 1), np.zeros(len(hospitals))
    colours = shades(len(dataset.grades))
    for grade, (name, colour) in enumerate(zip(dataset.grades, colours, strict=True)):
        counts = np.array([np.sum(dataset.labels[own] == grade) for own in hospitals])
        axis.bar(numbers, counts, bottom=bottom, label=name, color=colour)
        bottom += counts
    axis.set_xticks(numbers)
    axis.set_xlabel("hospital")
    axis.set_ylabel("patients")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
