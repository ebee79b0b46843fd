"""From a torch model to a public plan and the provider's integer weights.

``graph`` makes steps of a model, ``gains`` says how many bits each result gets, and here every step becomes layers of
the plan; how, its layer's class says in ``from_torch``. An activation gets about ``ACTIVATION_BITS``. Only public or
synthetic images set the scales.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dopamine_lib.errors import InputError
from dopamine_lib.inference.network.gains import MARGIN, RING_BITS, Gains, limit, ranges_of
from dopamine_lib.inference.network.graph import Branches, Step, each_channel, readers, steps_of
from dopamine_lib.inference.network.kinds import check_known, layer_for
from dopamine_lib.inference.network.plan import Plan, Weights
from dopamine_lib.inference.network.quantise import quantise
from dopamine_lib.inference.protocols.convolution import Branch, Convolution, pair
from dopamine_lib.inference.protocols.opening import GRADE, HALF, SCORES, ArgMax
from dopamine_lib.inference.protocols.operation import Layer
from dopamine_lib.inference.protocols.relu import ReLU, ReLU6
from dopamine_lib.inference.protocols.sharing import encode
from dopamine_lib.inference.protocols.truncation import Raise, Truncate
from dopamine_lib.models.features import NormalisedFeatures

#: Scores are opened with noise of 2^-NOISE of the largest on public images, to a factor of two.
NOISE = 14
#: Bits of an activation, and the most numbers in a sum that reads it; the rest of the ring is for the weights, and the
#: longer a sum, the less is left. A picture has 8 bits to begin with, and the last weights, with one scale for all
#: channels, would come out coarse. A sum that is truncated, or that ReLU6 bounds, has a bit less of the ring than one
#: that ReLU reads. All follow from the architecture alone.
ACTIVATION_BITS = {576: 16, 1152: 15, math.inf: 14}
BOUNDED_BITS = {64: 15, math.inf: 14}
MOST_BITS, PICTURE_BITS, LAST_BITS = 16, 14, 14


def compile_model(
    model: nn.Module,
    size: int | tuple[int, int],
    calibration: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    answer: str = SCORES,
) -> tuple[Plan, Weights]:
    """Plan and integer weights of a model made of the layers this package knows.

    size         input pixels, one number or (H, W)
    calibration  float32 (N, C, H, W), normalised public or synthetic images: see ``serving``
    mean, std    normalisation of the model's pictures, one number per channel; images are checked against it
    answer       what the patient is told: the ``SCORES``, under noise, or the ``GRADE`` alone
    Raises InputError for a layer, an option of a layer, or weights it cannot take; names the layer.
    """
    height, width = pair(size)
    if calibration.shape[2:] != (height, width) or not len(calibration):
        raise InputError(
            f"the calibration images are {tuple(calibration.shape)}; they must be (N, C, {height}, {width}), N >= 1"
        )
    channels = calibration.shape[1]
    compiler = Compiler(calibration.float(), mean or (0.5,) * channels, std or (0.5,) * channels)
    with torch.inference_mode():
        compiler.run(steps_of(model.eval()))
        return compiler.result(answer)


@dataclass
class _Value:
    """A value on the calibration images: real (N, C, H, W), and ring units per real unit of each channel (C,)."""

    number: int
    images: Tensor
    gain: Tensor
    scale: float
    flat: bool = False

    @property
    def peak(self) -> float:
        """The largest ring element."""
        return max(float((self.images.abs().amax((0, 2, 3)) * self.gain).max()), 1.0)

    @property
    def bits(self) -> int:
        """How many bits the largest takes."""
        return math.ceil(math.log2(self.peak))


class Compiler:
    """Walks a network's steps with the calibration images; its public part is for ``Layer.from_torch``.

    step    the step that becomes layers
    value   the value it reads, and afterwards its result, on the calibration images; ``values``: all that it reads
    """

    margin = MARGIN
    limit = staticmethod(limit)

    def __init__(self, calibration: Tensor, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std, self.shape = tuple(map(float, mean)), tuple(map(float, std)), tuple(calibration.shape[1:])
        bound = max(max(abs(m), abs(1 - m)) / s for m, s in zip(self.mean, self.std, strict=True))
        self.scale = 2.0 ** math.floor(PICTURE_BITS - math.log2(bound))
        self.value = _Value(0, calibration, torch.full((self.shape[0],), self.scale), self.scale)
        self.layers, self.matrices, self.biases, self._narrowed = [], {}, {}, {}
        self.normalised = False
        self._values: dict[Step, _Value] = {}

    def result(self, answer: str = SCORES) -> tuple[Plan, Weights]:
        """The plan and the integer weights. Raises InputError for a model without a layer, or without its last."""
        if not self.layers:
            raise InputError("the model has no layer that computes anything; give a network")
        if self.normalised and not self.layers[-1].on_normalised:
            raise InputError("normalised features must be followed by a Linear layer, the last")
        noise_bits = max(1, math.floor(math.log2(self.value.peak)) - NOISE)
        if answer == GRADE:
            bits, noise_bits = self.layers[-1].bits, 0
            if bits == RING_BITS + 1:
                self.widen("largest")
            number = self.value.images.flatten(1).argmax(1)[:, None, None, None]
            self.append(ArgMax, "largest", number, scale=2.0, dropped=bits - HALF)
        plan = Plan(self.shape, self.scale, self.mean, self.std, tuple(self.layers), noise_bits)
        return plan, Weights(self.matrices, self.biases)

    def run(self, steps: list[Step]) -> None:
        """Append the layers that the steps become, in order."""
        for step in steps[1:]:
            check_known(step, tuple(kind for kind, _ in _NO_LAYER))
        self.gains = Gains(steps, ranges_of(steps, self.value.images))
        self._values, self._reading = {steps[0]: self.value}, readers(steps)
        for step in steps[1:]:
            self.step, self.values = step, [self._values[source] for source in step.sources]
            self.value, self._targets = self.values[0], (step,)
            method = next((method for kind, method in _NO_LAYER if isinstance(step.module, kind)), None)
            if method and not self.normalised:
                method(self, step.name, step.module)
            else:
                try:
                    layer_for(step, self.normalised).from_torch(self, step.name, step.module)
                except RuntimeError as error:  # torch's, such as for shapes that do not fit
                    raise InputError(f"layer '{step.name}': {str(error).splitlines()[0]}") from error
            self._values[step] = self.value
            for source in set(step.sources):
                self._reading[source].remove(step)
                if not self._reading[source]:  # images that nobody reads any more take memory
                    del self._values[source]

    # modules that are no layer of their own

    def _branches(self, name: str, module: Branches) -> None:
        Convolution.from_torch(self, name, *module)

    def _flatten(self, name: str, module: nn.Flatten) -> None:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise InputError(f"layer '{name}': Flatten must join all dimensions of an image")
        self.value = replace(self.value, flat=True)

    def _normalise(self, name: str, module: NormalisedFeatures) -> None:
        if not self.value.flat or self.value.images.shape[2:] != (1, 1):
            raise InputError(
                f"layer '{name}' (NormalisedFeatures) needs one value per channel: average pooling, Flatten"
            )
        self.normalised = True

    # what layers need

    def check_picture(self, name: str, module: nn.Module) -> None:
        """Raise InputError where the current value is flat."""
        if self.value.flat:
            raise InputError(f"layer '{name}' ({type(module).__name__}) follows Flatten, which leaves it no picture")

    def check_weights(self, name: str, module: nn.Module, inputs: int) -> None:
        """Raise InputError for weights that are not finite or are made for another number of inputs."""
        for parameter in (module.weight, module.bias):
            if parameter is not None and not torch.isfinite(parameter).all():
                raise InputError(f"layer '{name}' has weights that are not finite; train or load it again")
        wanted = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
        if wanted != inputs:
            raise InputError(f"layer '{name}' reads {wanted} channels, but {inputs} arrive")

    def narrow(self, name: str, bits: int = MOST_BITS) -> None:
        """Truncate a value that takes more than ``bits``, once for all its readers; one bit of tolerance."""
        key = self.value.number, bits
        if key not in self._narrowed:
            if (shift := self.value.bits - bits) > 1:
                self._rescale(Truncate, f"{name} (truncation)", -shift)
            self._narrowed[key] = self.value
        self.value = replace(self._narrowed[key], flat=self.value.flat)

    def widen(self, name: str, bound: float = 0) -> None:
        """Multiply a value that will be compared, with ``bound``, by a power of two: comparisons drop 15 bits."""
        peak = max(self.value.peak, bound * float(self.value.gain.max()))
        if (shift := math.floor(RING_BITS - MARGIN) - math.ceil(math.log2(peak))) > 1:
            self._rescale(Raise, f"{name} (raise)", shift)

    def _rescale(self, layer: type[Layer], name: str, bits: int) -> None:
        value, factor = self.value, 2.0**bits
        self.append(layer, name, value.images, gain=value.gain * factor, scale=value.scale * factor, shift=abs(bits))

    def clip(self, layer: type[Layer], name: str, images: Tensor, **weights: Any) -> None:
        """Append a ReLU, which truncates to the bits of an activation in passing."""
        bits = min((self._bits_read(reader) for reader in self._reading[self.step]), default=MOST_BITS)
        shift = max(0, replace(self.value, images=images).bits - bits)
        gain, scale = self.value.gain / 2**shift, self.value.scale / 2**shift
        self.append(layer, name, images, gain=gain, scale=scale, shift=shift, **weights)

    def add(self, layer: type[Layer], name: str) -> None:
        """Append the sum of the values, aligned to the finest of their exponents that leaves it room."""
        unit, values, exponents = self.gains.unit(self.step), [], []
        for source, value in zip(self.step.sources, self.values, strict=True):
            self.value = value
            exact = torch.log2(self.value.gain / unit)
            if (exact - exact[0].round()).abs().max() > 1e-3:  # joined from several, or an average: weights must do it
                self._targets = source, self.step
                Convolution.from_torch(self, f"{name} (gains)", each_channel(len(unit)))
                exact = torch.log2(self.value.gain / unit)
            values.append(self.value)
            exponents.append(round(float(exact[0])))
        images = self.step.module(*(value.images for value in self.values))
        room = self.limit(self.gains.compared(self.step)) / float((images.abs().amax((0, 2, 3)) * unit).max() + 1e-9)
        finest = min(max(exponents), math.floor(1e-6 + math.log2(room)))
        for i, exponent in enumerate(exponents):
            if exponent > finest:
                self.value = values[i]
                self._rescale(Truncate, f"{name} (truncation)", finest - exponent)
                values[i], exponents[i] = self.value, finest
        sources, shifts = tuple(value.number for value in values), tuple(finest - e for e in exponents)
        gain, scale = unit * 2.0**finest, self.gains.label(self.step, 2.0**finest)
        self.append(layer, name, images, gain=gain, scale=scale, sources=sources, shifts=shifts)

    def join(self, layer: type[Layer], name: str) -> None:
        """Append the values joined by channel; on one scale, where nothing behind them tells their gains apart."""
        ends = []
        for value in self.values:
            self.value = value
            self.narrow(name)
            ends.append(self.value)
        finest, shifts = max(end.scale for end in ends), (0,) * len(ends)
        if self.gains.uniform(self.step):
            shifts = tuple(round(math.log2(finest / end.scale)) for end in ends)
            if any(end.scale * 2**shift != finest for end, shift in zip(ends, shifts, strict=True)):
                raise InputError(f"layer '{name}': branches with averages over different counts cannot be joined")
        gain = torch.cat([end.gain * 2**shift for end, shift in zip(ends, shifts, strict=True)])
        sources, images = tuple(end.number for end in ends), torch.cat([end.images for end in ends], 1)
        self.append(layer, name, images, gain=gain, scale=finest, sources=sources, shifts=shifts)

    def append(
        self, layer: type[Layer], name: str, images: Tensor,
        *, gain: Tensor | None = None, scale: float | None = None, sources: tuple[int, ...] | None = None,
        weights: tuple[list[np.ndarray], np.ndarray] | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        """Add a layer; its result becomes the current value. What is not given stays as it is."""
        gain, scale = self.value.gain if gain is None else gain, self.value.scale if scale is None else scale
        sources = (self.value.number,) if sources is None else sources
        if weights is not None:
            self.matrices[len(self.layers)], self.biases[len(self.layers)] = weights
        self.layers.append(layer(name, sources, tuple(images.shape[1:]), float(scale), **fields))
        self.value = _Value(len(self.layers), images, gain, float(scale), self.value.flat)

    def weigh(self, layer: type[Layer], name: str, modules: Sequence[nn.Module], branches: tuple[Branch, ...]) -> None:
        """Append the layer of modules that read one input, their weights rounded."""
        bits = LAST_BITS if self.gains.uniform(self.step) else self._bits_read(self.step, *modules)
        self._coarser(bits)
        self.narrow(name, bits)
        x, flat = self.value.images, self.value.flat
        for module in modules:
            self.check_weights(name, module, math.prod(x.shape[1:]) if flat else x.shape[1])
        z = [m(x.flatten(1))[:, :, None, None] if flat else m(x) for m in modules]
        gain, scale = self.gains.of(*self._targets)
        gains = gain.split([len(m.weight) for m in modules])
        parts = [quantise(m, x, self.value.gain, gain_out) for m, gain_out in zip(modules, gains, strict=True)]
        bias = encode(torch.cat([bias for _, bias in parts]).numpy(), 1)
        weights = [encode(weight.numpy(), 1) for weight, _ in parts], bias
        self.append(layer, name, torch.cat(z, 1), gain=gain, scale=scale, weights=weights, branches=branches, flat=flat)

    def _bits_read(self, step: Step, *modules: nn.Module) -> int:
        """Bits of an activation that a step reads, or ``modules`` that it becomes."""
        bounded = any(isinstance(reader.module, nn.ReLU6) for reader in self._reading[step])
        bits = ACTIVATION_BITS if self.gains.compared(step) and not bounded else BOUNDED_BITS
        return min(activation_bits(module, bits) for module in modules or [step.module])

    def _coarser(self, bits: int) -> None:
        """Let a value have ``bits``, where a ReLU has just made it for nobody else."""
        value, last = self.value, self.layers[-1] if self.layers else None
        others = (step for step, other in self._values.items() if other.number == value.number)
        alone = all(reader is self.step for step in others for reader in self._reading[step])
        if isinstance(last, ReLU | ReLU6) and value.number == len(self.layers) and alone and value.bits > bits:
            more = value.bits - bits
            self.layers[-1] = replace(last, shift=last.shift + more, scale=last.scale / 2**more)
            self.value = replace(value, gain=value.gain / 2**more, scale=value.scale / 2**more)


def activation_bits(module: nn.Module, allowed: dict[float, int]) -> int:
    """Bits of an activation that a module reads: ``allowed`` by how many numbers are in one of its sums, at most.

    >>> activation_bits(nn.Conv2d(64, 8, 3), ACTIVATION_BITS), activation_bits(nn.Conv2d(64, 8, 3), BOUNDED_BITS)
    (16, 14)
    """
    if isinstance(module, Branches):
        return min(activation_bits(one, allowed) for one in module)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return MOST_BITS
    return next(bits for most, bits in allowed.items() if module.weight[0].numel() <= most)


_NO_LAYER = (
    (Branches, Compiler._branches),
    (nn.Flatten, Compiler._flatten),
    (NormalisedFeatures, Compiler._normalise),
)
