"""MNIST, Fashion-MNIST and CIFAR-10 by torchvision's own classes: the paper's other benchmark data sets."""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from torchvision import datasets

from dopamine_lib.data.cache import cache_dir, cached
from dopamine_lib.data.dataset import Dataset, Datasheet, content_checksum, split_by_person
from dopamine_lib.data.images import resize_all
from dopamine_lib.errors import InputError

#: torchvision's class, and the licence its authors give.
BENCHMARKS = {
    "mnist": ("MNIST", "CC BY-SA 3.0"),
    "fashion-mnist": ("FashionMNIST", "MIT"),
    "cifar10": ("CIFAR10", "none stated; free for research with citation"),
}
_MAX_UNPACKED = 64 * 2**20  # the largest file is 47 MB


def load_benchmark(name: str, data_dir: str | Path, *, size: int | None = None, seed: int = 0) -> Dataset:
    """Load "mnist", "fashion-mnist" or "cifar10" from ``data_dir``, torchvision's ``root``.

    A folder that has the four ``.gz`` files themselves (Debian's dataset-fashion-mnist) is accepted as well; they
    are unpacked into the kit's cache. Images are uint8 (70000 or 60000, size, size, 3), by default 28 or 32 pixels
    wide, grey repeated in three channels; grades are the names of the classes. The split is the published one,
    with a seeded tenth of the training images as validation. Raises InputError for an unknown name,
    and where files are missing or damaged.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is unknown; choose one of {', '.join(BENCHMARKS)}")
    class_name, licence = BENCHMARKS[name]
    source = getattr(datasets, class_name)
    root = _find_root(name, source, Path(data_dir))
    try:
        parts = [source(root, train=train, download=False) for train in (True, False)]
        # contiguous: CIFAR's arrays come transposed
        images = np.ascontiguousarray(np.concatenate([_three_channels(part.data) for part in parts]))
        labels = np.concatenate([np.asarray(part.targets, dtype=np.int64) for part in parts])
        if len(images) != len(labels) or not 0 <= labels.min() <= labels.max() < len(parts[0].classes):
            raise ValueError("labels do not fit the images")
    except Exception as error:  # torchvision's readers raise many types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{root}: damaged {name} files ({reason}); {_get_again(name)}") from None
    index, train = np.arange(len(images)), len(parts[0].data)
    # the published test part stays; a tenth of the training part becomes validation
    _, _, validation = split_by_person(index[:train], test_fraction=0.1, seed=seed)
    classes = parts[0].classes
    return Dataset(
        name=name,
        images=images if size is None else resize_all(images, size),
        labels=labels,
        grades=tuple(classes),
        person=index,
        train=index[:train],
        validation=validation,
        test=index[train:],
        sheet=Datasheet(
            source=f"torchvision.datasets.{class_name}",
            licence=licence,
            checksum=content_checksum(images, labels, index[train:]),
            notes=("published split", "every image counts as one person"),
            patients=train,
            proportions={"grade": dict.fromkeys(classes, 1 / len(classes))},
        ),
    )


def _three_channels(data: ArrayLike) -> np.ndarray:
    """torchvision's data, grey (N, H, W) or colour (N, H, W, 3), as uint8 (N, H, W, 3)."""
    images = np.asarray(data)
    return images if images.ndim == 4 else np.repeat(images[..., np.newaxis], 3, axis=-1)


def _get_again(name: str) -> str:
    return f"move them away and run: python data_download.py {name}"


def _find_root(name: str, source: type, folder: Path) -> Path:
    """The root for torchvision: ``folder``, or the folder into which its .gz files were unpacked."""
    if name == "cifar10":
        # torchvision checks each file's md5 before it opens it
        listed = [*source.train_list, *source.test_list, [source.meta["filename"]]]
        expected = [folder / source.base_folder / entry[0] for entry in listed]
    else:
        packed = [folder / file_name for file_name, _ in source.resources]
        expected = [folder / source.__name__ / "raw" / path.stem for path in packed]
        if all(path.is_file() for path in packed):
            return _unpack(name, source, packed)
    missing = [str(path) for path in expected if not path.is_file()]
    if missing:
        raise InputError(f"no {name} data: missing {', '.join(missing)}; run: python data_download.py {name}")
    return folder


def _unpack(name: str, source: type, packed: list[Path]) -> Path:
    """Unpack the .gz files into the cache, by content, in the folders that torchvision expects."""
    key = hashlib.sha256(b"".join(path.read_bytes() for path in packed)).hexdigest()[:16]
    root = cache_dir() / f"{name}-{key}"
    for path in packed:
        target = root / source.__name__ / "raw" / path.stem
        if target.exists() and _is_unpacked(path, target):
            continue
        try:
            with gzip.open(path) as file:
                content = file.read(_MAX_UNPACKED + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: damaged ({error}); {_get_again(name)}") from None
        if len(content) > _MAX_UNPACKED:
            raise InputError(f"{path}: unpacks to more than {_MAX_UNPACKED} bytes; {_get_again(name)}")
        with cached(target) as temporary:
            temporary.write_bytes(content)
    return root


def _is_unpacked(path: Path, target: Path) -> bool:
    """Whether ``target`` is what a .gz file unpacks to, by the checksum and size that end that file."""
    content = target.read_bytes()
    return path.read_bytes()[-8:] == struct.pack("<II", zlib.crc32(content), len(content) % 2**32)
