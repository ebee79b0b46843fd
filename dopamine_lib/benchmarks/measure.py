"""How every benchmark measures: candidate and peer take turns, the median counts, and a row is one figure.

On a shared machine seconds drift by a factor of two within minutes. Functions that take turns drift together, so their
ratios stay comparable where their seconds do not.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

from dopamine_lib import __version__
from dopamine_lib.files import atomic_path
from dopamine_lib.machine import cores
from dopamine_lib.progress import progress_bar

#: Only Linux shows other processes; elsewhere memory and processor time are left out.
PROC = Path("/proc/self/smaps_rollup").exists()


def interleaved(functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each function: name -> (repeats,). All run once before any runs again.

    warm_up  turns before the first that counts (caches, lazy imports, compiled code)
    Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, but must be at least 1: a median needs a measurement")
    seconds = {name: [] for name in functions}
    for turn in progress_bar(range(warm_up + repeats), title="measuring", unit="turn"):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            taken = time.perf_counter() - begin
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each list of ``interleaved``.

    >>> medians({"ours": [1.0, 9.0, 2.0]})
    {'ours': 2.0}
    """
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def row(
    name: str,
    value: float,
    unit: str,
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
    target: str | None = None,
    holds: bool | None = None,
) -> dict:
    """One figure. ``target`` says in words what ``holds`` is about; both are None where there is no target.

    ratio  value / peer_value; or peer_value / value where the target is a speed-up over the peer
    Raises ValueError for a target without ``holds``, or the reverse.
    """
    if (target is None) != (holds is None):
        raise ValueError(f"row {name!r} has target {target!r} and holds {holds!r}: give both or neither")
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": ratio,
        "target": target,
        "holds": None if holds is None else bool(holds),
    }


def at_most(
    name: str, value: float, unit: str, most: float | None, peer: str | None = None, peer_value: float | None = None
) -> dict:
    """One figure that should be at most ``most``, in its own unit; None for no target.

    >>> line = at_most("online", 0.5, "s", 0.4)
    >>> line["target"], line["holds"]
    ('at most 0.4 s', False)
    """
    ratio = None if peer is None else value / peer_value
    target, holds = (None, None) if most is None else (f"at most {most:g} {unit}", value <= most)
    return row(name, value, unit, peer, peer_value, ratio, target, holds)


def processor_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes until now; where other processes are not shown (only Linux does), NaN.

    Unlike a clock's seconds, these are hardly longer on a busy machine.
    """
    if not PROC:
        return math.nan
    fields = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """The machine behind the figures, in one line: processor, cores, load, system and versions."""
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    return (
        f"{_processor()}, {cores()} cores, {load} at the end, {platform.system()}, "
        f"Python {platform.python_version()}, dopamine_lib {__version__}"
    )


def write(rows: list[dict], path: str | PathLike | None = None) -> dict:
    """The benchmark's result, ``{"machine": ..., "rows": [...]}``, also written to ``path`` as JSON if one is given.

    Raises ValueError for a figure that is NaN or infinite.
    """
    result = {"machine": machine(), "rows": rows}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return result


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
