"""The division of training patients among hospitals: as they are, equal, unequal, or skewed in grades or quality.

All images of one person are in one hospital, which depends on that person and the public seed alone: a patient more or
less moves nobody else. So a hospital's number of patients is as private as its patients. What is public, and what the
training divides and weighs by, is its share of the declared number: ``hospital_shares`` and ``declared_sizes``.
"""

import numpy as np

from dopamine_lib.data.csv_file import some
from dopamine_lib.data.dataset import Dataset, place
from dopamine_lib.errors import InputError

SPLITS = ("iid", "unequal", "skewed", "quality", "site")
#: What a split deals by, as data sheets call it.
DEALT_BY = {"skewed": "grade", "quality": "camera", "site": "site"}
#: Dirichlet concentration of the skewed splits: at 0.5 two or three hospitals get most of a grade (or camera).
CONCENTRATION = 0.5


def split_hospitals(dataset: Dataset, hospitals: int = 10, *, split: str = "iid", seed: int = 0) -> list[np.ndarray]:
    """Sorted indices of the training images of each hospital.

    split  ``iid``      equal shares at random (the paper, section 4)
           ``unequal``  shares at random, which fall off as 1, 1/2, … 1/K
           ``skewed``   each grade dealt by Dirichlet weights
           ``quality``  each camera dealt by Dirichlet weights, or where no camera is known, each half octave of
                        sharpness
           ``site``     the hospitals that the data names, as they are
    The shares hold on average: sizes have a binomial spread, and a small hospital may be empty. It then sends noise
    like any other.

    >>> from dopamine_lib.data.synthetic import load_synthetic
    >>> data = load_synthetic(n=100, size=28)
    >>> for split in ("iid", "unequal"):
    ...     [len(images) for images in split_hospitals(data, 4, split=split)]
    [26, 21, 15, 15]
    [38, 17, 13, 9]

    Raises InputError for an unknown split or one that the data cannot have, and for a wrong number of hospitals.
    """
    weights = _Weights(dataset, hospitals, split, seed)
    kinds, kind_of = np.unique(_kinds(dataset, split), return_inverse=True)
    at = place(dataset.person[dataset.train], f"hospital {split}", seed)
    owner = np.empty(len(at), dtype=np.int64)
    for number, kind in enumerate(kinds):
        edges = np.cumsum(weights.of(str(kind)))[:-1]
        owner[kind_of == number] = np.searchsorted(edges, at[kind_of == number], "right")
    return [dataset.train[owner == k] for k in range(hospitals)]


def hospital_shares(dataset: Dataset, hospitals: int = 10, *, split: str = "iid", seed: int = 0) -> np.ndarray:
    """Each hospital's public share of the patients, float64 (K,): what ``split_hospitals`` gives it on average.

    Grades and cameras have their published proportions; where none are published, hospitals count as equal. Raises
    InputError as ``split_hospitals`` does.

    >>> from dopamine_lib.data.synthetic import load_synthetic
    >>> hospital_shares(load_synthetic(n=100, size=28), 4, split="unequal").round(2).tolist()
    [0.48, 0.24, 0.16, 0.12]
    """
    return _Weights(dataset, hospitals, split, seed).shares()


def declared_sizes(patients: int, shares: np.ndarray) -> tuple[int, ...]:
    """``patients`` divided by public shares (K,), rounded by largest remainder; at least one patient each.

    Raises InputError for more hospitals than patients.

    >>> declared_sizes(2931, np.full(10, 0.1))
    (294, 293, 293, 293, 293, 293, 293, 293, 293, 293)
    """
    _check_hospitals(len(shares), patients)
    due = shares * (patients - len(shares))
    sizes = 1 + np.floor(due).astype(int)
    sizes[np.argsort(np.floor(due) - due, kind="stable")[: patients - sizes.sum()]] += 1
    return tuple(sizes.tolist())


def _check_hospitals(hospitals: int, declared: int) -> None:
    """Declared numbers alone decide: a refusal by true ones would tell how many patients there are."""
    if not 1 <= hospitals <= declared:
        raise InputError(f"{hospitals} hospitals for {declared} declared patients; choose 1 to {max(1, declared)}")


class _Weights:
    """The weights by which patients of a kind (a grade, a camera, …) are dealt to K hospitals; all of it is public."""

    def __init__(self, dataset: Dataset, hospitals: int, split: str, seed: int):
        if split not in SPLITS:
            raise InputError(f"split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
        _check_hospitals(hospitals, dataset.sheet.patients or hospitals)
        if split == "site" and hospitals != len(dataset.sheet.sites):
            raise InputError(
                f"{hospitals} hospitals, but {dataset.name} names {len(dataset.sheet.sites)}; give "
                + (f"--hospitals {len(dataset.sheet.sites)}" if dataset.sheet.sites else "another --split, such as iid")
            )
        if split == "quality" and dataset.inputs and "camera" not in dataset.attributes:
            raise InputError(f"split 'quality' is for pictures, but {dataset.name} is a table; give another --split")
        self.hospitals, self.split, self.seed, self.sites = hospitals, split, seed, dataset.sheet.sites
        self.proportions = dataset.sheet.proportions.get(DEALT_BY.get(split), {})

    def of(self, kind: str) -> np.ndarray:
        """Shares (K,) of the patients of one kind."""
        if self.split == "iid":
            return np.full(self.hospitals, 1 / self.hospitals)
        if self.split == "unequal":
            shares = 1 / np.arange(1, self.hospitals + 1)
            return shares / shares.sum()
        if self.split == "site":
            if kind not in self.sites:  # its patients would go to the last hospital
                raise InputError(f"site {kind!r} is not one of the declared {some(self.sites)}; declare it")
            return np.array([kind == site for site in self.sites], dtype=float)
        # a stream for each kind: whether another occurs changes nothing
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), *kind.encode()])
        return rng.dirichlet(np.full(self.hospitals, CONCENTRATION))

    def shares(self) -> np.ndarray:
        """Shares (K,) of all patients."""
        if self.split in ("iid", "unequal"):
            return self.of("")
        if not self.proportions:
            return np.full(self.hospitals, 1 / self.hospitals)
        return sum(part * self.of(kind) for kind, part in self.proportions.items()) / sum(self.proportions.values())


def _kinds(dataset: Dataset, split: str) -> np.ndarray:
    """What a training image's hospital depends on beside chance, as text (n,), the same for all images of a person."""
    if split == "skewed":
        own = np.array(dataset.grades)[dataset.labels[dataset.train]]
    elif split == "site" or split == "quality" and "camera" in dataset.attributes:
        own = dataset.attributes[DEALT_BY[split]][dataset.train]
    elif split == "quality":
        own = np.array([_half_octave(dataset.images[i]) for i in dataset.train])
    else:
        return np.full(len(dataset.train), "")
    # of a person with several the first in alphabetical order: it depends on no order of the images
    order = np.lexsort((own, dataset.person[dataset.train]))
    _, first, inverse = np.unique(dataset.person[dataset.train][order], return_index=True, return_inverse=True)
    shared = np.empty_like(own)
    shared[order] = own[order][first][inverse]
    return shared


def _half_octave(image: np.ndarray) -> str:
    """A photograph's sharpness, the mean step between neighbouring pixels, by thresholds that no data decide."""
    grey = image.mean(axis=2, dtype=np.float32)
    step = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
    return str(int(np.floor(2 * np.log2(max(step, 1 / 256)))))
