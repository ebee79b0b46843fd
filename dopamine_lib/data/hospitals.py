"""The division of training patients among hospitals: equal, unequal, or skewed in grades or image quality.

Every image is in exactly one hospital, and all images of one person are in the same one. The sizes are public,
because the federated average weighs by them.
"""

import numpy as np

from dopamine_lib.data.dataset import Dataset
from dopamine_lib.errors import InputError

SPLITS = ("iid", "unequal", "skewed", "quality")
#: Dirichlet concentration of the skewed splits: at 0.5 two or three hospitals get most of a grade (or camera).
CONCENTRATION = 0.5


def split_hospitals(dataset: Dataset, hospitals: int = 10, *, split: str = "iid", seed: int = 0) -> list[np.ndarray]:
    """Sorted indices of the training images of each hospital.

    split  ``iid``      equal shares at random, whose sizes differ by at most one (the paper, section 4)
           ``unequal``  shares at random, whose sizes fall off as 1, 1/2, … 1/K
           ``skewed``   each grade dealt by Dirichlet weights
           ``quality``  each camera dealt by Dirichlet weights, or where no camera is known, each quarter of the
                        images by sharpness

    >>> from dopamine_lib.data.synthetic import load_synthetic
    >>> data = load_synthetic(n=100, size=28)  # 81 of the patients are for training
    >>> for split in ("iid", "unequal"):
    ...     [len(images) for images in split_hospitals(data, 4, split=split)]
    [21, 20, 20, 20]
    [39, 19, 13, 10]

    Raises InputError for an unknown split, and for more hospitals than persons.
    """
    people, first, images_of = np.unique(dataset.person[dataset.train], return_index=True, return_counts=True)
    if split not in SPLITS:
        raise InputError(f"split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
    if not 1 <= hospitals <= len(people):
        raise InputError(f"{hospitals} hospitals for {len(people)} training patients; choose 1 to {len(people)}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    # shuffled, with persons with several images first: the single images then even out the sizes
    order = rng.permutation(len(people))
    order = order[np.argsort(-images_of[order], kind="stable")]
    if split == "iid":
        owner = _fill(images_of[order], np.full(hospitals, len(dataset.train) / hospitals))
    elif split == "unequal":
        shares = 1 / np.arange(1, hospitals + 1)
        owner = _fill(images_of[order], shares / shares.sum() * len(dataset.train))
    else:
        kind = dataset.labels if split == "skewed" else _camera(dataset)
        owner = _dirichlet(kind[dataset.train][first[order]], hospitals, rng)
    owner_of_person = np.empty(len(people), dtype=np.int64)
    owner_of_person[order] = owner
    owner_of_image = owner_of_person[np.searchsorted(people, dataset.person[dataset.train])]
    return [dataset.train[owner_of_image == k] for k in range(hospitals)]


def _fill(images_of: np.ndarray, due: np.ndarray) -> np.ndarray:
    """Deal persons one by one to the hospital that lacks most of its ``due`` number of images."""
    lacking, owner = due.astype(float).copy(), np.empty(len(images_of), dtype=np.int64)
    for i, images in enumerate(images_of):
        owner[i] = np.argmax(lacking)
        lacking[owner[i]] -= images
    if len(np.unique(owner)) < len(due):
        raise InputError(f"{len(images_of)} patients leave one of {len(due)} hospitals empty; take fewer hospitals")
    return owner


def _dirichlet(kind: np.ndarray, hospitals: int, rng: np.random.Generator) -> np.ndarray:
    """Deal the persons of each kind by weights drawn from Dirichlet(CONCENTRATION); no hospital stays empty."""
    owner = np.empty(len(kind), dtype=np.int64)
    for value in np.unique(kind):
        members = np.flatnonzero(kind == value)
        owner[members] = rng.choice(hospitals, size=len(members), p=rng.dirichlet(np.full(hospitals, CONCENTRATION)))
    for empty in np.setdiff1d(np.arange(hospitals), owner):
        owner[np.flatnonzero(owner == np.bincount(owner).argmax())[0]] = empty
    return owner


def _camera(dataset: Dataset) -> np.ndarray:
    """The camera of each image as a number, or where cameras are unknown, its quarter by sharpness."""
    if "camera" in dataset.attributes:
        return np.unique(dataset.attributes["camera"], return_inverse=True)[1]
    grey = np.array([image.mean(axis=2, dtype=np.float32) for image in dataset.images])
    sharpness = np.abs(np.diff(grey, axis=1)).mean((1, 2)) + np.abs(np.diff(grey, axis=2)).mean((1, 2))
    return np.searchsorted(np.quantile(sharpness, [0.25, 0.5, 0.75]), sharpness)
