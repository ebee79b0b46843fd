"""How well a model serves each group of patients: scores by subgroup, the worst group and the gap, with intervals.

The score of a small group is uncertain. So patients are resampled with replacement, because others might have come, and
so are runs, because training draws new noise. The largest gap among several groups is above zero by chance alone;
``gap`` therefore also gives its size when patients are dealt to groups of the same sizes at random.
"""

import itertools

import numpy as np

from dopamine_lib.data.dataset import Dataset
from dopamine_lib.errors import InputError, check_within
from dopamine_lib.federation.metrics import LEAST, attribute_groups

#: The scores that are one number per group; "recall_per_grade" has one for each grade.
METRICS = ("accuracy", "quadratic_kappa", "auroc", "ece")
SCORES = (*METRICS, "recall_per_grade")
#: Equal bins of confidence for the calibration error.
BINS = 10
#: What would be worth knowing of patients, for gaps between them.
WANTED = ("sex", "ethnicity", "place")
QUARTERS = ("blurred", "rather blurred", "rather sharp", "sharp")


def scores(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None, only: tuple[str, ...] = SCORES
) -> dict[str, np.ndarray]:
    """Scores of R runs on N weighted patients, for B sets of weights at once.

    labels (N,), probabilities (R, N, classes), weights (B, N), by default all ones with B = 1. Returns those of
    ``SCORES`` that are named in ``only``, (B, R) each: accuracy; quadratic_kappa (Cohen 1968), NaN if only one grade
    is present; auroc, the mean over grades of one against the rest; ece, the expected calibration error of the
    predicted grade in ``BINS`` equal bins (Guo et al. 2017), which is too large in small groups; and recall_per_grade
    (B, R, classes). Raises InputError if the shapes do not fit.

    >>> sure = np.array([[[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.6, 0.4]]])  # one run, four patients
    >>> scores(np.array([0, 1, 1, 0]), sure, only=("accuracy",))["accuracy"]
    array([[0.75]])
    """
    _, patients, classes = probabilities.shape
    if len(labels) != patients or patients == 0:
        raise InputError(f"{len(labels)} labels for {patients} patients' probabilities: give one for each, at least 1")
    weights = np.ones((1, patients)) if weights is None else np.asarray(weights, dtype=float)
    predicted, confidence = probabilities.argmax(2), probabilities.max(2)
    correct, grade = (predicted == labels).astype(float), np.eye(classes)[labels]

    def mean(values):  # (R, N) or (N,) -> (B, R) or (B, 1)
        return weights @ np.atleast_2d(values).T / weights.sum(1)[:, None]

    def kappa():
        # |i - j|^2 on average over patients, against its average over all pairs of a label and a prediction
        by_chance = mean(labels**2) + mean(predicted**2) - 2 * mean(labels) * mean(predicted)
        mixed = ((weights @ grade > 0).sum(1) > 1)[:, None]
        return np.where(mixed, 1 - mean((labels - predicted) ** 2) / by_chance, np.nan)

    def calibration_error():
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        return sum(np.abs(mean((confidence - correct) * (bins == b))) for b in range(BINS))

    def recall():
        hits = np.stack([weights @ (grade * right[:, None]) for right in correct], axis=1)
        return hits / (weights @ grade)[:, None]

    how = {
        "accuracy": lambda: mean(correct),
        "quadratic_kappa": kappa,
        "auroc": lambda: _auroc(labels, probabilities, weights),
        "ece": calibration_error,
        "recall_per_grade": recall,
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: how[name]() for name in only}


