"""RetinaMNIST: 1,600 fundus images with five grades, from MedMNIST v2, which publishes them in four sizes."""

import hashlib
from pathlib import Path

import numpy as np

from dopamine_lib.data.dataset import GRADES, Dataset, Datasheet
from dopamine_lib.data.images import resize_all
from dopamine_lib.errors import InputError

#: The published file: its address, its checksum and a limit on its size, also for ``data_download.py``.
FILE_NAME = "retinamnist.npz"
URL = "https://zenodo.org/records/10519652/files/retinamnist.npz?download=1"
MD5 = "bd4c0672f1bba3e3a89f0e4e876791e4"
MAX_BYTES = 4_000_000
#: All published files: the side of their images in pixels, and their checksum.
FILES = {
    FILE_NAME: (28, MD5),
    "retinamnist_64.npz": (64, "afda852cc34dcda56f86ad2b2457dbcc"),
    "retinamnist_128.npz": (128, "e48e916a24454daf90583d4e6efb1a18"),
    "retinamnist_224.npz": (224, "eae7e3b6f3fcbda4ae613ebdcbe35348"),
}
#: Shares of the five grades among the published file's 1,200 training and validation images.
PROPORTIONS = (0.450, 0.117, 0.195, 0.178, 0.060)


def load_retinamnist(data_dir: str | Path, *, size: int = 28, seed: int = 0) -> Dataset:
    """Load a published file, which is ``data_dir`` or in it, with the published split.

    Of several in a folder it takes the one with the smallest images of at least ``size`` pixels, or else the largest.

    The training images are the published 1,080 for training and 120 for validation, which are ``validation``;
    the test images are the published 400. Images are uint8 (1600, size, size, 3), resized bilinearly. ``seed`` changes
    nothing, because the split is published. Raises InputError where the file is missing or is not a published one.
    """
    path = Path(data_dir)
    if path.is_dir():
        here = [path / name for name in FILES if (path / name).is_file()]
        fitting = [file for file in here if FILES[file.name][0] >= size]
        path = (fitting or here[::-1] or [path / FILE_NAME])[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file; get it with: python data_download.py retinamnist")
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 not in {published for _, published in FILES.values()}:
        raise InputError(
            f"{path}: md5 is {md5}, which no published file has ({FILE_NAME}: {MD5}); move it elsewhere and run: "
            "python data_download.py retinamnist"
        )
    with np.load(path, allow_pickle=False) as published:
        images = np.concatenate([published[f"{part}_images"] for part in ("train", "val", "test")])
        labels = np.concatenate([published[f"{part}_labels"] for part in ("train", "val", "test")])
        train, validation = len(published["train_images"]), len(published["val_images"])
    index = np.arange(len(images))
    return Dataset(
        name="retinamnist",
        images=resize_all(images, size),
        labels=labels.reshape(-1).astype(np.int64),
        grades=GRADES,
        person=index,
        train=index[: train + validation],
        validation=index[train : train + validation],
        test=index[train + validation :],
        sheet=Datasheet(
            source="RetinaMNIST of MedMNIST v2 (Yang et al., 2023), Zenodo record 10519652",
            licence="CC BY 4.0",
            checksum=f"md5:{md5}",
            notes=(
                "published split; training = published training and validation images",
                "no patient numbers are published, so every image counts as one person",
            ),
            patients=train + validation,
            proportions={"grade": dict(zip(GRADES, PROPORTIONS, strict=True))},
        ),
    )
