"""Picture files as arrays: decoded once, by a thread per CPU, and mapped from the kit's cache from then on."""

import hashlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dopamine_lib.data.cache import cache_dir, read_array, write_array
from dopamine_lib.data.images import open_image, prepare
from dopamine_lib.progress import progress_bar

_CACHE_VERSION = 2  # to be raised when the preprocessing changes


def decode_files(files: list[Path], size: int, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, size, size, 3), and a hash of each file's own pixels uint8 (N, 32), both mapped and cached."""
    key = hashlib.sha256(f"{_CACHE_VERSION} {size}\n".encode() + content)
    for path in files:
        stat = path.stat()
        key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    pixel_file = cache_dir() / f"pictures-{size}-{key.hexdigest()[:16]}.npy"
    hash_file = pixel_file.with_suffix(".sha256")
    shapes = {pixel_file: (len(files), size, size, 3), hash_file: (len(files), 32)}
    found = [read_array(path, shape, "|u1") for path, shape in shapes.items()]
    if any(array is None for array in found):
        hashes = []
        made = {pixel_file: _decode(files, size, hashes), hash_file: hashes}  # written in this order
        found = [write_array(path, shapes[path], "|u1", blocks) for path, blocks in made.items()]
    return tuple(found)


def persons_by_pixels(hashes: np.ndarray) -> np.ndarray:
    """A person's number for each file, int64 (N,), from ``decode_files``'s hashes: pixel-identical files share one."""
    # 60 bits: positive, and no two meet by chance
    return (hashes[:, :8].copy().view(">u8").ravel() >> 4).astype(np.int64)


def _decode(files: list[Path], size: int, hashes: list[bytes]) -> Iterator[bytes]:
    """The pictures in order, by a thread per CPU (Pillow releases Python's lock); ``hashes`` grows with them."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with warnings.catch_warnings():
            # open_image refuses large images with one line of its own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            decoded = pool.map(lambda path: _prepared(path, size), files)
            for image, own in progress_bar(decoded, title="decoding", unit="image", total=len(files)):
                hashes.append(own)
                yield image
    finally:
        pool.shutdown(cancel_futures=True)


def _prepared(path: Path, size: int) -> tuple[bytes, bytes]:
    """A picture as the model sees it, and a hash of it as it is in the file: the same at every ``size``."""
    image = open_image(path)
    own = hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).digest()
    return prepare(image, size).tobytes(), own
