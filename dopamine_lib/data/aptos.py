"""APTOS 2019, the paper's data set: fundus images in Kaggle's layout, decoded once and memory-mapped."""

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dopamine_lib.data.cache import cache_dir, read_array, write_array
from dopamine_lib.data.dataset import (
    APTOS_IMAGES,
    APTOS_TEST,
    GRADE_PROPORTIONS,
    GRADES,
    Dataset,
    Datasheet,
    content_checksum,
    split_by_person,
)
from dopamine_lib.data.folder import find_images, find_table, read_table
from dopamine_lib.data.images import open_image, prepare

_CACHE_VERSION = 2  # to be raised when the preprocessing changes
#: A folder whose number of images is within this share of APTOS's is taken for APTOS as published.
_ABOUT = 0.1
_GET_IT = "get the data with: python data_download.py aptos"


def load_aptos(data_dir: str | Path, *, size: int = 224, seed: int = 0) -> Dataset:
    """Load ``data_dir/train.csv`` and ``data_dir/train_images/ID.png`` (or .jpg, .jpeg).

    ``data.folder`` says which other names and tables are understood.

    Images are uint8 (N, size, size, 3), preprocessed by ``images.read_image`` and memory-mapped from the
    kit's cache; labels are int64 (N,) in the order of ``train.csv``. Pixel-identical images count as one
    person, whose number is a hash of the pixels in the file. The seeded split approximates the paper's 2931/731:
    ``split_by_person``. A set of about APTOS's size is declared to have the paper's 2931 training patients, which is
    public; for any other no number is published. Raises InputError, naming file and row, for anything missing,
    unreadable or out of range.
    """
    table = find_table(Path(data_dir), _GET_IT)
    content = table.read_bytes()
    ids, labels = read_table(table, content)
    files = find_images(table.parent, ids)
    images, hashes = _decode_or_reuse(files, size, content)
    # 60 bits: positive, and no two meet by chance
    person = (hashes[:, :8].copy().view(">u8").ravel() >> 4).astype(np.int64)
    train, validation, test = split_by_person(person, test_fraction=APTOS_TEST / APTOS_IMAGES, seed=seed)
    published = abs(len(ids) - APTOS_IMAGES) <= _ABOUT * APTOS_IMAGES
    return Dataset(
        name="aptos",
        images=images,
        labels=labels,
        grades=GRADES,
        person=person,
        train=train,
        validation=validation,
        test=test,
        sheet=Datasheet(
            source="APTOS 2019 Blindness Detection (Kaggle, Aravind Eye Hospital)",
            licence="competition data: research use only, never redistribute",
            checksum=content_checksum(images, labels, test),
            notes=(
                f"resized and cropped to {size}x{size} pixels; files of exactly that size are left as they are",
                "pixel-identical images count as one person",
                "no patient numbers are published: two eyes of one patient count as two persons",
            ),
            patients=APTOS_IMAGES - APTOS_TEST if published else None,
            proportions={"grade": dict(zip(GRADES, GRADE_PROPORTIONS, strict=True))},
        ),
    )


def _decode_or_reuse(files: list[Path], size: int, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, size, size, 3), and a hash of each file's own pixels uint8 (N, 32), both mapped and cached."""
    key = hashlib.sha256(f"{_CACHE_VERSION} {size}\n".encode() + content)
    for path in files:
        stat = path.stat()
        key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    pixel_file = cache_dir() / f"aptos-{size}-{key.hexdigest()[:16]}.npy"
    hash_file = pixel_file.with_suffix(".sha256")
    shapes = {pixel_file: (len(files), size, size, 3), hash_file: (len(files), 32)}
    found = [read_array(path, shape, "|u1") for path, shape in shapes.items()]
    if any(array is None for array in found):
        hashes = []
        made = {pixel_file: _decode(files, size, hashes), hash_file: hashes}  # written in this order
        found = [write_array(path, shapes[path], "|u1", blocks) for path, blocks in made.items()]
    return tuple(found)


def _decode(files: list[Path], size: int, hashes: list[bytes]) -> Iterator[bytes]:
    """The pictures in order, by a thread per CPU (Pillow releases Python's lock); ``hashes`` grows with them."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with warnings.catch_warnings():
            # open_image refuses large images with one line of its own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            decoded = pool.map(lambda path: _prepared(path, size), files)
            for image, own in tqdm(decoded, total=len(files), desc="decoding", unit="image", disable=None):
                hashes.append(own)
                yield image
    finally:
        pool.shutdown(cancel_futures=True)


def _prepared(path: Path, size: int) -> tuple[bytes, bytes]:
    """A picture as the model sees it, and a hash of it as it is in the file: the same at every ``size``."""
    image = open_image(path)
    own = hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).digest()
    return prepare(image, size).tobytes(), own


def describe_duplicates(labels: np.ndarray, person: np.ndarray) -> str:
    """How many images of a set, with labels and persons int (N,), are pixel-identical, in one sentence.

    >>> describe_duplicates(np.array([0, 1, 2]), np.array([7, 7, 9]))
    '1 groups of pixel-identical images (2 images, 1 groups with conflicting grades)'
    """
    grades_of = defaultdict(list)
    for number, label in zip(person.tolist(), labels.tolist(), strict=True):
        grades_of[number].append(label)
    groups = [grades for grades in grades_of.values() if len(grades) > 1]
    conflicting = sum(len(set(grades)) > 1 for grades in groups)
    return (
        f"{len(groups)} groups of pixel-identical images ({sum(map(len, groups))} images, {conflicting} "
        "groups with conflicting grades)"
    )
