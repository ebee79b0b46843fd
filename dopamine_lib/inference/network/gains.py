"""By which factors the channels of each value are multiplied, before any weight is rounded.

A result of weights gets as many bits as its range on public images allows with ``MARGIN`` bits to spare. The margin is
there because values inside a secret image cannot be looked at; all that is learnt of an overflow there is one bit
(``protocols.room``), which is no answer.

ReLU, pooling and sums leave no weight in which a factor could change, so the values that they tie together, such as all
of a stage of residual blocks, have the same factors but for powers of two, which are public: they are what ReLU and
``truncation`` shift by. Where all readers have weights, each channel has a factor of its own (``quantise``); elsewhere
the values are ``uniform``: what is opened, normalised, or added to the image has one power of two for all channels.
"""

import math

import torch
from torch import Tensor, nn

from dopamine_lib.inference.network.graph import Add, Branches, Join, Step, readers
from dopamine_lib.models.features import NormalisedFeatures

#: ReLU needs |x| < 2^31 - 2^15, a comparison of two values |a - b| below it too; truncation one bit less.
RING_BITS = 31
#: Bits of room above the largest value on public images.
MARGIN = 1.5
#: A channel's range is taken to be at least this share of the largest channel's: a channel that is quiet on public
#: images may be loud on another.
QUIETEST = 1 / 2
_UNTIED = (nn.Conv2d, nn.Linear, Branches, Join, NormalisedFeatures)


class Gains:
    """What the results of a network's steps may be multiplied by.

    ranges  the largest absolute value of each channel on public images (C,), by step: see ``ranges_of``
    """

    def __init__(self, steps: list[Step], ranges: dict[Step, Tensor]):
        self._readers, self._ranges = readers(steps), ranges
        self._tied = {step: {step} for step in steps}
        for step in steps:
            if not isinstance(step.module, _UNTIED):
                together = set().union(*(self._tied[member] for member in (step, *step.sources)))
                self._tied.update(dict.fromkeys(together, together))
        ends = [steps[0], steps[-1]]
        ends += [step.sources[0] for step in steps if isinstance(step.module, NormalisedFeatures)]
        self._uniform: set[Step] = set()
        while ends:  # what a uniform value is joined from is uniform
            new = self._tied[ends.pop()] - self._uniform
            self._uniform |= new
            ends += [source for step in new if isinstance(step.module, Join) for source in step.sources]

    def uniform(self, step: Step) -> bool:
        """Whether a step's result has one power of two for all channels."""
        return step in self._uniform

    def compared(self, step: Step) -> bool:
        """Whether a step's result is only compared, or added to what is."""
        kinds = nn.ReLU, nn.ReLU6, nn.MaxPool2d, Add
        reading = self._readers[step]
        return bool(reading) and all(
            isinstance(reader.module, kinds) and (not isinstance(reader.module, Add) or self.compared(reader))
            for reader in reading
        )

    def unit(self, step: Step) -> Tensor:
        """What the gains of all values tied to a step's are, but for a power of two (C,)."""
        ranges = torch.stack([self._ranges[one] for one in self._tied[step] if one in self._ranges]).amax(0)
        if self.uniform(step):
            return torch.ones_like(ranges)
        return limit(compared=True) / ranges.clamp_min(max(float(ranges.max()) * QUIETEST, 1e-9))

    def of(self, *steps: Step) -> tuple[Tensor, float]:
        """Gains (C,) that leave the room to the results of steps, tied, and to the sums they go into; and a scale."""
        unit, together = self.unit(steps[-1]), set().union(*map(self._sums, steps))
        peak = max(max(float((self._ranges[one] * unit).max()) for one in together if one in self._ranges), 1e-9)
        factor = 2.0 ** math.floor(1e-6 + math.log2(limit(self.compared(steps[-1])) / peak))
        return unit * factor, self.label(steps[-1], factor)

    def label(self, step: Step, factor: float) -> float:
        """The public scale of a result whose gains are ``factor`` times the ``unit``: of a hidden one a mere label."""
        return factor if self.uniform(step) else factor * 2.0 ** math.floor(RING_BITS - MARGIN)

    def _sums(self, step: Step) -> set[Step]:
        sums = (self._sums(reader) for reader in self._readers[step] if isinstance(reader.module, Add))
        return {step}.union(*sums)


def limit(compared: bool) -> float:
    """The largest ring element that a result may have on public images."""
    return 2.0 ** (RING_BITS - MARGIN - (0 if compared else 1))


def apply(step: Step, inputs: list[Tensor]) -> Tensor:
    """A step's result in the clear (N, C, H, W); flattening is left to the linear layer that reads it."""
    if isinstance(step.module, nn.Linear):
        return step.module(inputs[0].flatten(1))[:, :, None, None]
    return inputs[0] if isinstance(step.module, nn.Flatten | NormalisedFeatures) else step.module(*inputs)


def ranges_of(steps: list[Step], images: Tensor) -> dict[Step, Tensor]:
    """The largest absolute value of each channel (C,) of each step's result on images (N, C, H, W).

    Where differences are compared, as in a maximum or with the bound of ReLU6, they count as well; and half of a bias,
    which must be a ring element too. It ends at a step that torch refuses.
    """
    reading, values, found = readers(steps), {steps[0]: images}, {}
    for i, step in enumerate(steps):
        if i:
            try:
                values[step] = apply(step, [values[source] for source in step.sources])
            except (RuntimeError, IndexError, TypeError):
                break
        low, high = values[step].amin((0, 2, 3)), values[step].amax((0, 2, 3))
        found[step] = torch.maximum(torch.maximum(-low, high), _bias(step.module, high) / 2)
        if any(isinstance(reader.module, nn.MaxPool2d) for reader in reading[step]):
            found[step] = torch.maximum(found[step], high - low)
        if any(isinstance(reader.module, nn.ReLU6) for reader in reading[step]):
            found[step] = found[step] + 6 / 2**MARGIN  # 6 is known, and needs no margin
            found[step] = found[step].clamp_min(6 / 2**0.4)  # but as a ring element it must stay below 2^30
        for source in {source for source in values if all(r in found for r in reading[source])} - {step}:
            del values[source]
    return found


def _bias(module: nn.Module, like: Tensor) -> Tensor:
    modules = module if isinstance(module, Branches) else [module]
    biases = [getattr(one, "bias", None) for one in modules]
    return (
        torch.cat([bias.abs() for bias in biases])
        if all(torch.is_tensor(b) for b in biases)
        else torch.zeros_like(like)
    )
