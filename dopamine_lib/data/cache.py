"""The kit's cache, for what is drawn, decoded or computed once: pictures of a data set, features, unpacked archives."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.files import atomic_path

_CHOOSE = "set the environment variable DOPAMINE_CACHE to a folder that can be written and has room"
_DAY = 24 * 60 * 60


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


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"the cache {folder} cannot be written ({error.strerror or error}); {_CHOOSE}") from error
