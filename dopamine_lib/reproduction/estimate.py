"""How long the rest of a job takes: said once, after the first minute of training."""

import sys
import time
from collections.abc import Callable

from tqdm.auto import tqdm

from dopamine_lib.progress import progress_bar

#: Seconds after which it is said.
MINUTE = 60.0


class Estimate:
    """A progress bar of gradients, which tells in words what is left once it knows the pace.

    total    gradients of the whole job
    clock    seconds, for tests
    """

    def __init__(self, total: float, title: str, show: bool, clock: Callable[[], float] = time.monotonic):
        self._bar = progress_bar(title=title, unit="gradient", total=round(total), unit_scale=True, show=show)
        self._total, self._show, self._clock = total, show, clock
        self._done, self._begin, self._said = 0.0, None, False

    def update(self, gradients: float) -> None:
        """Add what has been done since; the first call may bring an earlier process's work, which has no pace."""
        self._bar.update(round(gradients))
        self._done, now = self._done + gradients, self._clock()
        if self._begin is None:
            self._begin = now, self._done
        (at, before), ahead = self._begin, self._total - self._done
        if self._show and not self._said and now - at >= MINUTE and before < self._done < self._total:
            self._said = True
            minutes = ahead * (now - at) / (self._done - before) / 60
            tqdm.write(f"at this pace the rest takes about {minutes:.0f} minutes", file=sys.stderr)

    def __enter__(self) -> "Estimate":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
