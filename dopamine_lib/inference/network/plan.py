"""The public plan of a network: what is computed on what, at which scale. It holds no weight and no pixel.

Patient, provider and crypto-provider each hold the same plan; every size of every message follows from it. Values
are numbered: 0 is the image, i + 1 the result of step i. A value with ``scale`` s stands for ring / s.

Public by being in the plan: the architecture, the input's size and normalisation, and each layer's scale. A hidden
layer's scale is a label, since its channels have secret gains (``quantise``); only the last layers' scales, from where
nothing follows to hide a gain in, tell the largest activation on public images to a factor of two.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.pooling import pooled_length
from dopamine_lib.inference.protocols.sharing import encode

#: No step may have more elements than this: a plan arrives over the network.
MOST_ELEMENTS = 2**25
#: Nor may one output depend on more inputs: sums of products stay exact in the kernels' float64.
MOST_INPUTS = 2**20
MOST_STEPS = 2**12


@dataclass(frozen=True)
class Step:
    """One layer: ``sources`` are the numbers of its inputs, ``shape`` (C, H, W) and ``scale`` its output's."""

    name: str
    sources: tuple[int, ...]
    shape: tuple[int, int, int]
    scale: float

    def output_shape(self, *inputs) -> tuple:
        """The output's shape from the inputs' shapes."""
        return inputs[0]


