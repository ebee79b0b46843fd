"""Data: every source of patients behind one interface, loaded by name.

Entering this room loads NumPy only; a source brings its own libraries when it is asked for.
"""

from pathlib import Path

from dopamine_lib.data.dataset import NO_NUMBERS, ONE_IMAGE, Dataset
from dopamine_lib.data.folder import PIXELS
from dopamine_lib.data.own import is_own, load_own
from dopamine_lib.data.table import PERSONS, load_table
from dopamine_lib.errors import InputError
from dopamine_lib.files import MARKERS

SOURCES = ("synthetic", "retinamnist", "aptos", "mnist", "fashion-mnist", "cifar10", "heart")
#: The sources that are tables; all others are images.
TABLES = ("heart",)
#: Who is one patient in each source: what a bound per patient rests on.
PATIENTS = {name: NO_NUMBERS for name in SOURCES} | {
    "synthetic": ONE_IMAGE,
    "aptos": PIXELS,
    "heart": PERSONS,
}
#: The UCI heart-disease patients, who come with the kit; their data sheet lies beside.
HEART = Path(__file__).parent / "heart_disease" / "heart.csv"
#: Side of an image in pixels; SqueezeNet's pooling leaves no pixel of a smaller one.
MIN_SIZE, MAX_SIZE = 16, 1024


def load(name: str, data_dir: str | Path | None = None, *, size: int | None = None, seed: int = 0) -> Dataset:
    """Load the source called ``name``, with images of ``size`` by ``size`` pixels.

    name      one of ``SOURCES``, or data of one's own: a folder, a file, or ``module:function`` (``own``)
    data_dir  the folder of its files, by default ``data/NAME`` or ``data`` in the working directory; of "heart" the
              package's own
    size      by default the source's own (synthetic: 64)
    seed      decides the split, and for "synthetic" the images too
    Raises InputError for an unknown name, a size out of bounds, and bad data.
    """
    check_name(name)
    if size is not None and not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"size {size} is out of bounds; choose {MIN_SIZE} to {MAX_SIZE} pixels")
    if name == "synthetic":
        from dopamine_lib.data.synthetic import load_synthetic

        return load_synthetic(size=size or 64, seed=seed)
    if name not in SOURCES:
        return load_own(name, data_dir, size=size, seed=seed)
    if name == "heart":
        return load_table(HEART if data_dir is None else Path(data_dir) / HEART.name, name=name, seed=seed)
    data_dir = _find(name) if data_dir is None else Path(data_dir)
    chosen = {} if size is None else {"size": size}
    if name == "retinamnist":
        from dopamine_lib.data.retinamnist import load_retinamnist

        return load_retinamnist(data_dir, **chosen, seed=seed)
    if name == "aptos":
        from dopamine_lib.data.aptos import load_aptos

        return load_aptos(data_dir, **chosen, seed=seed)
    from dopamine_lib.data.benchmarks import load_benchmark

    return load_benchmark(name, data_dir, **chosen, seed=seed)


def check_name(name: str) -> None:
    """Raise InputError for what is neither one of ``SOURCES`` nor the name of data of one's own."""
    if name not in SOURCES and not is_own(name):
        raise InputError(
            f"data {name!r} is unknown; choose one of {', '.join(SOURCES)}, or give a folder, a .csv or .npz file, or "
            "module:function"
        )


def is_table(name: str) -> bool:
    """Whether the data are a table by their name, as far as that tells."""
    return name in TABLES or name.lower().endswith(".csv")


def _find(name: str) -> Path:
    """The folder in the working directory that has this source's files."""
    places = (Path("data") / name, Path("data"))
    for place in places:
        if any((place / marker).exists() for marker in MARKERS[name]):
            return place
    raise InputError(
        f"no {name} data: looked for {' or '.join(MARKERS[name])} in {places[0]} and {places[1]}; "
        f"run: python data_download.py {name}, or name its folder with --data-dir"
    )
