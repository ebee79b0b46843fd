"""Convolution of a shared input with the provider's weights: X * W, where X = x_0 + x_1 and W is the provider's own.

Only x_0 * W needs both parties. * is any product that is linear in both factors.

Set-up, once a session:
    1. From the crypto-provider: a mask B of W's shape, known to the provider. The provider sends F = W - B.
Offline, once an image:
    2. From the crypto-provider: a mask A of X's shape, known to the patient, and shares of C = A * B.
    3. The patient computes its share of the result: z_0 = A * F + C_0.
Online:
    4. The patient sends E = x_0 - A.
    5. The provider computes z_1 = (E + x_1) * W + C_1 + bias.

z_0 + z_1 = A * (W - B) + A * B + (x_0 - A + x_1) * W = X * W. One convolution is left to do online, one message goes
one way, and the image itself is the case x_0 = X, x_1 = 0.

Why this hides both: the patient sees F, and B is uniform and unknown to it; the provider sees E, and A is uniform,
unknown to it, and used for this image only. C_1 is uniform because C_0 is. B stays for a session: W does not change, so
F is sent once, and no second difference can be compared with it. With one A for two images E - E' would be x_0 - x_0'.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.operation import BufferLayout, Layer, Operation, Own, Party, Shape, Workspace
from dopamine_lib.inference.protocols.sharing import signed

#: The most inputs of one output: sums of products stay exact in the kernels' float64.
MOST_INPUTS = 2**20
#: The most elements of an input that is unfolded.
MOST_UNFOLDED = 2**26


class ConvolutionOperation(Operation):
    """X * W for one layer of a plan."""

    rounds = 1
    messages = ("E = x_0 - A",)

    def __init__(self, layer: "Convolution", input_shape: Shape):
        self.layer, self.input_shape = layer, layer.read_shape(input_shape)
        self.patient = BufferLayout(a=("u4", self.input_shape), z=("u4", layer.shape))
        self.corrections = BufferLayout(c=("u4", layer.shape))
        # one matrix a branch: (channels out, channels in of a group * kernel)
        shapes = [(branch.channels, branch.inputs(self.input_shape[0])) for branch in layer.branches]
        self.weight_masks = BufferLayout(**{f"b{i}": ("u4", shape) for i, shape in enumerate(shapes)})
        self.sent_by_patient = 4 * prod(self.input_shape)

    def convolve(self, x: np.ndarray, weights: list[np.ndarray], space: Workspace, out: np.ndarray) -> np.ndarray:
        """x * W mod 2^32 for x (C, H, W) and the branches' matrices; into ``out``, of the layer's shape."""
        at = 0
        for branch, matrix in zip(self.layer.branches, weights, strict=True):
            part = out[at : at + branch.channels].reshape(branch.channels, -1)
            if branch.groups == len(x) == branch.channels:
                by_channel(matrix, windows(x, branch, space), part)
            else:
                columns = unfold(x, branch, space).reshape(branch.groups, matrix.shape[1], -1)
                rows = (whole.reshape(branch.groups, -1, whole.shape[1]) for whole in (matrix, part))
                for group, z, seen in zip(*rows, columns, strict=True):
                    kernels.active().multiply(group, seen, z)
            at += branch.channels
        return out

    def deal(self, patient: Own, provider: Own, corrections: Own, weight_masks: list, space: Workspace) -> None:
        """Step 2: C_1 = A * B - C_0."""
        self.convolve(patient.a, weight_masks, space, corrections.c)
        corrections.c -= patient.z

    def prepare(self, own: Own, masked_weights: list[np.ndarray], space: Workspace) -> None:
        """Step 3: the patient's share, in place of C_0."""
        own.z += self.convolve(own.a, masked_weights, space, space.array("product", self.layer.shape))

    def run_patient(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """Step 4."""
        e = np.subtract(x.reshape(self.input_shape), own.a, out=party.workspace.array("e", self.input_shape))
        party.channel.send(tag, e)
        return own.z

    def run_provider(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """Step 5."""
        e = party.workspace.array("e", self.input_shape)
        party.channel.receive(tag, e)
        e += x.reshape(self.input_shape)
        z = self.convolve(e, own.weights, party.workspace, np.empty(self.layer.shape, np.uint32))
        z += own.c
        z += own.bias[:, None, None]
        return z


@dataclass(frozen=True)
class Branch:
    """One convolution: output channels, (rows, columns) of kernel, stride and zero padding, and groups of channels."""

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int = 1

    def inputs(self, channels: int) -> int:
        """How many numbers one output is a sum over, where ``channels`` come in."""
        return channels // self.groups * prod(self.kernel)

    def output_size(self, shape: Shape) -> tuple[int, int]:
        """(H, W) of the output for an input (C, H, W)."""
        sizes = zip(shape[1:], self.kernel, self.stride, self.padding, strict=True)
        return tuple((n + 2 * p - k) // s + 1 if n + 2 * p >= k else 0 for n, k, s, p in sizes)


@dataclass(frozen=True)
class Convolution(Layer):
    """Convolutions of one input, their outputs joined by channel; a linear layer reads (C, H, W) as (C H W, 1, 1)."""

    branches: tuple[Branch, ...]
    flat: bool

    torch_layers = ("Conv2d", "Linear")

    @classmethod
    def from_record(cls, record: dict) -> "Convolution":
        return cls(**record | {"branches": tuple(Branch(**branch) for branch in record["branches"])})

    @classmethod
    def from_torch(cls, compiler: Any, name: str, *modules: Any) -> None:
        """Modules that read one input become one layer; a linear one is alone."""
        branches = []
        for module in modules:
            if hasattr(module, "out_features"):
                if not compiler.value.flat:
                    raise InputError(f"layer '{name}' (Linear) needs Flatten before it")
                branches.append(Branch(module.out_features, (1, 1), (1, 1), (0, 0)))
                continue
            compiler.check_picture(name, module)
            if pair(module.dilation) != (1, 1) or module.padding_mode != "zeros":
                raise InputError(f"layer '{name}': a convolution needs dilation=1 and padding_mode='zeros'")
            if isinstance(module.padding, str):
                raise InputError(f"layer '{name}': padding='{module.padding}' is not understood; give it as numbers")
            sizes = [pair(option) for option in (module.kernel_size, module.stride, module.padding)]
            branches.append(Branch(module.out_channels, *sizes, module.groups))
        compiler.weigh(cls, name, modules, tuple(branches))

    def read_shape(self, shape: Shape) -> Shape:
        """The input's shape as the convolution reads it."""
        return (prod(shape), 1, 1) if self.flat else tuple(shape)

    def output_shape(self, *inputs: Shape) -> Shape:
        read = self.read_shape(inputs[0])
        for branch in self.branches:
            options = zip(branch.kernel, branch.stride, branch.padding, strict=True)
            fits = all(0 <= p < k and s >= 1 for k, s, p in options) and min(branch.channels, branch.groups) >= 1
            if not fits or read[0] % branch.groups or branch.channels % branch.groups:
                raise InputError(
                    f"layer '{self.name}': {branch} is out of bounds; padding must be below the kernel's size, and "
                    "groups must divide the channels"
                )
            if branch.inputs(read[0]) > MOST_INPUTS or self.unfolded(branch, read) > MOST_UNFOLDED:
                raise InputError(
                    f"layer '{self.name}': {branch} sums {branch.inputs(read[0])} numbers and unfolds "
                    f"{self.unfolded(branch, read)}; at most {MOST_INPUTS} and {MOST_UNFOLDED} are taken"
                )
        sizes = {branch.output_size(read) for branch in self.branches}
        if len(sizes) != 1:
            raise InputError(f"layer '{self.name}': its convolutions give the sizes {sorted(sizes)}; they must agree")
        return (sum(branch.channels for branch in self.branches), *sizes.pop())

    def unfolded(self, branch: Branch, read: Shape) -> int:
        """Elements of a branch's input with its padding, or of the matrix that it becomes, whichever is more."""
        padded = prod(n + 2 * p for n, p in zip(read[1:], branch.padding, strict=True))
        return read[0] * max(padded, prod(branch.kernel) * prod(branch.output_size(read)))

    def work(self, input_shape: Shape) -> int:
        read, positions = self.read_shape(input_shape), prod(self.shape[1:])
        products = positions * sum(branch.channels * branch.inputs(read[0]) for branch in self.branches)
        return products + sum(self.unfolded(branch, read) for branch in self.branches)

    def operations(self, input_shape: Shape) -> list[Operation]:
        return [ConvolutionOperation(self, input_shape)]

    def plain(self, inputs: list[np.ndarray], weights: tuple[list[np.ndarray], np.ndarray]) -> np.ndarray:
        matrices, bias = weights
        x, space = inputs[0].reshape(self.read_shape(inputs[0].shape)), Workspace()
        parts = []
        for matrix, branch in zip(matrices, self.branches, strict=True):
            rows = signed(matrix).astype(np.float64).reshape(branch.groups, -1, matrix.shape[1])
            parts.append(rows @ unfold(x, branch, space).reshape(branch.groups, matrix.shape[1], -1))
        parts = [part.reshape(-1, part.shape[2]) for part in parts]
        return (np.concatenate(parts) + signed(bias).astype(np.float64)[:, None]).reshape(self.shape)


def unfold(x: np.ndarray, branch: Branch, space: Workspace) -> np.ndarray:
    """x (C, H, W) as a matrix (C * kernel, positions), so that a convolution is a product of matrices."""
    if (branch.kernel, branch.stride, branch.padding) == ((1, 1), (1, 1), (0, 0)):
        return x.reshape(len(x), -1)
    seen = windows(x, branch, space).transpose(0, 3, 4, 1, 2)
    out = space.array("unfolded", seen.shape, x.dtype)
    out[:] = seen
    return out.reshape(prod(seen.shape[:3]), -1)


def windows(x: np.ndarray, branch: Branch, space: Workspace) -> np.ndarray:
    """What each output of a convolution of x (C, H, W) sees, a view (C, H', W', rows, columns)."""
    (down, right), (top, left) = branch.stride, branch.padding
    if top or left:
        padded = space.array("padded", (len(x), x.shape[1] + 2 * top, x.shape[2] + 2 * left), x.dtype)
        padded[:] = 0
        padded[:, top : top + x.shape[1], left : left + x.shape[2]] = x
        x = padded
    return np.lib.stride_tricks.sliding_window_view(x, branch.kernel, axis=(1, 2))[:, ::down, ::right]


def by_channel(w: np.ndarray, seen: np.ndarray, out: np.ndarray) -> None:
    """A convolution of each channel with a kernel of its own: w (C, kernel), ``windows``, out (C, positions)."""
    out[:], term = 0, np.empty(seen.shape[:3], out.dtype)
    for k, place in enumerate(np.ndindex(seen.shape[3:])):
        np.multiply(seen[:, :, :, *place], w[:, k, None, None], out=term)
        out += term.reshape(out.shape)


def pair(option: int | tuple[int, int]) -> tuple[int, int]:
    """An option of a layer of torch, given as one number or two, as (rows, columns)."""
    return (option, option) if isinstance(option, int) else tuple(option)
