"""Pictures in a file of arrays, as MedMNIST publishes its data sets."""

from pathlib import Path

import numpy as np

from dopamine_lib.data.dataset import Dataset, Datasheet, content_checksum, own_number, split_or_obey
from dopamine_lib.data.images import MAX_BYTES, resize_all
from dopamine_lib.data.sheet import READ_OFF, read_sheet
from dopamine_lib.errors import InputError


def load_npz(path: str | Path, *, size: int | None = None, seed: int = 0) -> Dataset:
    """A file like those of MedMNIST: arrays ``train_images``, ``train_labels``, and the same of test and, perhaps, val.

    Images are uint8, grey (N, H, W) or colour (N, H, W, 3); labels (N,) or (N, 1), from 0. The split is obeyed, an
    empty val as none, but pixel-identical images are one person's, who is a test patient if any of them is. A data
    sheet beside the file (``eyes.toml`` for ``eyes.npz``) may declare classes and patients. Raises InputError for
    anything else.
    """
    path = Path(path)
    sheet = read_sheet(path.with_suffix(".toml"))
    images, labels, parts = [], [], []
    try:
        with np.load(path, allow_pickle=False) as file:
            for part in ("train", "val", "test"):
                if part == "val" and "val_images" not in file.files:
                    continue
                pictures = file[f"{part}_images"]
                own = _labels(file[f"{part}_labels"], len(pictures), f"{path}: {part}_labels")
                if part == "val" and not len(pictures):
                    continue
                images.append(_pictures(pictures, f"{path}: {part}_images"))
                labels.append(own)
                parts += [(f"{path}: {part}_images, row {row}", part) for row in range(len(images[-1]))]
    except KeyError as error:
        raise InputError(
            f"{path}: {' '.join(map(str, error.args))}; a file like MedMNIST's has train_images, train_labels, "
            "test_images and test_labels"
        ) from None
    except InputError:
        raise
    except Exception as error:  # NumPy raises many types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason}); get the file again") from None
    if len({one.shape[1:] for one in images}) > 1:
        shapes = ", ".join(str(one.shape[1:3]) for one in images)
        raise InputError(f"{path}: images of {shapes} pixels in its parts; make them alike")
    images, labels = np.concatenate(images), np.concatenate(labels)
    person = np.array([_own_pixels(image) for image in images])
    train, validation, test = split_or_obey(person, parts, test_fraction=0.2, seed=seed, last=True)
    classes = tuple(sheet.get("classes", {})) or tuple(f"class {label}" for label in range(labels.max() + 1))
    if labels.max() >= len(classes):
        raise InputError(f"{path}: a label is {labels.max()}, but the data sheet has {len(classes)} classes; add it")
    if images.shape[1] != images.shape[2]:
        images = resize_all(images, size or min(images.shape[1:3]))
    return Dataset(
        name=str(path),
        images=images if size is None else resize_all(images, size),
        labels=labels,
        grades=classes,
        person=person,
        train=train,
        validation=validation,
        test=test,
        sheet=Datasheet(
            source=sheet.get("source", path.name),
            licence=sheet.get("licence", "none stated"),
            checksum=content_checksum(images, labels, test),
            notes=(*sheet.get("notes", ()), "the file's own split"),
            patients=sheet.get("patients"),
            persons="pixel-identical images are one patient's" + ("" if "classes" in sheet else READ_OFF),
        ),
    )


def _own_pixels(image: np.ndarray) -> int:
    """A person's number from the pixels of an image uint8 (H, W, 3)."""
    return own_number(f"{image.shape} ".encode() + image.tobytes())


def _pictures(array: np.ndarray, where: str) -> np.ndarray:
    """uint8 (N, H, W, 3) from an array of a file."""
    grey, colour = array.ndim == 3, array.ndim == 4 and array.shape[3] in (1, 3)
    if not array.size:
        raise InputError(f"{where} is empty, {array.shape}; put pictures there")
    if array.dtype != np.uint8 or not (grey or colour):
        raise InputError(
            f"{where} is {array.dtype} {array.shape}, but must be uint8 (N, H, W) or (N, H, W, 3): flat pictures only"
        )
    if 3 * array.shape[0] * array.shape[1] * array.shape[2] > MAX_BYTES:
        raise InputError(f"{where} takes more than {MAX_BYTES // 2**30} GiB; take the file with smaller images")
    array = array[..., None] if grey else array
    return np.repeat(array, 3, axis=3) if array.shape[3] == 1 else array


def _labels(array: np.ndarray, images: int, where: str) -> np.ndarray:
    """int64 (N,) from an array of a file."""
    if array.dtype.kind not in "iu" or array.shape not in ((images,), (images, 1)):
        raise InputError(
            f"{where} is {array.dtype} {array.shape}, but must be whole numbers ({images},) or ({images}, 1): one "
            "label an image"
        )
    array = array.reshape(-1).astype(np.int64)
    if ((array < 0) | (array >= 1000)).any():
        row = int(np.argmax((array < 0) | (array >= 1000)))
        raise InputError(f"{where}, row {row} is {array[row]}, but labels count from 0 to 999 at most; renumber them")
    return array
