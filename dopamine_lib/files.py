"""Where the kit keeps its files, and how it writes them: whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

#: Weights that ship with the kit: SqueezeNet, pre-trained on public synthetic patients.
EMBEDDED = Path(__file__).parent / "assets" / "squeezenet1_1_synthetic.safetensors"
#: torchvision's ImageNet checkpoint, used only where the user has it already: nothing is downloaded unasked.
IMAGENET_FILE = "squeezenet1_1-b8a52dc0.pth"


def cache_dir() -> Path:
    """The kit's cache: ``$DOPAMINE_CACHE``, else ``dopamine`` under the user's cache directory."""
    chosen = os.environ.get("DOPAMINE_CACHE")
    if chosen:
        path = Path(chosen)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dopamine"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)  # decoded images of patients may be in it
    return path


def _umask() -> int:
    """Which rights the user keeps from others. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".dopamine-{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's file is the owner's alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
