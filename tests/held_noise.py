"""What carries noise, held constant: what is left of a run is what it releases of its patients without noise."""

from collections.abc import Callable
from dataclasses import replace

import torch

from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.settings import SETTINGS
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.randomness import Randomness

_KEY, _stream = Randomness("neighbours"), Randomness.stream


def _draw(self: Hospital, step: int) -> tuple[tuple[torch.Tensor, ...], object]:
    """Nobody is sampled, and the noise is that of the hospital and the step, on any data."""
    own = _stream(_KEY, self.plan.setting.name, self.number, step)
    nobody = (torch.empty(0, dtype=torch.int64),) * self.plan.setting.draws
    return nobody, None if self.noise is None else self.noise.draw(own)[0]


def hold(setattr: Callable[[object, str, object], object] = setattr) -> None:
    """Hold samples, noise and sums of features and classes constant; ``setattr`` may be one that is undone."""
    setattr(Hospital, "_draw", _draw)
    first_sum = Task.first_sum
    setattr(Task, "first_sum", lambda self, index, counts: torch.full_like(first_sum(self, index[:0], counts), 0.1))
    setattr(Randomness, "stream", lambda self, *purpose: _stream(_KEY, *purpose))


def shorten(setitem: Callable[[dict, str, object], object] = dict.__setitem__) -> None:
    """Settings of four rounds; the larger rate keeps steps on few patients within a message's range."""
    for name, declared in list(SETTINGS.items()):
        few = {"rounds": 4, "local_steps": min(2, declared.local_steps), "sample_rate": 0.5}
        setitem(SETTINGS, name, replace(declared, **few))
