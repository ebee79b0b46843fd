"""The kit's cache, for what is drawn, decoded or computed once: pictures of a data set, features, unpacked archives."""

import contextlib
import io
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.files import atomic_path

_CHOOSE = "set the environment variable DOPAMINE_CACHE to a folder that can be written and has room"
_DAY = 24 * 60 * 60
_CRC = 4  # bytes of the checksum behind an array
_OLDER = "is of a version that wrote no checksum"


def cache_dir() -> Path:
    """The kit's cache: ``$DOPAMINE_CACHE``, else ``dopamine`` under the user's cache directory.

    Raises InputError where there can be no such folder.
    """
    chosen = os.environ.get("DOPAMINE_CACHE")
    try:
        path = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dopamine")
    except RuntimeError:  # as for the unknown users of some clusters
        raise InputError(f"there is no cache, because this user has no home directory; {_CHOOSE}") from None
    with _writing_to(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # decoded images of patients may be in it
    return path


@contextlib.contextmanager
def cached(path: Path) -> Iterator[Path]:
    """``atomic_path`` for a file in the cache: a disk that is full or read-only becomes an InputError."""
    with _writing_to(path.parent):
        for torn in path.parent.glob(".dopamine-*"):  # what a killed process was writing
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - torn.stat().st_mtime > _DAY:
                    torn.unlink()
        with atomic_path(path) as temporary:
            yield temporary


def write_array(path: Path, shape: tuple[int, ...], dtype: str, blocks: Iterable[bytes | np.ndarray]) -> np.ndarray:
    """Write an array into the cache as ``.npy``, with a CRC-32 behind it; returns it, mapped read-only.

    blocks  its bytes in order, in pieces of any length
    """
    crc = 0
    # written, not mapped: on a full disk a write fails, and a page of a map ends the process
    with cached(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(shape, dtype))
        for block in blocks:
            file.write(block)
            crc = zlib.crc32(block, crc)
        file.write(crc.to_bytes(_CRC, "little"))
    return np.memmap(path, dtype, "r", len(_header(shape, dtype)), shape)


def read_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """What ``write_array`` wrote, mapped read-only; None where it is not there, or not to be believed, which is said.

    Believed is a file of this user's, or root's, of exactly this shape and type, whose checksum holds and whose
    numbers are finite.
    """
    try:
        with open(path, "rb") as file:
            wrong = _what_is_wrong(file, _header(shape, dtype), np.dtype(dtype).itemsize * int(np.prod(shape)))
            array = None if wrong else np.memmap(file, dtype, "r", len(_header(shape, dtype)), shape)
    except FileNotFoundError:
        return None
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    if not wrong and array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = "has numbers that are not finite"
    if wrong == _OLDER:  # no news for anybody
        return None
    if wrong:
        logging.getLogger(__name__).warning("dopamine: the cached %s %s; it is made anew", path, wrong)
        return None
    return array


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def _what_is_wrong(file: io.BufferedReader, header: bytes, size: int) -> str:
    """Why a file is not an array of this header and ``size`` bytes of this user's; empty if it is."""
    found = os.fstat(file.fileno())
    if hasattr(os, "geteuid") and found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid} (set DOPAMINE_CACHE to a folder of your own)"
    if file.read(len(header)) != header:
        return "is damaged, or of another shape"
    if found.st_size == len(header) + size:
        return _OLDER
    if found.st_size != len(header) + size + _CRC:
        return "is damaged: it has another length"
    crc = 0
    for start in range(0, size, 2**20):
        crc = zlib.crc32(file.read(min(2**20, size - start)), crc)
    return "" if file.read() == crc.to_bytes(_CRC, "little") else "is damaged: its checksum is another"


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"the cache {folder} cannot be written ({error.strerror or error}); {_CHOOSE}") from error
