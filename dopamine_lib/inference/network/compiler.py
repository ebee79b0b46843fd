"""From a torch model to a public plan and the provider's integer weights.

A convolution's result gets as many bits as its range on public images allows with ``MARGIN`` bits to spare, an
activation about ``ACTIVATION_BITS``. What the margin is for: values inside a secret image cannot be looked at, so an
overflow there would go unnoticed. Only public or synthetic images set the scales.

ReLU and max pooling change places where they meet (see ``pooling``). A fire module's two expanding convolutions
become one step, since they read the same input.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopamine_lib.errors import InputError
from dopamine_lib.inference.network import plan as steps
from dopamine_lib.inference.network.layers import Branches, leaves, pair
from dopamine_lib.inference.network.parties import Weights
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.network.quantise import gains_of, quantise
from dopamine_lib.inference.protocols.pooling import adaptive_windows, pooled_length, window_factors
from dopamine_lib.inference.protocols.sharing import encode
from dopamine_lib.models.networks import NormalisedFeatures

#: ReLU needs |x| < 2^31 - 2^15, a comparison of two values |a - b| below it too; truncation one bit less.
RING_BITS = 31
#: Bits of room above the largest value on public images.
MARGIN = 1.5
#: Bits of an activation; what is left of the ring's goes to the weights. A picture has 8 bits to begin with, and the
#: last weights, with one scale for all channels, would come out coarse. All follow from the architecture alone.
ACTIVATION_BITS, PICTURE_BITS, LAST_BITS = 16, 14, 14
#: Bits of the patient's 1 / norm before a normalised head.
INVERSE_PRECISION = 16


def compile_model(model: nn.Module, size, calibration: Tensor, mean=None, std=None) -> tuple[Plan, Weights]:
    """Plan and integer weights of a model made of the layers this package knows.

    size         input pixels, one number or (H, W)
    calibration  float32 (N, C, H, W), normalised public or synthetic images: see ``calibration``
    mean, std    what the model's pictures are normalised by, a number a channel; images are checked against it
    Raises InputError for a layer, an option of a layer, or weights it cannot take; names the layer.
    """
    height, width = pair(size)
    if calibration.shape[2:] != (height, width) or not len(calibration):
        raise InputError(
            f"the calibration images are {tuple(calibration.shape)}; they must be (N, C, {height}, {width}), N >= 1"
        )
    channels = calibration.shape[1]
    compiler = _Compiler(calibration.float(), mean or (0.5,) * channels, std or (0.5,) * channels)
    with torch.inference_mode():
        compiler.run(leaves("", model.eval()), [])
    return compiler.result()


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


class _Compiler:
    """Walks a model's layers with the calibration images; ``value`` is the current value, ``ahead`` what follows."""

    def __init__(self, calibration: Tensor, mean, std):
        self.mean, self.std, self.shape = tuple(map(float, mean)), tuple(map(float, std)), tuple(calibration.shape[1:])
        bound = max(max(abs(m), abs(1 - m)) / s for m, s in zip(self.mean, self.std, strict=True))
        self.scale = 2.0 ** math.floor(PICTURE_BITS - math.log2(bound))
        self.value = _Value(0, calibration, torch.full((self.shape[0],), self.scale), self.scale)
        self.steps, self.matrices, self.biases, self.ahead = [], {}, {}, []
        self.before = None  # the value before the last step, where that was a ReLU that may be taken back
        self.normalised = False

    def result(self) -> tuple[Plan, Weights]:
        if not self.steps:
            raise InputError("the model has no layer that computes anything; give a network")
        if self.normalised and not isinstance(self.steps[-1], steps.NormalisedLinear):
            raise InputError("normalised features must be followed by a Linear layer, the last")
        plan = Plan(self.shape, self.scale, self.mean, self.std, tuple(self.steps))
        return plan, Weights(self.matrices, self.biases)

    def run(self, layers, ahead) -> None:
        """Append the steps of layers in order; ``ahead`` are the layers after them."""
        for i, (name, module) in enumerate(layers):
            self.ahead = [later for _, later in layers[i + 1 :]] + ahead
            method = next((method for kinds, method in _METHODS if isinstance(module, kinds)), None)
            if method is None or (self.normalised and not isinstance(module, nn.Linear)):
                raise InputError(
                    f"layer '{name}' ({type(module).__name__}) cannot be evaluated privately here; known are Conv2d, "
                    "ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Linear, Flatten, Dropout, Fire, Branches, and "
                    "NormalisedFeatures before the last Linear"
                )
            if self.value.flat and isinstance(module, _SPATIAL):
                raise InputError(
                    f"layer '{name}' ({type(module).__name__}) follows Flatten, which leaves it no picture"
                )
            method(self, name, module)

    def branches(self, name: str, module: Branches) -> None:
        if all(isinstance(branch, nn.Conv2d) for branch in module):
            return self.convolution(name, *module)
        source, ahead, ends = self.value, self.ahead, []
        for child, part in module.named_children():
            self.value, self.before = source, None
            self.run(leaves(f"{name}.{child}", part), ahead)
            self.narrow(f"{name}.{child}")
            ends.append(self.value)
        finest = max(end.scale for end in ends)
        shifts = tuple(round(math.log2(finest / end.scale)) for end in ends)
        if any(end.scale * 2**shift != finest for end, shift in zip(ends, shifts, strict=True)):
            raise InputError(f"layer '{name}': branches with averages over different counts cannot be joined")
        gain = torch.cat([end.gain * 2**shift for end, shift in zip(ends, shifts, strict=True)])
        sources = tuple(end.number for end in ends)
        images = torch.cat([end.images for end in ends], 1)
        self.append(steps.Concatenate, name, images, gain=gain, scale=finest, sources=sources, shifts=shifts)

    def convolution(self, name: str, *modules: nn.Conv2d) -> None:
        branches = []
        for module in modules:
            if module.groups != 1 or pair(module.dilation) != (1, 1) or module.padding_mode != "zeros":
                raise InputError(f"layer '{name}': a convolution needs groups=1, dilation=1 and padding_mode='zeros'")
            if isinstance(module.padding, str):
                raise InputError(f"layer '{name}': padding='{module.padding}' is not understood; give it as numbers")
            sizes = [pair(v) for v in (module.kernel_size, module.stride, module.padding)]
            branches.append(steps.Branch(module.out_channels, *sizes))
        self._weighted(name, modules, tuple(branches))

    def linear(self, name: str, module: nn.Linear) -> None:
        if not self.value.flat:
            raise InputError(f"layer '{name}' (Linear) needs Flatten before it")
        if self.normalised:
            return self._head(name, module)
        self._weighted(name, (module,), (steps.Branch(module.out_features, (1, 1), (1, 1), (0, 0)),))

    def _weighted(self, name: str, modules, branches) -> None:
        """A step with weights. Where another one reads its result, every channel gets a gain of its own."""
        self.narrow(name)
        x, flat = self.value.images, self.value.flat
        for module in modules:
            self._check(name, module, math.prod(x.shape[1:]) if flat else x.shape[1])
        z = [m(x.flatten(1))[:, :, None, None] if flat else m(x) for m in modules]
        pooled, hidden, room = self._prospects()
        gain_in = self.value.gain if hidden else self._coarser(ACTIVATION_BITS - LAST_BITS)
        gain = gains_of(torch.cat(z, 1), room, pooled)
        scale = 2.0 ** math.floor(math.log2(room if hidden else float(gain.min())))
        gain = gain if hidden else torch.full_like(gain, scale)
        gains = gain.split([len(m.weight) for m in modules])
        parts = [quantise(m, x, gain_in, gain_out) for m, gain_out in zip(modules, gains, strict=True)]
        number = len(self.steps)
        self.matrices[number] = [encode(weight.numpy(), 1) for weight, _ in parts]
        self.biases[number] = encode(torch.cat([bias for _, bias in parts]).numpy(), 1)
        self.append(steps.Convolution, name, torch.cat(z, 1), gain=gain, scale=scale, branches=branches, flat=flat)

    def _coarser(self, bits: int) -> Tensor:
        """Make what comes in ``bits`` coarser, where a step before can; the gains (C,) that it has then."""
        value, last = self.value, self.steps[-1] if self.steps else None
        if isinstance(last, steps.ReLU) and value.number == len(self.steps):
            self.steps[-1] = replace(last, shift=last.shift + bits, scale=last.scale / 2**bits)
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
        return pooled, hidden, 2.0 ** (RING_BITS - MARGIN - (0 if compared else 1))

    def _head(self, name: str, module: nn.Linear) -> None:
        """The linear layer on normalised features, the last step."""
        x, scale = self.value.images, self.value.scale
        self._check(name, module, x.shape[1])
        weight = module.weight.double() - module.weight.double().mean(1, keepdim=True)
        bias = module.bias.double() if module.bias is not None else weight.new_zeros(len(weight))
        norm = float((x.flatten(1) - x.flatten(1).mean(1, keepdim=True)).norm(dim=1).max()) * scale
        inverse_bits = INVERSE_PRECISION + math.ceil(MARGIN + math.log2(max(norm, 1.0)))
        largest = float((weight.norm(dim=1) + bias.abs()).max())  # no logit can be larger
        weight_bits = 62 - inverse_bits - math.ceil(math.log2(max(largest, 2.0**-8)))
        scale, number = 2.0 ** (weight_bits + inverse_bits), len(self.steps)
        self.matrices[number] = [encode(weight.numpy(), 2.0**weight_bits, 64)]
        self.biases[number] = encode(bias.numpy(), scale, 64)
        images, gain = x.new_zeros(len(x), len(weight), 1, 1), torch.full((len(weight),), scale)
        bits = {"weight_bits": weight_bits, "inverse_bits": inverse_bits}
        self.append(steps.NormalisedLinear, name, images, gain=gain, scale=scale, **bits)

    def relu(self, name: str, module: nn.ReLU) -> None:
        self.widen(name)
        before, after = self.value, _Value(0, self.value.images.relu(), self.value.gain, self.value.scale)
        shift = max(0, after.bits - ACTIVATION_BITS)
        self.append(
            steps.ReLU, name, after.images, gain=before.gain / 2**shift, scale=before.scale / 2**shift, shift=shift
        )
        self.before = before

    def max_pool(self, name: str, module: nn.MaxPool2d) -> None:
        kernel, stride = pair(module.kernel_size), pair(module.stride)
        if pair(module.padding) != (0, 0) or pair(module.dilation) != (1, 1) or module.return_indices:
            raise InputError(f"layer '{name}': MaxPool2d needs padding=0, dilation=1 and no return_indices")
        if self.before is not None:
            relu = self.steps.pop()
            self.value, self.before = self.before, None
            self.max_pool(name, module)
            return self.relu(relu.name, nn.ReLU())
        self.widen(name)
        sizes = zip(self.value.images.shape[2:], kernel, stride, strict=True)
        if min(pooled_length(n, k, s, module.ceil_mode) for n, k, s in sizes) < 1:
            raise InputError(f"layer '{name}': its windows {kernel} do not fit what arrives; use larger images")
        images = F.max_pool2d(self.value.images, kernel, stride, ceil_mode=module.ceil_mode)
        self.append(steps.MaxPool, name, images, kernel=kernel, stride=stride, ceil=module.ceil_mode)

    def average_pool(self, name: str, module) -> None:
        self.narrow(name)
        x = self.value.images
        if isinstance(module, nn.AdaptiveAvgPool2d):
            wanted = [n or own for n, own in zip(pair(module.output_size), x.shape[2:], strict=True)]
            rows, columns = (adaptive_windows(n, m) for n, m in zip(x.shape[2:], wanted, strict=True))
        else:
            if pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override:
                raise InputError(f"layer '{name}': AvgPool2d needs padding=0, ceil_mode=False and no divisor_override")
            sizes = zip(x.shape[2:], pair(module.kernel_size), pair(module.stride), strict=True)
            rows, columns = (tuple((i, i + k) for i in range(0, n - k + 1, s)) for n, k, s in sizes)
        common = window_factors(rows, columns)[0]
        if self.value.peak * common > 2.0 ** (RING_BITS - 1 - MARGIN):
            raise InputError(f"layer '{name}': its windows differ too much in size (common multiple {common})")
        images = torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], 2) for a, b in rows], 2)
        self.append(
            steps.AveragePool, name, images, gain=self.value.gain * common, scale=self.value.scale * common,
            rows=rows, columns=columns,
        )  # fmt: skip

    def flatten(self, name: str, module: nn.Flatten) -> None:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise InputError(f"layer '{name}': Flatten must join all dimensions of an image")
        self.value.flat, self.before = True, None

    def normalise(self, name: str, module: NormalisedFeatures) -> None:
        if not self.value.flat or self.value.images.shape[2:] != (1, 1):
            raise InputError(f"layer '{name}' (NormalisedFeatures) needs one value a channel: average pooling, Flatten")
        self.normalised = True

    def dropout(self, name: str, module) -> None:
        """Nothing to do outside training."""

    def narrow(self, name: str) -> None:
        """Truncate a value that takes more bits than an activation should; one bit of tolerance."""
        if (shift := self.value.bits - ACTIVATION_BITS) > 1:
            self._rescale(steps.Truncate, f"{name} (truncation)", -shift)

    def widen(self, name: str) -> None:
        """Multiply by a power of two what is to be compared: comparisons drop 15 bits."""
        if (shift := math.floor(RING_BITS - MARGIN) - self.value.bits) > 1:
            self._rescale(steps.Raise, f"{name} (raise)", shift)

    def _rescale(self, kind, name: str, bits: int) -> None:
        value, factor = self.value, 2.0**bits
        self.append(kind, name, value.images, gain=value.gain * factor, scale=value.scale * factor, shift=abs(bits))

    def append(self, kind, name: str, images: Tensor, *, gain=None, scale=None, sources=None, **fields) -> None:
        """Add a step; its result becomes the current value."""
        gain, scale = self.value.gain if gain is None else gain, self.value.scale if scale is None else scale
        sources = (self.value.number,) if sources is None else sources
        self.steps.append(kind(name, sources, tuple(images.shape[1:]), float(scale), **fields))
        self.value, self.before = _Value(len(self.steps), images, gain, float(scale), self.value.flat), None

    @staticmethod
    def _check(name: str, module, inputs: int) -> None:
        for parameter in (module.weight, module.bias):
            if parameter is not None and not torch.isfinite(parameter).all():
                raise InputError(f"layer '{name}' has weights that are not finite; train or load it again")
        wanted = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
        if wanted != inputs:
            raise InputError(f"layer '{name}' reads {wanted} channels, but {inputs} arrive")


_SPATIAL = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, Branches)
_METHODS = (
    (Branches, _Compiler.branches),
    (nn.Conv2d, _Compiler.convolution),
    (nn.Linear, _Compiler.linear),
    (nn.ReLU, _Compiler.relu),
    (nn.MaxPool2d, _Compiler.max_pool),
    ((nn.AvgPool2d, nn.AdaptiveAvgPool2d), _Compiler.average_pool),
    (nn.Flatten, _Compiler.flatten),
    (nn.Dropout, _Compiler.dropout),
    (NormalisedFeatures, _Compiler.normalise),
)
