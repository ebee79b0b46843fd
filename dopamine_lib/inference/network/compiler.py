"""From a torch model to a public plan and the provider's integer weights.

A convolution's result gets as many bits as its range on public images allows with ``MARGIN`` bits to spare, an
activation about ``ACTIVATION_BITS``. The margin is there because values inside a secret image cannot be looked at, so
an overflow there would go unnoticed. Only public or synthetic images set the scales.

ReLU and max pooling change places where they meet (see ``pooling``). A fire module's two expanding convolutions become
one layer, since they read the same input. How a module of torch becomes a layer of the plan is said by the layer's
class, in ``from_torch``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import SqueezeNet
from torchvision.models.squeezenet import Fire

from dopamine_lib.errors import InputError
from dopamine_lib.inference.network.plan import LAYERS, Plan, Weights
from dopamine_lib.inference.network.quantise import gains_of, quantise
from dopamine_lib.inference.protocols.comparison import ReLU
from dopamine_lib.inference.protocols.convolution import Branch, Convolution, pair
from dopamine_lib.inference.protocols.opening import GRADE, HALF, SCORES, ArgMax
from dopamine_lib.inference.protocols.operation import Layer
from dopamine_lib.inference.protocols.sharing import encode
from dopamine_lib.inference.protocols.truncation import Concatenate, Raise, Truncate
from dopamine_lib.models.networks import NormalisedFeatures

#: ReLU needs |x| < 2^31 - 2^15, a comparison of two values |a - b| below it too; truncation one bit less.
RING_BITS = 31
#: Bits of room above the largest value on public images.
MARGIN = 1.5
#: Scores are opened with noise of 2^-NOISE of the largest on public images, to a factor of two.
NOISE = 14
#: Bits of an activation; the rest of the ring is for the weights. A picture has 8 bits to begin with, and the last
#: weights, with one scale for all channels, would come out coarse. All follow from the architecture alone.
ACTIVATION_BITS, PICTURE_BITS, LAST_BITS = 16, 14, 14


class Branches(nn.ModuleList):
    """Modules that read one input; their outputs are concatenated by channel."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, sum of C_i, H', W')."""
        return torch.cat([branch(x) for branch in self], 1)


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
        compiler.run(_leaves("", model.eval()), [])
        return compiler.result(answer)


