"""One interface for every source of images, and the split into training, validation and test patients."""

from dataclasses import dataclass, field, replace

import numpy as np

from dopamine_lib.errors import InputError

#: The five grades of diabetic retinopathy (DR), in order of severity (paper, section 4.1).
GRADES = ("No DR", "Mild DR", "Moderate DR", "Severe DR", "Proliferative DR")

#: The labelled images of APTOS 2019, and the paper's test patients among them (section 4.1).
APTOS_IMAGES, APTOS_TEST = 3662, 731

#: The share of the training patients that validates choices.
VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class Datasheet:
    """What a reader must know of a data set to judge a number obtained with it."""

    source: str
    licence: str
    checksum: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Images with labels, split by patient.

    images       uint8 (N, H, W, 3), possibly memory-mapped
    labels       int64 (N,), index into ``grades``
    person       int64 (N,), shared by the images of one person (pixel-identical files)
    train, test  int64 indices into the images; no person is in both
    validation   a part of ``train``: the server's small set D_G of section 3, which decides hyperparameters
    attributes   str arrays (N,) by name, what else is known of each image: age band, camera, eye, …
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    grades: tuple[str, ...]
    person: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    sheet: Datasheet
    attributes: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        return self.images.shape[1]

    @property
    def fit(self) -> np.ndarray:
        """Training patients without the validation patients, for training while hyperparameters are chosen."""
        return np.setdiff1d(self.train, self.validation)

    def rows(self, keep: np.ndarray) -> "Dataset":
        """A data set of the rows ``keep`` alone, copied, so that nothing of the others stays in memory."""
        parts = {part: np.flatnonzero(np.isin(keep, getattr(self, part))) for part in ("train", "validation", "test")}
        return replace(
            self,
            images=np.array(self.images[keep]),
            labels=self.labels[keep],
            person=self.person[keep],
            attributes={name: values[keep] for name, values in self.attributes.items()},
            **parts,
        )

    def counts(self) -> dict[str, list[int]]:
        """Images per grade in each part, as in ``{"train": [1444, 296, …], "validation": […], "test": […]}``."""
        classes = len(self.grades)
        return {
            part: np.bincount(self.labels[getattr(self, part)], minlength=classes).tolist()
            for part in ("train", "validation", "test")
        }


def split_by_person(
    labels: np.ndarray, person: np.ndarray, *, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split so that no person is in two parts and every grade keeps its proportion.

    labels, person  int (N,). Persons are stratified by the label of their first image, so the parts have their
                    sizes up to the images of one person
    Returns sorted index arrays ``(train, validation, test)``; validation is a tenth of train and within it.

    >>> train, validation, test = split_by_person(np.arange(20) % 2, np.arange(20), test_fraction=0.2, seed=0)
    >>> len(train), len(validation), len(test)
    (16, 1, 4)

    Raises InputError where a part would be empty.
    """
    rng = np.random.default_rng(seed)
    _, first, number_of, images_of = np.unique(person, return_index=True, return_inverse=True, return_counts=True)
    order = rng.permutation(len(first))
    # shuffled, then sorted by grade and dealt out evenly: a stratified draw. People with several images come
    # first in their grade, so that the single images after them make up the exact size
    order = order[np.lexsort((-images_of[order], labels[first[order]]))]

    def deal(people: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        due, dealt, chosen = 0.0, 0, np.zeros(len(people), dtype=bool)
        for i, images in enumerate(images_of[people]):
            due += images * fraction
            if due - dealt >= images - 1e-6:
                chosen[i], dealt = True, dealt + images
        return people[chosen], people[~chosen]

    test_people, train_people = deal(order, test_fraction)
    validation_people, _ = deal(train_people, VALIDATION_FRACTION)
    parts = [np.flatnonzero(np.isin(number_of, people)) for people in (train_people, validation_people, test_people)]
    if min(map(len, parts)) == 0:
        raise InputError(
            f"{len(labels)} images of {len(first)} persons are too few to split into training, validation "
            "and test patients; at least 20 are needed"
        )
    return tuple(parts)
