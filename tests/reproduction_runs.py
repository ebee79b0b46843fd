"""What the tests of the main job share: its command line, and a look at what is on disk and at processes."""

import contextlib
from pathlib import Path


def arguments(small, out, *more):
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in small.items()]
    return ["reproduce", *(word for pair in pairs for word in pair), "--out", str(out), *more]


def checkpoints(out):
    """The checkpoints and records that are on disk, with their times."""
    found = set()
    for path in (out / "runs").glob("*.*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return {(name, at) for name, at in found if not name.startswith(".") and not name.endswith(".lock")}


def children(pid):
    """Process numbers of the workers that ``pid`` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