@dataclass(frozen=True)
class Branch:
    """One convolution: output channels, and (rows, columns) of kernel, stride and zero padding."""

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def output_size(self, shape) -> tuple[int, int]:
        """(H, W) of the output for an input (C, H, W)."""
        sizes = zip(shape[1:], self.kernel, self.stride, self.padding, strict=True)
        return tuple((n + 2 * p - k) // s + 1 if n + 2 * p >= k else 0 for n, k, s, p in sizes)


@dataclass(frozen=True)
class Convolution(Step):
    """Convolutions of one input, their outputs joined by channel; a linear layer reads (C, H, W) as (C H W, 1, 1)."""

    branches: tuple[Branch, ...]
    flat: bool

    def read_shape(self, shape) -> tuple[int, int, int]:
        """The input's shape as the convolution reads it."""
        return (math.prod(shape), 1, 1) if self.flat else tuple(shape)

    def output_shape(self, *inputs) -> tuple:
        for branch in self.branches:
            fits = all(
                0 <= p < k and s >= 1 for k, s, p in zip(branch.kernel, branch.stride, branch.padding, strict=True)
            )
            if not fits or self.read_shape(inputs[0])[0] * math.prod(branch.kernel) > MOST_INPUTS:
                raise InputError(
                    f"step '{self.name}': {branch} is out of bounds; padding must be below the kernel's size"
                )
        sizes = {branch.output_size(self.read_shape(inputs[0])) for branch in self.branches}
        if len(sizes) != 1:
            raise InputError(f"step '{self.name}': its convolutions give the sizes {sorted(sizes)}; they must agree")
        return (sum(branch.channels for branch in self.branches), *sizes.pop())


@dataclass(frozen=True)
class ReLU(Step):
    """max(x, 0) >> shift."""

    shift: int


@dataclass(frozen=True)
class Truncate(Step):
    """x >> shift."""

    shift: int


@dataclass(frozen=True)
class Raise(Step):
    """x << shift, by each party on its own."""

    shift: int


@dataclass(frozen=True)
class MaxPool(Step):
    """Maximum over windows of ``kernel`` every ``stride``; ``ceil`` as in torch's ceil_mode."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    ceil: bool

    def output_shape(self, *inputs) -> tuple:
        sizes = zip(inputs[0][1:], self.kernel, self.stride, strict=True)
        return (inputs[0][0], *(pooled_length(n, k, s, self.ceil) for n, k, s in sizes))


@dataclass(frozen=True)
class AveragePool(Step):
    """Average over windows given by (begin, end) of their rows and columns; the division is in the scale."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]

    def output_shape(self, *inputs) -> tuple:
        _, height, width = inputs[0]
        inside = all(0 <= a < b <= n for windows, n in ((self.rows, height), (self.columns, width)) for a, b in windows)
        if not inside:
            raise InputError(f"step '{self.name}': a window does not lie in the input's {height}x{width}")
        return (inputs[0][0], len(self.rows), len(self.columns))


@dataclass(frozen=True)
class Concatenate(Step):
    """Values joined by channel, each first multiplied by 2^shift so that their scales agree."""

    shifts: tuple[int, ...]

    def output_shape(self, *inputs) -> tuple:
        if len({shape[1:] for shape in inputs}) != 1:
            raise InputError(f"step '{self.name}': it joins {list(inputs)}, whose heights and widths differ")
        return (sum(shape[0] for shape in inputs), *inputs[0][1:])


@dataclass(frozen=True)
class NormalisedLinear(Step):
    """W x^ + b in Z_2^64, where x^ is x (C, 1, 1) centred over its channels and divided by its norm.

    weight_bits   scale of W is 2^weight_bits
    inverse_bits  the patient's 1 / norm is rounded to a multiple of 2^-inverse_bits, in units of the ring
    """

    weight_bits: int
    inverse_bits: int

    def output_shape(self, *inputs) -> tuple:
        if inputs[0][1:] != (1, 1):
            raise InputError(f"step '{self.name}': it needs features (C, 1, 1), not {inputs[0]}")
        return self.shape


KINDS = {
    kind.__name__: kind
    for kind in (Convolution, ReLU, Truncate, Raise, MaxPool, AveragePool, Concatenate, NormalisedLinear)
}


@dataclass(frozen=True)
class Plan:
    """A network's steps. ``mean`` and ``std`` normalise a picture's channels; ``scale`` is the image's.

    Raises InputError where a step's shape does not follow from its inputs, or a number is out of bounds.
    """

    shape: tuple[int, int, int]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps: tuple[Step, ...]

    def __post_init__(self):
        if not 0 < len(self.steps) <= MOST_STEPS:
            raise InputError(f"a plan has {len(self.steps)} steps, but must have 1 to {MOST_STEPS}")
        if len(self.shape) != 3 or not len(self.mean) == len(self.std) == self.shape[0]:
            raise InputError(f"the input's shape is {self.shape}; it must be (C, H, W) with a mean and std a channel")
        if not all(math.isfinite(m) and 0 < s < 1e6 for m, s in zip(self.mean, self.std, strict=True)):
            raise InputError("the input's mean and std must be finite and std positive")
        shapes = [self.shape]
        for i, step in enumerate(self.steps):
            if not step.sources or not all(0 <= source <= i for source in step.sources):
                raise InputError(f"step '{step.name}' reads the values {step.sources}; only 0 to {i} exist by then")
            if tuple(step.output_shape(*(shapes[source] for source in step.sources))) != step.shape:
                raise InputError(f"step '{step.name}': its shape {step.shape} does not follow from its inputs")
            shapes.append(step.shape)
        for shape, scale in zip(shapes, [self.scale, *(step.scale for step in self.steps)], strict=True):
            if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > MOST_ELEMENTS:
                raise InputError(f"a value of the shape {shape}: each side must be positive, {MOST_ELEMENTS} in all")
            if not 0 < scale < 2.0**64:
                raise InputError(f"a value's scale is {scale}; it must be positive and below 2^64")
        for step in self.steps:
            shifts = getattr(step, "shifts", (getattr(step, "shift", 0),))
            if not all(0 <= shift <= 30 for shift in shifts):
                raise InputError(f"step '{step.name}' shifts by {shifts}; it must be by 0 to 30 bits")
            if isinstance(step, NormalisedLinear) and not (0 <= step.weight_bits < 63 and 0 <= step.inverse_bits < 63):
                raise InputError(
                    f"step '{step.name}' has {step.weight_bits} and {step.inverse_bits} bits; each must be 0 to 62"
                )

    def input_shape(self, step: Step) -> tuple[int, int, int]:
        """The shape of a step's first input."""
        return self.shape if step.sources[0] == 0 else self.steps[step.sources[0] - 1].shape

    def to_input(self, image: np.ndarray) -> np.ndarray:
        """A picture, uint8 (H, W, C), as the normalised float32 (C, H, W) the network reads.

        Raises InputError for another type or size.
        """
        wanted = (*self.shape[1:], self.shape[0])
        if image.dtype != np.uint8 or image.shape != wanted:
            raise InputError(f"the image is {image.dtype} {image.shape}; this network needs uint8 {wanted}: resize it")
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (image.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std

    def encode(self, x: np.ndarray) -> np.ndarray:
        """A normalised image as ring elements. Raises InputError for another shape and for what no picture gives."""
        if x.shape != self.shape:
            raise InputError(f"the image has the shape {x.shape}; this network needs {self.shape}: resize it")
        mean, std = (np.array(values)[:, None, None] for values in (self.mean, self.std))
        pixels = x * std + mean
        if not ((pixels > -1e-3) & (pixels < 1 + 1e-3)).all():
            raise InputError(
                "a pixel is outside [0, 1] or not a number: normalise a picture by the plan's mean and std"
            )
        return encode(x, self.scale)

    @property
    def classes(self) -> int:
        """Number of logits."""
        return math.prod(self.steps[-1].shape)

    def to_json(self) -> str:
        """The plan as text."""
        steps = [{"kind": type(step).__name__, **asdict(step)} for step in self.steps]
        return json.dumps({**asdict(self), "steps": steps}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that ``to_json`` wrote. Raises InputError for anything else."""
        try:
            fields = _tuples(json.loads(text))
            steps = []
            for record in fields.pop("steps"):
                kind = KINDS[record.pop("kind")]
                if kind is Convolution:
                    record["branches"] = tuple(Branch(**branch) for branch in record["branches"])
                steps.append(kind(**record))
            return cls(**fields, steps=tuple(steps))
        except InputError:
            raise
        except Exception as error:  # whatever is wrong with a text from elsewhere, it is no plan
            raise InputError(f"no plan of a network ({type(error).__name__}): get it from the provider") from None

    def digest(self) -> bytes:
        """32 bytes that two parties compare to know that they hold the same plan."""
        return hashlib.sha256(self.to_json().encode()).digest()


def _tuples(value, name: str = ""):
    """JSON's lists as tuples. Raises InputError for a fraction where only whole numbers belong."""
    if isinstance(value, float) and name not in ("scale", "mean", "std"):
        raise InputError(f"{name} is {value}, but must be a whole number: get the plan from the provider")
    if isinstance(value, list):
        return tuple(_tuples(v, name) for v in value)
    if isinstance(value, dict):
        return {key: _tuples(v, key) for key, v in value.items()}
    return value
