"""Who gains and who loses: two ways to train, scored on the same patients, group by group.

Each of two scores is uncertain, but mostly for one reason: other patients might have come. Drawing the same patients
for both takes that out, so the difference has a narrower interval than either score. A change is a finding only where
its 95 % interval excludes 0; and of twenty that are nothing, one still does.
"""

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.fairness.scores import draws, interval, scores

#: The row that speaks of everybody: the mean of the grades' recalls.
BALANCED = "balanced accuracy"


def gains(
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    groups: dict[str, np.ndarray],
    *,
    person: np.ndarray | None = None,
    bootstraps: int = 400,
    seed: int = 0,
) -> list[dict]:
    """What the runs ``after`` score beyond those ``before``: a row for each group, and one of balanced accuracy.

    labels (N,), probabilities (R, N, classes) and (S, N, classes), groups as masks (N,); the accuracy of a group that
    is a grade is its recall. A row has "group", "patients", "before" (the score), "gain" (mean, low, high: 95 % over
    patients, and over both ways' runs apart) and "finding", whether that interval excludes 0. With five runs or fewer
    the runs' part of an interval is too narrow. Raises InputError for probabilities of other patients.

    >>> sure, unsure = np.tile([0.9, 0.1], (1, 40, 1)), np.tile([0.4, 0.6], (1, 40, 1))  # one run each
    >>> ill = np.repeat([0, 1], [30, 10])
    >>> for row in gains(ill, sure, unsure, {"sound": ill == 0, "ill": ill == 1}, bootstraps=20):
    ...     print(row["group"], row["patients"], row["before"], row["gain"]["mean"], row["finding"])
    sound 30 1.0 -1.0 True
    ill 10 0.0 1.0 True
    balanced accuracy 40 0.5 0.0 False
    """
    if before.shape[1:] != after.shape[1:]:
        raise InputError(f"{before.shape[1]} and {after.shape[1]} patients were scored: give the same for both")
    person, rows = np.arange(len(labels)) if person is None else person, []
    patients, first = draws(person, len(before), bootstraps, seed)
    _, second = draws(person, len(after), bootstraps, seed + 1)

    def balanced(own, weights=None):
        with np.errstate(invalid="ignore"):
            return np.nanmean(scores(labels, own, weights, ("recall_per_grade",))["recall_per_grade"], axis=2)

    def accuracy(mask):
        def of(own, weights=None):
            weights = None if weights is None else weights[:, mask]
            return scores(labels[mask], own[:, mask], weights, ("accuracy",))["accuracy"]

        return of

    measured = {name: (accuracy(mask), int(mask.sum())) for name, mask in groups.items()}
    for name, (score, count) in (measured | {BALANCED: (balanced, len(labels))}).items():
        was, now = score(before)[0].mean(), score(after)[0].mean()
        drawn = (score(after, patients) * second).sum(1) - (score(before, patients) * first).sum(1)
        gain = interval(now - was, drawn)
        finding = gain is not None and not gain["low"] <= 0 <= gain["high"]
        rows.append({"group": name, "patients": count, "before": float(was), "gain": gain, "finding": finding})
    return rows