def _auroc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the grades present of the area under the curve of that grade against the rest: (B, R)."""
    areas = np.full((*probabilities.shape[::2], len(weights)), np.nan)
    for r, c in np.ndindex(areas.shape[:2]):
        score = probabilities[r, :, c]
        order = score.argsort()
        rest = np.cumsum(weights[:, order] * (labels[order] != c), axis=1)
        rest = np.concatenate([np.zeros((len(weights), 1)), rest], axis=1)
        own = np.flatnonzero(labels == c)
        # the weight of the rest below each patient of the grade; a tie counts one half
        lower, upper = (np.searchsorted(score[order], score[own], side) for side in ("left", "right"))
        below = (rest[:, lower] + rest[:, upper]) / 2
        areas[r, c] = (weights[:, own] * below).sum(1) / (weights[:, own].sum(1) * rest[:, -1])
    present = np.isfinite(areas)
    found = np.where(present, areas, 0).sum(1), present.sum(1)
    return np.divide(*found, out=np.full(found[0].shape, np.nan), where=found[1] > 0).T


def subgroups(dataset: Dataset, index: np.ndarray, *, least: int = LEAST) -> dict[str, dict[str, np.ndarray]]:
    """Groups of the images at ``index``, as masks (len(index),): by attributes, pairs of them, grade, sharpness.

    A table's rows have no sharpness.

    Groups below ``least`` images are left out, and so are divisions with fewer than two groups. Raises InputError for
    a ``least`` below 2.
    """
    check_within("least number of patients", least, 2, 10**9, "a group of one is a person", low_open=False)
    labels = dataset.labels[index]
    divisions = attribute_groups(dataset, index, least=1)
    for one, other in itertools.combinations(list(divisions), 2):
        divisions[f"{one} x {other}"] = {
            f"{a}, {b}": mask & divisions[other][b] for a, mask in divisions[one].items() for b in divisions[other]
        }
    divisions["grade"] = {name: labels == g for g, name in enumerate(dataset.grades)}
    if not dataset.inputs:
        sharp = sharpness(dataset.images, index)
        quarter = np.searchsorted(np.quantile(sharp, [0.25, 0.5, 0.75]), sharp)
        divisions["sharpness"] = {name: quarter == q for q, name in enumerate(QUARTERS)}
    kept = {
        by: {name: mask for name, mask in groups.items() if mask.sum() >= least} for by, groups in divisions.items()
    }
    return {by: groups for by, groups in kept.items() if len(groups) > 1}


def sharpness(images: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Mean step between neighbouring pixels of each image (len(index),): a stand-in for quality if no camera is known.

    Disease and patients' age change it too, so a gap between quarters does not prove that the camera caused it.
    """
    grey = np.array([images[i].mean(axis=2, dtype=np.float32) for i in index])
    return np.abs(np.diff(grey, axis=1)).mean((1, 2)) + np.abs(np.diff(grey, axis=2)).mean((1, 2))


def cannot_say(dataset: Dataset) -> str:
    """Which subgroups a data set cannot support, in one sentence."""
    if dataset.attributes:
        place = {"place"} if "site" in dataset.attributes else set()
        unknown = [what for what in WANTED if what not in dataset.attributes.keys() | place]
        return (
            f"{dataset.name}: {', '.join(dataset.attributes)} are recorded; {', '.join(unknown)} and other illnesses "
            "are not, so nothing is known of gaps between them."
        )
    return (
        f"{dataset.name}: nothing is recorded of a patient but the {'row' if dataset.inputs else 'image'} and its "
        "label; age, sex, ethnicity, camera and the like are unknown: gaps between those cannot be seen, and no other "
        "stands for them."
    )


