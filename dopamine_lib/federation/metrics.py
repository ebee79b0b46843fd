"""Scores of a model on test images, under the field's names for them; quick, for every epoch is scored.

All but the areas under curves follow from the confusion matrix. A score that the test images leave undefined, such as
the recall of a grade that none of them has, is None.
"""

from collections.abc import Sequence

import numpy as np

from dopamine_lib.data.dataset import GRADES, Dataset

#: What a screening programme looks for, by the first of the five grades that counts: referable disease is moderate
#: or worse, sight-threatening disease severe or worse (International Clinical DR scale, Wilkinson et al. 2003).
SCREENING = {"referable": 2, "sight_threatening": 3}
#: The scores that are one number each, in the order in which they are reported.
SCORES = ("accuracy", "balanced_accuracy", "quadratic_kappa", "auroc") + tuple(
    f"{what}_{score}" for what in SCREENING for score in ("sensitivity", "specificity", "auroc")
)
#: The smallest group, in test images, that is reported.
LEAST = 30
#: The most values of an attribute that make groups: more are names, numbers or remarks.
MOST_VALUES = 20


def screening(grades: Sequence[str]) -> dict[str, int]:
    """What is screened for where the classes are called ``grades``: the first that counts as it, by its name.

    ``SCREENING`` for the five grades, of two classes the second, else nothing.

    >>> screening(["healthy", "ill"])
    {'ill': 1}
    """
    if tuple(grades) == GRADES:
        return SCREENING
    return {grades[1]: 1} if len(grades) == 2 else {}


def at_thresholds(
    labels: np.ndarray, probabilities: np.ndarray, grades: Sequence[str], thresholds: Sequence[float]
) -> dict[str, dict[str, float | None]]:
    """Threshold, sensitivity and specificity of each of ``screening``, where a severity above it is called.

    labels, probabilities, grades  as for ``evaluate``;  thresholds  as ``privacy.operating_point`` finds them

    >>> at_thresholds(np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]), ["healthy", "ill"], [0.2])
    {'ill': {'threshold': 0.2, 'sensitivity': 1.0, 'specificity': 0.5}}
    """
    severity, found = probabilities @ np.arange(probabilities.shape[1]), {}
    for (what, first), threshold in zip(screening(grades).items(), thresholds, strict=True):
        ill, called = labels >= first, severity > threshold
        found[what] = {
            "threshold": threshold,
            "sensitivity": _share(int((ill & called).sum()), int(ill.sum())),
            "specificity": _share(int((~ill & ~called).sum()), int((~ill).sum())),
        }
    return found


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of images by true and predicted class, int64 (classes, classes), from two int64 (N,).

    >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 0]), 2)
    array([[1, 0],
           [1, 1]])
    """
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def auroc(positive: np.ndarray, score: np.ndarray) -> float | None:
    """The area under the ROC curve: how often a positive image scores higher than a negative one; a tie counts half.

    positive  bool (N,);  score  float (N,)
    None where one of the two is missing (Hanley and McNeil 1982).

    >>> auroc(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.4, 0.1]))
    0.875
    """
    own, rest = score[positive], np.sort(score[~positive])
    if not len(own) or not len(rest):
        return None
    below = np.searchsorted(rest, own, "left").sum() + np.searchsorted(rest, own, "right").sum()
    return float(below / 2 / len(own) / len(rest))


def evaluate(labels: np.ndarray, probabilities: np.ndarray, grades: Sequence[str]) -> dict:
    """Scores of a model that calls the likeliest grade: floats, and ``recall_per_grade``, a list of them.

    labels  int64 (N,);  probabilities  (N, classes);  grades  the classes' names
    accuracy; balanced_accuracy, the mean of the recalls; quadratic_kappa (Cohen 1968); auroc, the mean over grades of
    one against the rest. For the five grades of diabetic retinopathy also, for each of ``SCREENING``, sensitivity and
    specificity of the call, and auroc of the summed probabilities of the grades that count. A grade that no image has
    is left out of the means.

    >>> found = evaluate(np.array([0, 0, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]]), "ab")
    >>> found["accuracy"], round(found["balanced_accuracy"], 3), found["auroc"]
    (0.75, 0.833, 1.0)
    """
    by_grade, classes = np.ascontiguousarray(probabilities.T), probabilities.shape[1]
    counts = confusion_matrix(labels, probabilities.argmax(1), classes)
    true, called = counts.sum(1), counts.sum(0)
    right, patients = counts.diagonal(), len(labels)
    recall = [_share(hit, of) for hit, of in zip(right.tolist(), true.tolist(), strict=True)]
    apart = (np.arange(classes)[:, None] - np.arange(classes)) ** 2
    seen, by_chance = int((apart * counts).sum()), int(true @ apart @ called)
    found = {
        "accuracy": _share(int(right.sum()), patients),
        "balanced_accuracy": _mean(recall),
        "quadratic_kappa": 1 - seen * patients / by_chance if by_chance else None,
        "auroc": _mean([auroc(labels == c, score) for c, score in enumerate(by_grade)]),
    }
    if tuple(grades) == GRADES:
        for what, first in SCREENING.items():
            found[f"{what}_sensitivity"] = _share(int(counts[first:, first:].sum()), int(true[first:].sum()))
            found[f"{what}_specificity"] = _share(int(counts[:first, :first].sum()), int(true[:first].sum()))
            found[f"{what}_auroc"] = auroc(labels >= first, by_grade[first:].sum(0))
    return found | {"recall_per_grade": recall}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def attribute_groups(dataset: Dataset, index: np.ndarray, least: int = LEAST) -> dict[str, dict[str, np.ndarray]]:
    """Groups of the images at ``index`` by each recorded attribute, as masks (len(index),); none below ``least``.

    An attribute with more than ``MOST_VALUES`` values makes none.
    """
    found = {}
    for name, column in dataset.attributes.items():
        own = column[index]
        values = np.unique(own)
        if len(values) > MOST_VALUES:
            continue
        groups = {str(value): own == value for value in values}
        found[name] = {value: mask for value, mask in groups.items() if mask.sum() >= least}
    return found


def left_out(dataset: Dataset, index: np.ndarray, least: int = LEAST) -> list[str]:
    """What ``attribute_groups`` makes no groups of, and why; of a split attribute, groups of fewer than ``least``.

    index  test images (N,): nothing of a training patient is told
    """
    kept, every = attribute_groups(dataset, index, least), attribute_groups(dataset, index, least=1)
    told = []
    for name in dataset.attributes:
        small = [group for group in every.get(name, {}) if group not in kept[name]]
        if name not in every:
            told.append(f"{name} (more than {MOST_VALUES} values)")
        elif small:
            told.append(
                f"{name}: {', '.join(small)} (fewer than {least} test {'rows' if dataset.inputs else 'images'})"
            )
    return told


def group_accuracy(dataset: Dataset, index: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy in every group of ``attribute_groups``, by names such as "camera: B".

    index      test images (N,);  predicted  their grades int64 (N,)
    """
    right = predicted == dataset.labels[index]
    return {
        f"{by}: {group}": float(right[mask].mean())
        for by, groups in attribute_groups(dataset, index).items()
        if len(groups) > 1
        for group, mask in groups.items()
    }


def worst_group(accuracy: dict[str, dict]) -> str | None:
    """The group whose mean accuracy over runs is lowest, from "group_accuracy" of ``results.json``; None without any.

    >>> worst_group({"camera: A": {"mean": 0.8}, "camera: B": {"mean": 0.7}})
    'camera: B'
    """
    return min(accuracy, key=lambda group: accuracy[group]["mean"], default=None)
