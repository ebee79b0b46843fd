"""What work that takes its time shows: a bar in a terminal or notebook, in a log lines that grow rarer, a last line.

Bars and lines say how much is done and how long the rest should take. All goes to standard error, and what is over in
five seconds shows nothing. ``TQDM_DISABLE=1`` turns it off.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

#: Seconds of work that are worth a word.
SHORT = 5.0
_LINE = "{desc}: {percentage:3.0f} %, {n_fmt} of {total_fmt} ({unit}), {elapsed} so far, about {remaining} to go"


def progress_bar(items: Iterable | None = None, *, title: str, unit: str, show: bool = True, **terms: Any) -> "tqdm":
    """``items``, shown as they are taken; without them a bar whose ``update(n)`` is called.

    unit   what is counted, in the singular
    show   False for silence
    terms  more of tqdm's own, such as ``total``

    >>> sum(progress_bar([1, 2, 3], title="adding", unit="number"))
    6
    """
    from tqdm.auto import tqdm  # its asyncio is slow to import, and most commands show no bar

    if not show:
        terms["disable"] = True
    notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)  # importing that would be slow
    if not notebook and not sys.stderr.isatty():
        terms |= {"file": _Log(sys.stderr), "bar_format": _LINE, "mininterval": SHORT}
    return tqdm(items, desc=title, unit=unit, delay=SHORT, **terms)


def last_line(title: str, seconds: float, where: object = None) -> str:
    """What a command took, and where its results are: ``reproduce: 52 s, 1.3 GB in the largest process; results``.

    Memory is the largest of any process of the command, where the system counts it (Linux and macOS).
    """
    said = f"{title}: {seconds:.0f} s"
    with contextlib.suppress(ModuleNotFoundError):  # on Windows
        import resource

        users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak = max(resource.getrusage(user).ru_maxrss for user in users) * (1 if sys.platform == "darwin" else 1024)
        said += f", {peak / 2**30:.1f} GB in the largest process"
    return said if where is None else f"{said}; {where}"


def say_last_line(title: str, began: float, where: object = None) -> None:
    """Print ``last_line`` to standard error, where the work took longer than ``SHORT`` since ``began``.

    began  by ``time.monotonic``
    """
    if (seconds := time.monotonic() - began) >= SHORT and not os.environ.get("TQDM_DISABLE"):
        print(last_line(title, seconds, where), file=sys.stderr, flush=True)


class _Log:
    """A file in which a bar's states are lines: after five seconds, and whenever twice the time has passed."""

    def __init__(self, file: TextIO):
        self._file, self._began, self._next = file, time.monotonic(), SHORT

    def write(self, text: str) -> None:
        """Write a state of the bar as a line, if one is due; without the characters that move a terminal's cursor."""
        line, passed = text.replace("\x1b[A", "").strip(), time.monotonic() - self._began
        if line and passed >= self._next:
            self._next = 2 * passed
            print(line, file=self._file, flush=True)

    def flush(self) -> None:
        """Nothing waits: every line is written at once."""
