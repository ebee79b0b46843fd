"""One interface for every source of patients, and the split into training, validation and test patients."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dopamine_lib.data.csv_file import shown
from dopamine_lib.errors import InputError

#: The five grades of diabetic retinopathy (DR), in order of severity (paper, section 4.1).
GRADES = ("No DR", "Mild DR", "Moderate DR", "Severe DR", "Proliferative DR")

#: The labelled images of APTOS 2019, and the paper's test patients among them (section 4.1).
APTOS_IMAGES, APTOS_TEST = 3662, 731
#: Proportions of the five grades among them.
GRADE_PROPORTIONS = (0.4930, 0.1003, 0.2743, 0.0522, 0.0802)

#: The share of the training patients that validates choices.
VALIDATION_FRACTION = 0.1
#: Who is one patient where nothing is known of it.
NO_NUMBERS = "no patient numbers are published, so every image counts as one patient's"
ONE_IMAGE = "everybody has one image"
#: What a column "split" may say, by part.
PARTS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class Datasheet:
    """What a reader must know of a data set to judge a number obtained with it. It is released, so it must be public.

    checksum     of what is public, or of the test images alone: nothing in it depends on a training patient
    patients     training patients as the source publishes them; None where it publishes no number
    proportions  published shares of the values of "grade" and of attributes, by name
    persons      who is one patient: what a bound per patient rests on
    sites        the hospitals that the data names, in order; none where it names none
    """

    source: str
    licence: str
    checksum: str
    notes: tuple[str, ...] = ()
    patients: int | None = None
    proportions: dict[str, dict[str, float]] = field(default_factory=dict)
    persons: str = NO_NUMBERS
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Patients' images, or rows of a table, with labels, split by patient.

    images       uint8 (N, H, W, 3), possibly memory-mapped; or float32 (N, p), a table's rows, of norm 1 at most
    labels       int64 (N,), index into ``grades``, the names of the classes
    person       int64 (N,), shared by the images of one person (pixel-identical files). A person's number depends on
                 nobody else: it decides the person's part and hospital
    train, test  int64 indices into the images; no person is in both
    validation   a part of ``train``: the server's small set D_G of section 3, which decides hyperparameters
    attributes   str arrays (N,) by name, what else is known of each image: age band, camera, eye, "site" (hospital), …
    inputs       names of a table's p columns; none of images
    declared     what a table's data sheet declares of its inputs, by name (``table.encoded_rows``); None of others
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
    inputs: tuple[str, ...] = ()
    declared: dict | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width of an image in pixels; of a table the numbers in a row."""
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


def place(person: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """Where each person falls in [0, 1): float64 (N,), uniform, from a keyed hash of its own number alone.

    person   int64 (N,)
    purpose  separates draws that must not depend on each other; ``seed`` is public, so the hash hides nothing
    What is decided by it stays as it is when other patients come or go, as neighbouring data sets must.

    >>> people = np.array([3, 5, 8])
    >>> bool((place(people, "part", 0)[1:] == place(people[1:], "part", 0)).all())
    True
    """
    people, inverse = np.unique(person.astype("<i8"), return_inverse=True)
    prefix = hashlib.blake2b(f"{purpose} {seed} ".encode(), digest_size=8)
    hashes = []
    for number in people:
        own = prefix.copy()
        own.update(number.tobytes())
        hashes.append(own.digest())
    return (np.frombuffer(b"".join(hashes), "<u8") >> np.uint64(11))[inverse] / 2.0**53


def split_by_person(
    person: np.ndarray, *, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split so that a person's part depends on that person alone, and on ``test_fraction`` and the public seed.

    person  int64 (N,); all images of a person go to the same part
    Returns sorted index arrays ``(train, validation, test)``; validation is a tenth of train and within it. Sizes and
    grades keep their proportions on average, with a binomial spread (at the paper's 2931 and 731: 24 images). Exact
    sizes or exact strata are impossible here: the last person dealt would depend on all before.

    >>> train, validation, test = split_by_person(np.arange(3662), test_fraction=APTOS_TEST / APTOS_IMAGES, seed=0)
    >>> len(train), len(validation), len(test)
    (2923, 307, 739)

    Raises InputError where a part would be empty.
    """
    at, validated = place(person, "part", seed), test_fraction + VALIDATION_FRACTION * (1 - test_fraction)
    parts = at >= test_fraction, (at >= test_fraction) & (at < validated), at < test_fraction
    train, validation, test = map(np.flatnonzero, parts)
    if min(len(validation), len(test), len(train) - len(validation)) == 0:
        raise InputError(
            f"{len(person)} images of {len(np.unique(person))} persons are too few to split into training, validation "
            "and test patients; with 100 no part is empty"
        )
    return train, validation, test


def own_number(identity: str | bytes) -> int:
    """A person's number, a hash of what identifies it: 60 bits, so positive, and no two meet by chance.

    >>> own_number("Cleveland 1") == own_number(b"Cleveland 1")
    True
    """
    identity = identity.encode() if isinstance(identity, str) else identity
    return int(hashlib.sha256(identity).hexdigest()[:15], 16)


def split_or_obey(
    person: np.ndarray,
    parts: Sequence[tuple[str, str]] | None,
    *,
    test_fraction: float,
    seed: int,
    last: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``split_by_person``, or the split that the data give: for each image, where that stands and what it says.

    parts  None where the data give none; else for each image the words that name its place in a file, and one of
           ``PARTS``. Without validation patients a tenth of the training patients, drawn by hash, are
    last   whether a person in two parts is in the last of them; else that is refused
    Raises InputError for another part, for a person in two parts, and for a part without anybody.

    >>> said = [("", "test"), ("", "train"), ("", "val"), ("", "train")]
    >>> [part.tolist() for part in split_or_obey(np.arange(4), said, test_fraction=0.2, seed=0)]
    [[1, 2, 3], [2], [0]]
    """
    if parts is None:
        return split_by_person(person, test_fraction=test_fraction, seed=seed)
    named = {word: part for part, words in PARTS.items() for word in words}
    order, of = list(PARTS), {}
    for own, (where, word) in zip(person.tolist(), parts, strict=True):
        part = named.get(word.lower())
        if part is None:
            raise InputError(f"{where} {shown(word)} is no part; write {', '.join(PARTS)}")
        before = of.setdefault(own, part)
        if before != part and not last:
            raise InputError(f"{where} is {part}, but another row of the same person is {before}; put all in one part")
        of[own] = max(before, part, key=order.index)
    found = np.array([of[own] for own in person.tolist()])
    train, validation, test = (np.flatnonzero(found == part) for part in PARTS)
    if not len(validation) and len(train):
        validation = train[place(person[train], "validation", seed) < VALIDATION_FRACTION]
        fit = np.setdiff1d(train, validation)
    else:
        fit, train = train, np.union1d(train, validation)
    for part, own in (("training", fit), ("validation", validation), ("test", test)):
        if not len(own):
            raise InputError(f"{len(person)} rows or images, but none of them for {part}; put some there")
    return train, validation, test


def content_checksum(images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> str:
    """SHA-256 of the images (N, …) and labels (N,) at ``index``, for a data sheet."""
    found = hashlib.sha256(labels[index].astype("<i8"))
    for i in index:
        found.update(np.ascontiguousarray(images[i]))
    return f"sha256:{found.hexdigest()}"