def _leaves(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a sequential model in order; a fire module becomes four of them."""
    if isinstance(module, Fire):
        expand = Branches([module.expand1x1, module.expand3x3])
        parts = [("squeeze", module.squeeze), ("relu", nn.ReLU()), ("expand", expand), ("relu", nn.ReLU())]
        return [(f"{name}.{part}", child) for part, child in parts]
    if not isinstance(module, nn.Sequential | SqueezeNet):
        return [(name or type(module).__name__, module)]
    prefix = f"{name}." if name else ""
    parts = [leaf for child, part in module.named_children() for leaf in _leaves(prefix + child, part)]
    return parts + [(prefix + "flatten", nn.Flatten())] if isinstance(module, SqueezeNet) else parts


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

    @property
    def excess(self) -> int:
        """How many bits more than an activation should."""
        return self.bits - ACTIVATION_BITS


class Compiler:
    """Walks a model's modules with the calibration images; its public part is for ``Layer.from_torch``.

    value   the current value on the calibration images
    before  the value before the last layer, where that was a ReLU that may change places with a pooling
    ahead   the modules that follow
    """

    margin = MARGIN

    def __init__(self, calibration: Tensor, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std, self.shape = tuple(map(float, mean)), tuple(map(float, std)), tuple(calibration.shape[1:])
        bound = max(max(abs(m), abs(1 - m)) / s for m, s in zip(self.mean, self.std, strict=True))
        self.scale = 2.0 ** math.floor(PICTURE_BITS - math.log2(bound))
        self.value = _Value(0, calibration, torch.full((self.shape[0],), self.scale), self.scale)
        self.layers, self.matrices, self.biases, self.ahead = [], {}, {}, []
        self.before, self.normalised = None, False

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

    def run(self, modules: list[tuple[str, nn.Module]], ahead: list[nn.Module]) -> None:
        """Append the layers that named modules become, in order; ``ahead`` are the modules after them."""
        for i, (name, module) in enumerate(modules):
            self.ahead = [later for _, later in modules[i + 1 :]] + ahead
            method = next((method for kind, method in _NO_LAYER if isinstance(module, kind)), None)
            if method and not self.normalised:
                method(self, name, module)
            else:
                self._layer_for(name, module).from_torch(self, name, module)

    def _layer_for(self, name: str, module: nn.Module) -> type[Layer]:
        for layer in LAYERS:
            kinds = tuple(getattr(nn, kind) for kind in layer.torch_layers)
            if layer.on_normalised == self.normalised and isinstance(module, kinds):
                return layer
        known = ", ".join(known for layer in LAYERS if not layer.on_normalised for known in layer.torch_layers)
        raise InputError(
            f"layer '{name}' ({type(module).__name__}) cannot be evaluated privately here; known are {known}, Flatten, "
            "Dropout, Fire, Branches, and NormalisedFeatures before the last Linear"
        )

    # modules that are no layer of their own

    def _branches(self, name: str, module: Branches) -> None:
        self.check_picture(name, module)
        if all(isinstance(branch, nn.Conv2d) for branch in module):
            return Convolution.from_torch(self, name, *module)
        source, ahead, ends = self.value, self.ahead, []
        for child, part in module.named_children():
            self.value, self.before = source, None
            self.run(_leaves(f"{name}.{child}", part), ahead)
            self.narrow(f"{name}.{child}")
            ends.append(self.value)
        finest = max(end.scale for end in ends)
        shifts = tuple(round(math.log2(finest / end.scale)) for end in ends)
        if any(end.scale * 2**shift != finest for end, shift in zip(ends, shifts, strict=True)):
            raise InputError(f"layer '{name}': branches with averages over different counts cannot be joined")
        gain = torch.cat([end.gain * 2**shift for end, shift in zip(ends, shifts, strict=True)])
        sources = tuple(end.number for end in ends)
        images = torch.cat([end.images for end in ends], 1)
        self.append(Concatenate, name, images, gain=gain, scale=finest, sources=sources, shifts=shifts)

    def _flatten(self, name: str, module: nn.Flatten) -> None:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise InputError(f"layer '{name}': Flatten must join all dimensions of an image")
        self.value.flat, self.before = True, None

    def _normalise(self, name: str, module: NormalisedFeatures) -> None:
        if not self.value.flat or self.value.images.shape[2:] != (1, 1):
            raise InputError(
                f"layer '{name}' (NormalisedFeatures) needs one value per channel: average pooling, Flatten"
            )
        self.normalised = True

    def _dropout(self, name: str, module: nn.Dropout) -> None:
        """Nothing to do outside training."""

    # what layers need

    def limit(self, compared: bool) -> float:
        """The largest ring element that a result may have on public images."""
        return 2.0 ** (RING_BITS - MARGIN - (0 if compared else 1))

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

    def narrow(self, name: str) -> None:
        """Truncate a value that takes more bits than an activation should; one bit of tolerance."""
        if (shift := self.value.excess) > 1:
            self._rescale(Truncate, f"{name} (truncation)", -shift)

    def widen(self, name: str) -> None:
        """Multiply a value that will be compared by a power of two: comparisons drop 15 bits."""
        if (shift := math.floor(RING_BITS - MARGIN) - self.value.bits) > 1:
            self._rescale(Raise, f"{name} (raise)", shift)

    def _rescale(self, layer: type[Layer], name: str, bits: int) -> None:
        value, factor = self.value, 2.0**bits
        self.append(layer, name, value.images, gain=value.gain * factor, scale=value.scale * factor, shift=abs(bits))

    def swap_relu(self, layer: type[Layer], name: str, module: nn.Module) -> bool:
        """Put a pooling before the ReLU that precedes it; returns whether there was one."""
        if self.before is None:
            return False
        relu = self.layers.pop()
        self.value, self.before = self.before, None
        layer.from_torch(self, name, module)
        ReLU.from_torch(self, relu.name, nn.ReLU())
        return True

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
        self.value, self.before = _Value(len(self.layers), images, gain, float(scale), self.value.flat), None

    def weigh(self, layer: type[Layer], name: str, modules: Sequence[nn.Module], branches: tuple[Branch, ...]) -> None:
        """Append the layer of modules that read one input, their weights rounded.

        Where another layer with weights reads the result, every channel gets a gain of its own.
        """
        self.narrow(name)
        x, flat = self.value.images, self.value.flat
        for module in modules:
            self.check_weights(name, module, math.prod(x.shape[1:]) if flat else x.shape[1])
        z = [m(x.flatten(1))[:, :, None, None] if flat else m(x) for m in modules]
        pooled, hidden, room = self._prospects()
        gain_in = self.value.gain if hidden else self._coarser(ACTIVATION_BITS - LAST_BITS)
        gain = gains_of(torch.cat(z, 1), room, pooled)
        scale = 2.0 ** math.floor(math.log2(room if hidden else float(gain.min())))
        gain = gain if hidden else torch.full_like(gain, scale)
        gains = gain.split([len(m.weight) for m in modules])
        parts = [quantise(m, x, gain_in, gain_out) for m, gain_out in zip(modules, gains, strict=True)]
        bias = encode(torch.cat([bias for _, bias in parts]).numpy(), 1)
        weights = [encode(weight.numpy(), 1) for weight, _ in parts], bias
        self.append(layer, name, torch.cat(z, 1), gain=gain, scale=scale, weights=weights, branches=branches, flat=flat)

    def _coarser(self, bits: int) -> Tensor:
        """Make what comes in ``bits`` coarser, where a ReLU before can; the gains (C,) that it has then."""
        value, last = self.value, self.layers[-1] if self.layers else None
        if isinstance(last, ReLU) and value.number == len(self.layers):
            self.layers[-1] = replace(last, shift=last.shift + bits, scale=last.scale / 2**bits)
            value.gain, value.scale = value.gain / 2**bits, value.scale / 2**bits
        return value.gain

    def _prospects(self) -> tuple[bool, bool, float]:
        """Of the result of a convolution: is it pooled next, read by another convolution, and how large may it be?"""
        skipped = (nn.Dropout, nn.Flatten)
        ahead = [module for module in self.ahead if not isinstance(module, skipped)]
        compared = bool(ahead) and isinstance(ahead[0], nn.ReLU | nn.MaxPool2d)
        pooled = any(isinstance(module, nn.MaxPool2d) for module in ahead[:2]) and compared
        readers = [m for m in ahead if isinstance(m, nn.Conv2d | nn.Linear | Branches | NormalisedFeatures)]
        hidden = bool(readers) and isinstance(readers[0], nn.Conv2d | nn.Linear | Branches)
        if hidden and isinstance(readers[0], Branches):
            hidden = all(isinstance(branch, nn.Conv2d) for branch in readers[0])
        return pooled, hidden, self.limit(compared)


_NO_LAYER = (
    (Branches, Compiler._branches),
    (nn.Flatten, Compiler._flatten),
    (NormalisedFeatures, Compiler._normalise),
    (nn.Dropout, Compiler._dropout),
)
