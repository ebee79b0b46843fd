"""A picture that anybody may have made, decoded in a process of its own, with limits on its time and memory.

A decoder does what a file says: a JPEG of 300 kB with a hundred scans takes ten times a photograph's time, one of 32 MB
hours; a PNG of 100 kB unfolds to hundreds of megabytes. So the page and ``infer`` open a patient's file by
``open_apart``; a data set, which its owner has chosen, is opened in the process that reads it.
"""

import contextlib
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from dopamine_lib.data.images import open_image
from dopamine_lib.errors import InputError

#: Bytes of address space (where the system keeps to it), seconds of processor time, and seconds by the clock.
MEMORY, SECONDS, PATIENCE = 3 * 2**29, 20, 120


def open_apart(source: str | Path | BinaryIO, name: str = "") -> Image.Image:
    """``images.open_image`` in a child process, which is killed at its limits.

    source  a path, whose file this process does not read, or an open binary file
    name    its name in messages, by default the path
    Raises InputError as ``open_image`` does, and for a picture that takes more time or memory than any photograph.
    """
    name = name or str(source)
    reads, writes = os.pipe()
    timer = None
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, writes)
            held = hasattr(source, "read")
            file = subprocess.PIPE if held else stack.enter_context(_opened(source, name))
            home, path = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, (writes, MEMORY, SECONDS))],  # -P: see ``pool.Child``
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, [home, path])), "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[writes],
            )
        timer = threading.Timer(PATIENCE, child.kill)
        timer.start()
        if held:
            with contextlib.suppress(BrokenPipeError), child.stdin:  # it was killed
                child.stdin.write(source.read())
        with os.fdopen(reads, "rb", closefd=False) as answer:
            kind, *size = answer.readline().split()[:3] or [b"killed"]
            rest = answer.read()
        child.wait()
    finally:
        if timer is not None:
            timer.cancel()
            child.kill()  # an interrupt leaves none behind
        os.close(reads)
    if kind == b"picture" and len(rest) == 3 * int(size[0]) * int(size[1]):
        return Image.frombytes("RGB", (int(size[0]), int(size[1])), rest)
    if kind == b"wrong":
        raise InputError(rest.decode().replace("\0", name))
    raise InputError(
        f"{name}: decoding it takes more than {SECONDS} s or {MEMORY / 2**30:g} GiB, which no photograph does; save it "
        "again, as an ordinary JPEG"
    )


def _opened(path: str | Path, name: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{name}: not a readable PNG or JPEG image ({error.strerror}); get the file again") from None


def main(descriptor: str, memory: str, seconds: str) -> None:
    """Decode what stands on the standard input within the limits; say so, or what is wrong, on a descriptor."""
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        for limit, value in ((resource.RLIMIT_AS, int(memory)), (resource.RLIMIT_CPU, int(seconds))):
            with contextlib.suppress(ValueError, OSError):  # a system may not let it be set, or have a lower one
                resource.setrlimit(limit, (value, value))
    with open(int(descriptor), "wb") as answer:
        try:
            image = open_image(io.BytesIO(sys.stdin.buffer.read()), "\0")
            answer.write(b"picture %d %d\n" % image.size)
            answer.write(image.tobytes())
        except InputError as error:
            answer.write(b"wrong\n" + str(error).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
