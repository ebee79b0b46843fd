"""The embedded data set: synthetic patients of a diabetic-retinopathy screening, made from a seed.

Two populations: "private", the patients of the hospitals (cameras A to D), and "public", for pre-training
(cameras P to S); no seed of one gives a patient of the other. Grade, age, camera and eye of each patient are decided
here, independently of each other; ``fundus`` and ``photograph`` make the pictures. No real patient and no real image
is involved, so a model's score here says nothing of its worth in a clinic.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dopamine_lib.data.cache import cache_dir, read_array, write_array
from dopamine_lib.data.dataset import (
    APTOS_IMAGES,
    APTOS_TEST,
    GRADE_PROPORTIONS,
    GRADES,
    ONE_IMAGE,
    Dataset,
    Datasheet,
    content_checksum,
    split_by_person,
)
from dopamine_lib.data.photograph import PRIVATE_CAMERAS, PUBLIC_CAMERAS, photograph
from dopamine_lib.errors import InputError

#: Part of the name under which the pictures are cached; to be raised with any change of them.
VERSION = 3

AGE_BANDS, AGE_PROPORTIONS = ("<40", "40-60", ">60"), (0.18, 0.47, 0.35)
EYES, EYE_PROPORTIONS = ("left", "right"), (0.46, 0.54)

#: P(severity drawn | grade recorded): human graders disagree, almost always by one grade.
GRADER = np.array(
    [
        [0.97, 0.03, 0.00, 0.00, 0.00],
        [0.12, 0.76, 0.12, 0.00, 0.00],
        [0.00, 0.05, 0.90, 0.05, 0.00],
        [0.00, 0.00, 0.15, 0.70, 0.15],
        [0.00, 0.00, 0.00, 0.12, 0.88],
    ]
)

#: Cameras and seed domain of each population; the domain is a spawn key, so that no two patients share a stream.
POPULATIONS = {"private": (PRIVATE_CAMERAS, 1), "public": (PUBLIC_CAMERAS, 2)}

MIN_SIZE, MAX_SIZE, MAX_PATIENTS = 28, 224, 1_000_000
#: Pixels drawn at once by one thread, as many as fit a processor's cache.
CHUNK = 32 * 64**2


def make_population(
    n: int = APTOS_IMAGES, size: int = 64, seed: int = 0, population: str = "private", *, threads: int = 2
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Make ``n`` synthetic patients with one image each.

    n           patients, 1 to 1,000,000
    size        pixels per side, 28 to 224
    seed        non-negative integer; with n, size and population it determines every byte
    population  "private" or "public"
    threads     change nothing but the speed
    Returns images uint8 (n, size, size, 3), labels int64 (n,) and attributes as in ``Dataset``.

    >>> images, labels, attributes = make_population(3, size=28)
    >>> images.shape, labels.shape, sorted(attributes)
    ((3, 28, 28, 3), (3,), ['age_band', 'camera', 'eye'])

    Raises InputError for a value out of range.
    """
    _check(n, size, seed, population)
    images, drawn = np.empty((n, size, size, 3), dtype=np.uint8), 0
    for block in _draw(n, size, seed, population, threads):
        images[drawn : drawn + len(block)] = block
        drawn += len(block)
    labels, _, attributes = describe(n, seed, population)
    return images, labels, attributes


def load_synthetic(*, n: int = APTOS_IMAGES, size: int = 64, seed: int = 0) -> Dataset:
    """The private population as a data set, drawn at first use and memory-mapped from the cache afterwards.

    Arguments and errors as for ``make_population``; also raises InputError for patients too
    few to split.
    """
    _check(n, size, seed, "private")
    labels, _, attributes = describe(n, seed, "private")
    person, fraction = np.arange(n), APTOS_TEST / APTOS_IMAGES
    train, validation, test = split_by_person(person, test_fraction=fraction, seed=seed)
    images = _cached_images(n, size, seed)
    notes = (
        "No real patient: drawn from random numbers, to teach methods; scores here say nothing of a clinic.",
        f"Grades in the proportions of APTOS 2019: {', '.join(f'{100 * p:.2f} %' for p in GRADE_PROPORTIONS)}.",
        f"As graders disagree, about {100 * (1 - np.array(GRADE_PROPORTIONS) @ np.diag(GRADER)):.0f} % of the patients "
        "are drawn with the lesions of a neighbouring grade; no model can be right about all of these.",
        "Age band, camera and eye side change the image and are independent of the grade.",
    )
    sheet = Datasheet(
        source=f"made by this kit, generator version {VERSION}, seed {seed}, {n} patients, {size}x{size} pixels",
        licence="CC0-1.0",
        checksum=content_checksum(images, labels, test),
        notes=notes,
        patients=n - round(n * fraction),
        proportions={
            "grade": dict(zip(GRADES, GRADE_PROPORTIONS, strict=True)),
            "camera": {camera.name: camera.share for camera in PRIVATE_CAMERAS},
        },
        persons=ONE_IMAGE,
    )
    return Dataset("synthetic", images, labels, GRADES, person, train, validation, test, sheet, attributes)


