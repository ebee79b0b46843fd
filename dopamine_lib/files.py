"""Where the kit keeps its files, and how it writes them: whole or not at all."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Weights that ship with the kit: SqueezeNet, pre-trained on public synthetic patients.
EMBEDDED = Path(__file__).parent / "assets" / "squeezenet1_1_synthetic.safetensors"
#: torchvision's ImageNet checkpoint, used only where the user has it already: nothing is downloaded unasked.
IMAGENET_FILE = "squeezenet1_1-b8a52dc0.pth"
#: Files of which a folder with a data source has at least one, by source.
MARKERS = {
    "retinamnist": tuple(f"retinamnist{size}.npz" for size in ("", "_64", "_128", "_224")),
    "aptos": ("train.csv",),
    "mnist": ("MNIST/raw", "train-images-idx3-ubyte.gz"),
    "fashion-mnist": ("FashionMNIST/raw", "train-images-idx3-ubyte.gz"),
    "cifar10": ("cifar-10-batches-py",),
}


def _umask() -> int:
    """Which rights the user keeps from others. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on disk: a new name is lost with the power even if the file was synced."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that keeps no names apart
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and have their names on disk."""
    new = [made for made in (folder, *folder.parents) if not made.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync_folder(made.parent)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error.

    On success file and name are on disk: a ledger that was saved outlives the power, and so do keys. (The package
    atomicwrites did the same, and is no longer maintained.)
    private  only the owner may read the file, whatever rights others have elsewhere
    Raises OSError, in the beginning as far as that is known then, where nothing can be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".dopamine-{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        if not private:  # as mkstemp's file is
            with contextlib.suppress(OSError):  # some drives know no rights, and everybody may read there anyway
                os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text from elsewhere. Raises ValueError for anything else, and for one nested too deep.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: JSON nested too deep
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def write_key(path: str | os.PathLike, data: bytes) -> None:
    """Write a secret into a new file that only its owner can read. Raises FileExistsError rather than replace one."""
    path = Path(path)
    make_folder(path.parent)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as secret:
        secret.write(data)
        secret.flush()
        os.fsync(secret.fileno())
    _sync_folder(path.parent)


def read_key(path: str | os.PathLike) -> bytes:
    """The secret in a file. Raises PermissionError where others than its owner can read it, too."""
    with open(path, "rb") as file:
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
            raise PermissionError(
                errno.EACCES,
                "it can be read by others than its owner; keep a key at mode 600, on a drive that knows such rights",
            )
        return file.read()