def draws(person: np.ndarray, runs: int, bootstraps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of images (B, N) and of runs (B, R), each drawn with replacement; images of a person stay together.

    person (N,);  bootstraps  B;  Raises InputError for fewer than 20.
    """
    check_within("number of bootstraps", bootstraps, 20, 10**5, "200 give a 95 % interval", low_open=False)
    rng = np.random.default_rng(seed)
    people, number = np.unique(person, return_inverse=True)
    drawn = rng.multinomial(len(people), np.full(len(people), 1 / len(people)), size=bootstraps)
    return drawn[:, number].astype(float), rng.multinomial(runs, np.full(runs, 1 / runs), size=bootstraps) / runs


def interval(point: float, drawn: np.ndarray) -> dict[str, float] | None:
    """The estimate with the 95 % percentile interval of its draws (B,); None if the score is undefined."""
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(point) or not len(drawn):
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(point), "low": float(low), "high": float(high)}


def with_exact_end(share: dict[str, float], people: int) -> dict[str, float]:
    """An ``interval`` of an accuracy that is 1 or 0 in every run, which no draw varies: its other end is the exact one.

    That is 0.025^(1/people) from the end that all draws have (Clopper and Pearson 1934). Others are returned as they
    are.

    >>> with_exact_end({"mean": 1.0, "low": 1.0, "high": 1.0}, 26)["low"].__round__(3)
    0.868
    """
    end = 0.025 ** (1 / people)
    if share["mean"] == 1:
        return share | {"low": min(share["low"], end)}
    return share | {"high": max(share["high"], 1 - end)} if share["mean"] == 0 else share


def subgroup_table(
    dataset: Dataset,
    index: np.ndarray,
    probabilities: np.ndarray,
    *,
    least: int = LEAST,
    bootstraps: int = 200,
    seed: int = 0,
) -> list[dict]:
    """Every group's scores: the mean over runs and a 95 % interval over patients and runs.

    index (N,) test images, probabilities (R, N, classes) of R runs' models on them. Each row has "by" (the
    division: "all", "camera", "age_band x eye", "grade" …), "group", "patients" (images), each of ``METRICS`` as a dict
    of mean, low and high, or None if it is undefined (kappa of one grade), and "recall_per_grade", a list of means,
    None for a grade that the group lacks. With five runs or fewer the runs' part of an interval is too narrow.
    """
    labels = dataset.labels[index]
    patients, runs = draws(dataset.person[index], len(probabilities), bootstraps, seed)
    everybody = {"all": {"everybody": np.ones(len(index), dtype=bool)}}
    rows = []
    for by, groups in (everybody | subgroups(dataset, index, least=least)).items():
        for name, mask in groups.items():
            own = labels[mask], probabilities[:, mask]
            point, drawn = scores(*own), scores(*own, patients[:, mask], METRICS)
            row = {"by": by, "group": name, "patients": int(mask.sum())}
            for metric in METRICS:
                row[metric] = interval(point[metric].mean(), (drawn[metric] * runs).sum(1))
            row["accuracy"] = with_exact_end(row["accuracy"], len(np.unique(dataset.person[index][mask])))
            recall = point["recall_per_grade"][0].mean(0)
            row["recall_per_grade"] = [None if np.isnan(value) else float(value) for value in recall]
            rows.append(row)
    return rows


def gap(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: dict[str, np.ndarray],
    *,
    metric: str = "accuracy",
    person: np.ndarray | None = None,
    bootstraps: int = 200,
    seed: int = 0,
) -> dict:
    """The worst group and the distance between the best and the worst, by one of ``METRICS``.

    labels (N,), probabilities (R, N, classes), groups as masks (N,). Returns "worst" and "best" (names), "worst_score"
    and "gap" (mean, low, high over patients and runs; every draw has its own worst group), "by_chance", the 95 %
    quantile of the gap with group names shuffled among patients, and "p_value", which is below 0.05 in at most 5 % of
    all cases if groups do not matter. Raises InputError for fewer than two groups, an unknown metric, or one that is
    undefined in a group.

    >>> labels, all_sound = np.repeat([0, 1], 20), np.tile([0.9, 0.1], (1, 40, 1))  # one run calls everybody sound
    >>> found = gap(labels, all_sound, {"sound": labels == 0, "ill": labels == 1}, bootstraps=20)
    >>> found["worst"], found["gap"]["mean"]
    ('ill', 1.0)
    """
    if metric not in METRICS:
        raise InputError(f"metric '{metric}' is unknown; choose one of {', '.join(METRICS)}")
    if len(groups) < 2:
        raise InputError(f"{len(groups)} group has no gap: give at least two")
    person = np.arange(len(labels)) if person is None else person
    patients, runs = draws(person, len(probabilities), bootstraps, seed)
    masks = np.array(list(groups.values()))
    sign = -1.0 if metric == "ece" else 1.0  # an error: the largest is the worst

    def by_group(masks, weights=None):
        parts = []
        for mask in masks:
            own = None if weights is None else weights[:, mask]
            parts.append(scores(labels[mask], probabilities[:, mask], own, (metric,))[metric])
        return np.stack(parts, axis=-1)  # (B, R, groups)

    point = by_group(masks)[0].mean(0)
    if np.isnan(point).any():
        raise InputError(f"{metric} is undefined in a group with one grade only: use accuracy")
    drawn = (by_group(masks, patients) * runs[..., None]).sum(1)
    rng, shuffled = np.random.default_rng([seed, 1]), np.empty(bootstraps)
    for b in range(bootstraps):
        shuffled[b] = np.ptp(by_group(masks[:, rng.permutation(len(labels))])[0].mean(0))
    worst, best = (sign * point).argmin(), (sign * point).argmax()
    names, worst_score = list(groups), interval(point[worst], sign * (sign * drawn).min(1))
    if metric == "accuracy":
        worst_score = with_exact_end(worst_score, len(np.unique(person[masks[worst]])))
    return {
        "worst": names[worst],
        "best": names[best],
        "worst_score": worst_score,
        "gap": interval(np.ptp(point), np.ptp(drawn, axis=1)),
        "by_chance": float(np.nanquantile(shuffled, 0.95)),
        "p_value": float((1 + (shuffled >= np.ptp(point) - 1e-12).sum()) / (1 + bootstraps)),
    }
