"""Data of one's own: a folder of pictures, a file like MedMNIST's, a table, or a function that makes a ``Dataset``."""

from pathlib import Path

import numpy as np

from dopamine_lib.data.csv_file import some
from dopamine_lib.data.dataset import Dataset
from dopamine_lib.data.function import call_function, is_function
from dopamine_lib.data.table import load_table
from dopamine_lib.errors import InputError

#: Side of a picture in a folder, where none is asked for.
SIZE = 224


def is_own(name: str) -> bool:
    """Whether a name is that of data of one's own: a path, a ``.csv`` or ``.npz`` file, or ``module:function``."""
    file = name.lower().endswith((".csv", ".npz"))
    return file or is_function(name) or "/" in name or "\\" in name or bool(name) and Path(name).is_dir()


def load_own(name: str, data_dir: str | Path | None = None, *, size: int | None = None, seed: int = 0) -> Dataset:
    """The data that ``is_own`` names, with images of ``size`` by ``size`` pixels.

    data_dir  where the data are now, or the folder that they are in, if they have moved
    size      by default the data's own; 224 for a folder
    Raises InputError, naming file and row, for whatever cannot be used.
    """
    if is_function(name):
        return _made_by(name, size, seed)
    path = Path(name)
    if data_dir is not None:
        path = inside if (inside := Path(data_dir) / path.name).exists() else Path(data_dir)
    if path.is_dir():
        from dopamine_lib.data.labelled import load_folder  # loads Pillow

        return load_folder(path, size=size or SIZE, seed=seed)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder; give a folder, a .csv or .npz file, or module:function")
    if path.suffix.lower() == ".csv":
        return load_table(path, seed=seed)
    if path.suffix.lower() == ".npz":
        from dopamine_lib.data.arrays import load_npz

        return load_npz(path, size=size, seed=seed)
    raise InputError(f"{path}: a file of this kind is not read; give a folder, a .csv or a .npz file")


def _made_by(name: str, size: int | None, seed: int) -> Dataset:
    """The ``Dataset`` that a function of one's own makes, from ``size`` and ``seed`` as far as it takes them."""
    terms = {"seed": seed} if size is None else {"seed": seed, "size": size}
    return checked(call_function(name, "data", **terms), name)


def checked(dataset: object, name: str) -> Dataset:
    """A ``Dataset`` of somebody's own making. Raises InputError where it is not one as its docstring says."""

    def must(holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"data {name}: {what}; see the docstring of dopamine_lib.data.dataset.Dataset")

    must(isinstance(dataset, Dataset), f"it gives {type(dataset).__name__}, not a Dataset")
    images, labels, sites = dataset.images, dataset.labels, dataset.sheet.sites
    must(isinstance(labels, np.ndarray) and labels.ndim == 1, "labels are not an array (N,)")
    n = len(labels)
    must(isinstance(images, np.ndarray) and images.ndim > 1, "images are not an array")
    if dataset.inputs:
        must(images.dtype == np.float32 and images.shape == (n, len(dataset.inputs)), "rows are not float32 (N, p)")
        must(bool(np.isfinite(images).all()), "a row holds a number that is not finite")
        longest = float(np.linalg.norm(images.astype(float), axis=1).max(initial=0))
        must(longest <= 1 + 1e-6, f"a row has norm {longest:g}, and more than 1 is not clipped as declared")
    else:
        must(
            images.dtype == np.uint8 and images.shape == (n, dataset.size, dataset.size, 3),
            "images are not uint8 (N, side, side, 3)",
        )
    for what in ("labels", "person", "train", "validation", "test"):
        values = getattr(dataset, what)
        must(isinstance(values, np.ndarray) and values.dtype == np.int64, f"{what} is not an int64 array")
        must(values.ndim == 1, f"{what} is {values.shape}, not of one dimension")
        if what in ("train", "validation", "test"):
            must(((values >= 0) & (values < n)).all(), f"an index in {what} lies outside 0 to {n - 1}")
            must(len(np.unique(values)) == len(values), f"{what} has an image twice")
    must(dataset.person.shape == (n,), f"{dataset.person.shape} persons for {n} images")
    must(n > 0 and 0 <= labels.min() <= labels.max() < len(dataset.grades), "a label has no class")
    for what, values in dataset.attributes.items():
        text = isinstance(values, np.ndarray) and values.dtype.kind == "U" and values.shape == (n,)
        must(text, f"attribute {what!r} is not an array of {n} texts")
    if sites:
        must("site" in dataset.attributes, f"its sheet names {len(sites)} sites, but there is no attribute 'site'")
        for site in np.unique(dataset.attributes["site"]).tolist():
            must(site in sites, f"site {site!r} is not one of the sheet's sites, {some(sites)}")
    must(np.isin(dataset.validation, dataset.train).all(), "validation is no part of train")
    must(len(dataset.fit) and len(dataset.validation) and len(dataset.test), "a part is empty")
    for one, other in ((dataset.train, dataset.test), (dataset.fit, dataset.validation)):
        must(not np.isin(dataset.person[one], dataset.person[other]).any(), "a person is in two parts")
    return dataset