def describe(n: int, seed: int, population: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The patients, before any picture is drawn.

    Returns labels int64 (n,), in the exact proportions; the severity to draw int64 (n,), which differs where the
    grader erred; and the attributes, str (n,) each, drawn independently of both.
    """
    cameras, domain = POPULATIONS[population]
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(domain, 0)))
    labels = rng.permutation(np.repeat(np.arange(len(GRADES)), grade_counts(n)))
    severity = (rng.random(n)[:, None] > np.cumsum(GRADER, axis=1)[labels, :-1]).sum(axis=1)
    attributes = {
        "age_band": rng.choice(AGE_BANDS, n, p=AGE_PROPORTIONS),
        "camera": rng.choice([c.name for c in cameras], n, p=[c.share for c in cameras]),
        "eye": rng.choice(EYES, n, p=EYE_PROPORTIONS),
    }
    return labels, severity, attributes


def grade_counts(n: int) -> np.ndarray:
    """The number of patients with each grade among ``n``: APTOS's proportions, rounded by largest remainder.

    >>> grade_counts(3662).tolist()
    [1805, 367, 1005, 191, 294]
    """
    shares = n * np.array(GRADE_PROPORTIONS) / sum(GRADE_PROPORTIONS)
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: n - counts.sum()]] += 1
    return counts


def _draw(n: int, size: int, seed: int, population: str, threads: int = 2) -> Iterator[np.ndarray]:
    """The population's photographs in order, in blocks uint8 (patients, size, size, 3)."""
    cameras, domain = POPULATIONS[population]
    _, severity, attributes = describe(n, seed, population)
    camera = np.searchsorted([c.name for c in cameras], attributes["camera"])
    age = np.array([AGE_BANDS.index(band) for band in attributes["age_band"]])
    left = attributes["eye"] == "left"
    chunk = max(1, CHUNK // size**2)

    def draw(start: int) -> np.ndarray:
        part = slice(start, min(start + chunk, n))
        seeds = (np.random.SeedSequence(seed, spawn_key=(domain, 1, i)) for i in range(part.start, part.stop))
        generators = [np.random.Generator(np.random.SFC64(s)) for s in seeds]
        return photograph(generators, severity[part], age[part], left[part], cameras, camera[part], size)

    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(draw, range(0, n, chunk))
    finally:
        pool.shutdown(cancel_futures=True)


def _cached_images(n: int, size: int, seed: int) -> np.ndarray:
    """The private population's images, memory-mapped read-only from the cache; drawn if they are not there."""
    path = cache_dir() / f"synthetic-v{VERSION}-private-n{n}-size{size}-seed{seed}.npy"
    shape = (n, size, size, 3)
    images = read_array(path, shape, "|u1")
    if images is None:
        return write_array(path, shape, "|u1", map(np.ascontiguousarray, _draw(n, size, seed, "private")))
    return images


def _check(n: int, size: int, seed: int, population: str) -> None:
    for name, value, low, high in (("n", n, 1, MAX_PATIENTS), ("size", size, MIN_SIZE, MAX_SIZE)):
        if not isinstance(value, int | np.integer) or not low <= value <= high:
            raise InputError(f"{name} is {value!r}; synthetic images need a whole number from {low:,} to {high:,}")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; it must be a whole number of at least 0")
    if population not in POPULATIONS:
        raise InputError(f"population is {population!r}; choose one of {', '.join(POPULATIONS)}")
