"""Looking into the memory of running processes, to see which of them hold a secret (Linux only).

    find(pid, {"scan": pixels.tobytes()})  -> {"scan": 2}        how often each is found there
    together([pid, …])                     -> bytes              what they take, shared pages counted once

A system may forbid it; a process may look into itself and, mostly, into those that it started.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from dopamine_lib.errors import InputError

CHUNK = 16 * 2**20


def find(pid: int, needles: dict[str, bytes]) -> dict[str, int]:
    """How often each needle lies in the memory of a process, by name; in one's own, the needle itself counts once.

    Raises InputError for a needle below 16 bytes, which chance could put anywhere, PermissionError where the system
    does not let us look, ProcessLookupError or FileNotFoundError where there is no such process.
    """
    for name, needle in needles.items():
        if len(needle) < 16:
            raise InputError(f"'{name}' has {len(needle)} bytes; look for at least 16, or chance will find it")
    found = dict.fromkeys(needles, 0)
    overlap = max(map(len, needles.values()), default=1) - 1
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for begin, end in _readable(pid):
            rest, at = b"", begin
            while at < end:
                chunk = _read(memory, at, min(CHUNK, end - at))
                if not chunk:
                    break
                at += len(chunk)
                part = rest + chunk
                for name, needle in needles.items():
                    # those within ``rest`` were counted with the chunk before
                    found[name] += part.count(needle) - rest.count(needle)
                rest = part[-overlap:] if overlap else b""
    return found


def together(pids: Iterable[int]) -> int:
    """Bytes that processes take together: proportional set sizes, so that a page shared by two counts half for each."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
    return total


def children(pid: int) -> list[int]:
    """All processes that a process started, and all that those started."""
    own = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:  # ended since the list was made
            continue
        own.setdefault(parent, []).append(int(stat.parent.name))
    found = list(own.get(pid, []))
    for child in found:  # grows while it is read
        found += own.get(child, [])
    return found


def _readable(pid: int):
    """(begin, end) of every part of a process's memory that can be read and may hold what the process made or read.

    Left out are devices, and the constant parts of libraries, which are gigabytes.
    """
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        places, rights, _, _, _, *name = line.split(None, 5)
        name = name[0] if name else ""
        library = re.search(r"\.so(\.\d+)*$", name)
        device = name.startswith(("[v", "/dev/")) and not name.startswith("/dev/shm/")
        constant = "w" not in rights and (library or device)
        if rights.startswith("r") and not constant:
            yield tuple(int(place, 16) for place in places.split("-"))


def _read(memory, at: int, size: int) -> bytes:
    memory.seek(at)
    try:
        return memory.read(size)
    except OSError:  # freed since the list was made, or beyond the end of a mapped file
        return b""
