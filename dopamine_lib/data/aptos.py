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
from dopamine_lib.data.dataset import APTOS_IMAGES, APTOS_TEST, GRADES, Dataset, Datasheet, split_by_person
from dopamine_lib.data.folder import find_images, find_table, read_table
from dopamine_lib.data.images import read_image

_CACHE_VERSION = 1  # to be raised when the preprocessing changes
_GET_IT = "get the data with: python data_download.py aptos"


def load_aptos(data_dir: str | Path, *, size: int = 224, seed: int = 0) -> Dataset:
    """Load ``data_dir/train.csv`` and ``data_dir/train_images/ID.png`` (or .jpg, .jpeg).

    ``data.folder`` says which other names and tables are understood.

    Images are uint8 (N, size, size, 3), preprocessed by ``images.read_image`` and memory-mapped from the
    kit's cache; labels are int64 (N,) in the order of ``train.csv``. Pixel-identical images count as one
    person. The seeded split is 2931/731 for the whole set and 80/20 for a part of it. Raises InputError, naming
    file and row, for anything missing, unreadable or out of range.
    """
    table = find_table(Path(data_dir), _GET_IT)
    content = table.read_bytes()
    ids, labels = read_table(table, content)
    files = find_images(table.parent, ids)
    images, hashes = _decode_or_reuse(files, size, content)
    # numbered in order of appearance, so that the split is the same at every image size
    number_of = {pixels: number for number, pixels in enumerate(dict.fromkeys(hashes))}
    person = np.array([number_of[pixels] for pixels in hashes])
    fraction = APTOS_TEST / APTOS_IMAGES if len(ids) == APTOS_IMAGES else 0.2
    train, validation, test = split_by_person(labels, person, test_fraction=fraction, seed=seed)
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
            checksum="sha256:" + hashlib.sha256(content + "".join(hashes).encode()).hexdigest(),
            notes=(
                f"{len(ids)} of {APTOS_IMAGES} labelled images, resized and cropped to {size}x{size} pixels; "
                "files of exactly that size are left as they are",
                _describe_duplicates(labels, person),
                "no patient numbers are published: two eyes of one patient count as two persons",
            ),
        ),
    )


def _decode_or_reuse(files: list[Path], size: int, content: bytes) -> tuple[np.ndarray, list[str]]:
    """Pixels, memory-mapped uint8 (N, size, size, 3), and a hash of each image, from the cache or into it."""
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
            # read_image refuses large images with one line of its own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            np.lib.format.write_array_header_1_0(pixels, header)
            decoded = pool.map(lambda path: read_image(path, size).tobytes(), files)
            for image in tqdm(decoded, total=len(files), desc="decoding", unit="image", disable=None):
                hashes.append(hashlib.sha256(image).hexdigest())
                pixels.write(image)
    finally:
        pool.shutdown(cancel_futures=True)
    with cached(hash_file) as temporary:
        temporary.write_text(json.dumps(hashes), encoding="utf-8")


def _describe_duplicates(labels: np.ndarray, person: np.ndarray) -> str:
    grades_of = defaultdict(list)
    for number, label in zip(person.tolist(), labels.tolist(), strict=True):
        grades_of[number].append(label)
    groups = [grades for grades in grades_of.values() if len(grades) > 1]
    conflicting = sum(len(set(grades)) > 1 for grades in groups)
    return (
        f"{len(groups)} groups of pixel-identical images ({sum(map(len, groups))} images, {conflicting} "
        "groups with conflicting grades): a group counts as one person"
    )
