"""APTOS 2019, the paper's data set: fundus images in Kaggle's layout, decoded once and memory-mapped."""

import hashlib
import json
import os
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dopamine_lib.data.cache import cache_dir, cached
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
    person = np.array([int(pixels[:15], 16) for pixels in hashes])  # 60 bits: positive, and no two meet by chance
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


def _decode_or_reuse(files: list[Path], size: int, content: bytes) -> tuple[np.ndarray, list[str]]:
    """Pixels, memory-mapped uint8 (N, size, size, 3), and a hash of each file's own pixels, cached."""
    key = hashlib.sha256(f"{_CACHE_VERSION} {size}\n".encode() + content)
    for path in files:
        stat = path.stat()
        key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    pixel_file = cache_dir() / f"aptos-{size}-{key.hexdigest()[:16]}.npy"
    hash_file = pixel_file.with_suffix(".json")
    try:
        return _decoded(pixel_file, hash_file)
    except (OSError, EOFError, ValueError):  # not there yet, or damaged from outside
        _decode(files, size, pixel_file, hash_file)
    return _decoded(pixel_file, hash_file)


def _decoded(pixel_file: Path, hash_file: Path) -> tuple[np.ndarray, list[str]]:
    return np.load(pixel_file, mmap_mode="r"), json.loads(hash_file.read_text(encoding="utf-8"))


def _decode(files: list[Path], size: int, pixel_file: Path, hash_file: Path) -> None:
    """Decode with one thread per CPU (Pillow releases Python's lock), and write in order."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, 3)}
    hashes = []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with warnings.catch_warnings(), cached(pixel_file) as temporary, open(temporary, "wb") as pixels:
            # open_image refuses large images with one line of its own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            np.lib.format.write_array_header_1_0(pixels, header)
            decoded = pool.map(lambda path: _prepared(path, size), files)
            for image, own in tqdm(decoded, total=len(files), desc="decoding", unit="image", disable=None):
                hashes.append(own)
                pixels.write(image)
    finally:
        pool.shutdown(cancel_futures=True)
    with cached(hash_file) as temporary:
        temporary.write_text(json.dumps(hashes), encoding="utf-8")


def _prepared(path: Path, size: int) -> tuple[bytes, str]:
    """A picture as the model sees it, and a hash of it as it is in the file: the same at every ``size``."""
    image = open_image(path)
    own = hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()
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
