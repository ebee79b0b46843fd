"""The gradient of every sample at one layer: its norm, and what sums of clipped gradients need.

The gradient of a sample at a linear map y = W x + b, applied at P positions, is the matrix G^T X, where X (P, D) are
the map's inputs and G (P, O) the derivatives of the loss with respect to its outputs. A convolution is such a map of
its patches, an embedding one of rows that are 0 but for a single 1. A linear map's norm is computed in the cheaper of
two ways:

Gram          |G^T X|^2 = sum of (X X^T) * (G G^T), two (P, P) matrices; the gradient itself is never made
instantiated  make G^T X for each sample, and use it twice: for the norm and for the sum

Every other layer's gradients are instantiated: of normalisations and grouped convolutions directly, of anything else
by ``torch.func``, as the derivative of that layer alone, for all samples at once where vmap can.

The bound on a patient is a bound on these sums as they are rounded. An instantiated gradient is the very vector that
is added, whatever was rounded before. With Gram matrices the norm is taken in float64, and what float32 can add to a
sum of P products, P + 1 roundings of the products' own norm A = sum of |x_p| |g_p|, is added to it. Where A is many
times the norm, because positions cancel, this would clip far too much: such a layer is instantiated, in float64.
In a sum over n samples there are n P products, whose n P + 3 roundings are of the sum of the samples' f A. Where that
may be more than ``float_sums`` has room for, they are added in float64.
"""

import contextlib
import itertools
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

#: Multiplications that cost as much as writing one number and reading it twice (measured: 10 to 30).
MEMORY = 16
#: Numbers that fit into a core's cache.
CACHED = 2**18
#: The same on a GPU, where launching a kernel costs more than memory does.
CACHED_GPU = 2**27
#: A convolution of as large a kernel, with at most so many outputs, spends more on copying patches than on multiplying.
LARGE_KERNEL, FEW_OUTPUTS = 25, 32
#: Channels from which on oneDNN prefers a channel's positions together.
WIDE = 16
#: A / |G^T X| up to which Gram matrices do: about 2 in training.
MOST_CANCELLED = 8
#: The longest input for which they do: with it every number of a clipped gradient that counts has all its digits.
LONGEST_INPUT = 2.0**100
#: Squares of which float32 gives the sum to a millionth: 80 in each lane of a vector register.
MOST_SQUARES = 640


def accelerated(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU: there the processor must not ask what is in it, for it would wait for the answer.

    >>> accelerated(torch.zeros(3))
    False
    """
    return tensor.device.type != "cpu"


def cheaper_by_gram(positions: int, inputs: int, outputs: int) -> bool:
    """Whether a layer's norm costs less by Gram matrices: P^2 (D + O) multiplications against D O numbers kept.

    >>> cheaper_by_gram(positions=1, inputs=512, outputs=5), cheaper_by_gram(positions=784, inputs=27, outputs=64)
    (True, False)
    """
    return positions**2 * (inputs + outputs) <= MEMORY * inputs * outputs


def matrix_norms(matrices: Tensor) -> Tensor:
    """Norms float64 (B,) of matrices (B, O, m), exact to a millionth whatever their size.

    >>> matrix_norms(torch.full((1, 100, 100), 1e30))
    tensor([1.0000e+32], dtype=torch.float64)
    """
    if not accelerated(matrices):  # at the price of float32
        rows = matrices.flatten(1)
        whole = rows.shape[1] - rows.shape[1] % MOST_SQUARES
        parts = [torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, MOST_SQUARES)), dim=2)] if whole else []
        parts.append(torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True))
        norms = torch.linalg.vector_norm(torch.cat(parts, dim=1).double(), dim=1)
        if norms.isfinite().all():
            return norms
    return torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64)  # where squares overflowed, too


def weighted_sum(factors: Tensor, rows: Tensor) -> Tensor:
    """The sum (m,) of ``factors`` (B,) times ``rows`` (B, m), in the factors' type: in pieces, to stay in the cache.

    >>> weighted_sum(torch.tensor([1.0, 2.0]).double(), torch.ones(2, 3))
    tensor([3., 3., 3.], dtype=torch.float64)
    """
    if factors.dtype == rows.dtype:
        return factors @ rows
    pieces = rows.split(max(1, CACHED // 4 // max(1, len(rows))), dim=1)
    return torch.cat([factors @ piece.to(factors.dtype) for piece in pieces])


def padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs (B, C, H, W) with the padding of this convolution around them, however it was given.

    >>> padded(nn.Conv2d(1, 1, 3, padding="same"), torch.zeros(1, 1, 4, 4)).shape
    torch.Size([1, 1, 6, 6])
    """
    pads = conv._reversed_padding_repeated_twice  # (left, right, top, bottom)
    return F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode) if any(pads) else x


@dataclass
class Kept:
    """What is kept of a layer: X as ``inputs`` (B, P, D) and G as ``outputs`` (B, P, O), or ``gradients`` (B, O D).

    squares      float64 (B,), the gradients' squared norms; not finite where a gradient is not, which is then kept as
                 zeros
    uncancelled  A, float64 (B,), where the products of X and G are left to the sum
    """

    squares: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    uncancelled: Tensor | None = None
    gradients: Tensor | None = None


class Layer:
    """A module with parameters, and their place in the flat vector: any module that maps one tensor to one tensor.

    start, end  its parameters, those of modules in it included, in the flat vector
    batched     whether vmap can do its samples at once, or they are differentiated one by one; None until it is tried
    """

    def __init__(self, name: str, module: nn.Module, start: int):
        self.name, self.module, self.start = name, module, start
        self.end = start + sum(parameter.numel() for parameter in module.parameters())
        self.batched: bool | None = None

    def keep(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor]) -> Kept:
        """Squared norms, and what the sums need.

        x (B, ...)  the layer's inputs;  g (B, ...)  the derivatives of the loss at its outputs
        parameters  of the layer, by name as in the module
        """
        return self._instantiated(self.gradients(x, g, parameters), g.dtype)

    def add(self, total: Tensor, kept: Kept, factors: Tensor, rows: slice) -> None:
        """Add the clipped gradients of the samples ``rows`` to ``total`` (d,), computed in the type of ``factors``."""
        total[self.start : self.end] += weighted_sum(factors[rows], kept.gradients[rows])

    def in_order(self, gradients: Tensor) -> Tensor:
        """Instantiated gradients (B, O m), or sums of such, in the order of the flat vector: (B, n)."""
        return gradients

    def gradients(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Each sample's gradient (B, n), in the order of the flat vector: the derivative of this layer alone."""

        def of_one(x: Tensor, g: Tensor) -> Tensor:
            _, pull_back = vjp(lambda own: functional_call(self.module, own, (x[None],)), parameters)
            return torch.cat([gradient.flatten() for gradient in pull_back(g[None])[0].values()])

        if self.batched is not False:
            refused = contextlib.nullcontext() if self.batched else contextlib.suppress(RuntimeError, ValueError)
            with refused, warnings.catch_warnings(), torch.enable_grad():  # an LSTM keeps less without
                warnings.simplefilter("ignore")  # vmap says which operations it does sample by sample
                gradients = vmap(of_one)(x, g)
                self.batched = True
                return gradients
        self.batched = False
        return torch.stack(list(map(of_one, x, g)))

    @staticmethod
    def _instantiated(gradients: Tensor, dtype: torch.dtype) -> Kept:
        """Gradients (B, O, m) or (B, m) as they are added: rounded, and zero where a sample's are not finite."""
        gradients = gradients.to(dtype)
        squares = matrix_norms(gradients if gradients.dim() == 3 else gradients[:, None]).square()
        if accelerated(squares) or not squares.isfinite().all():
            finite = squares.isfinite().view(-1, *[1] * (gradients.dim() - 1))
            gradients = torch.where(finite, gradients, 0)
        return Kept(squares, gradients=gradients.flatten(1))


class Normalisation(Layer):
    """GroupNorm, LayerNorm or RMSNorm: y = w * z + b, so that a sample's gradient is the sum of g * z, and of g."""

    def gradients(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """As in ``Layer``."""
        norm = self.module
        if isinstance(norm, nn.GroupNorm):
            z = F.group_norm(x, norm.num_groups, eps=norm.eps)
            parts = [part.reshape(*part.shape[:2], -1).sum(2) for part in (g * z, g)]
        else:
            plain = F.layer_norm if isinstance(norm, nn.LayerNorm) else F.rms_norm
            z = plain(x, norm.normalized_shape, eps=norm.eps)
            parts = [part.reshape(len(g), -1, norm.weight.numel()).sum(1) for part in (g * z, g)]
        return torch.cat(parts[: len(parameters)], dim=1)


class Embedding(Layer):
    """A table of rows: a sample's gradient is g summed over the positions that looked up the same row."""

    def keep(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor]) -> Kept:
        """As in ``Layer``; each sum stands at the first of its positions."""
        x, g = x.reshape(len(x), -1), g.reshape(len(g), -1, g.shape[-1])
        same = x[:, :, None] == x[:, None, :]
        first = ~same.tril(-1).any(2)
        if self.module.padding_idx is not None:
            first &= x != self.module.padding_idx
        sums = (same & first[:, :, None]).double() @ g.double()
        kept = self._instantiated(sums, g.dtype)
        return Kept(kept.squares, inputs=x, outputs=kept.gradients.view(g.shape))

    def add(self, total: Tensor, kept: Kept, factors: Tensor, rows: slice) -> None:
        """As in ``Layer``."""
        scaled = (kept.outputs[rows].to(total.dtype) * factors[rows, None, None]).flatten(0, 1)
        total[self.start : self.end].view(self.module.weight.shape).index_add_(0, kept.inputs[rows].flatten(), scaled)


class Convolution(Layer):
    """A Conv2d that is done without patches: with groups, depthwise, or with a large kernel and few outputs."""

    def gradients(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """As in ``Layer``."""
        conv, channels = self.module, x.shape[1]
        if conv.groups == channels == conv.out_channels and (max(conv.kernel_size) > 3 or min(g.shape[2:]) < 3):
            weight = self._by_position(padded(conv, x), g)  # kernels of libraries are slow there
        else:
            weight = self._samples_as_channels(x, g)
        return torch.cat([weight, g.sum((2, 3))], dim=1) if conv.bias is not None else weight

    def _samples_as_channels(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradients (B, n) as one image's, whose every sample has channels and weights of its own."""
        conv, samples = self.module, len(x)
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        x, padding = (x, conv.padding) if plain else (padded(conv, x), 0)
        if x.shape[1] // conv.groups < WIDE:
            x, g = (t.permute(2, 3, 0, 1).flatten(2)[None].permute(0, 3, 1, 2) for t in (x, g))
        else:
            x, g = (t.flatten(0, 1)[None] for t in (x, g))
        shape = (samples * conv.out_channels, *conv.weight.shape[1:])
        own = {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": samples * conv.groups}
        return nn.grad.conv2d_weight(x, shape, g, **own).reshape(samples, -1)

    def _by_position(self, x: Tensor, g: Tensor) -> Tensor:
        """A depthwise convolution's gradients (B, C kh kw): at each position of the output, g times the patch there."""
        (high, wide), step, gap = self.module.kernel_size, self.module.stride, self.module.dilation
        x, g = x.permute(0, 2, 3, 1), g.permute(0, 2, 3, 1)
        gradients = g.new_zeros(len(g), high, wide, g.shape[3])
        for i, j in itertools.product(range(g.shape[1]), range(g.shape[2])):
            rows, columns = (
                slice(at * step[axis], at * step[axis] + (size - 1) * gap[axis] + 1, gap[axis])
                for axis, (at, size) in enumerate([(i, high), (j, wide)])
            )
            gradients.addcmul_(x[:, rows, columns], g[:, i : i + 1, j : j + 1])
        return gradients.permute(0, 3, 1, 2).flatten(1)


class LinearMap(Layer):
    """A Linear, or a Conv2d without groups."""

    def __init__(self, name: str, module: nn.Module, start: int):
        super().__init__(name, module, start)
        self.weights = module.weight.numel()
        self.out = module.weight.shape[0]
        self.depth = self.weights // self.out
        self.kernel = module.weight.shape[2:]
        self.pointwise = self.kernel.numel() == 1  # Linear and 1x1: the input at a position is its patch

    def keep(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor]) -> Kept:
        """As in ``Layer``."""
        outputs = g.permute(0, 2, 3, 1).flatten(1, 2) if self.kernel else g.reshape(len(g), -1, self.out)
        inputs = self._windows(x) if self.kernel else x.reshape(len(x), -1, self.depth)
        if self.pointwise:  # a view: the images are in channels_last memory
            inputs = inputs.reshape(len(x), -1, self.depth)
        if not accelerated(x) and cheaper_by_gram(outputs.shape[1], self.depth, self.out):
            kept = self._by_gram(inputs if self.pointwise else self._in_weight_order(inputs), outputs)
            if kept is not None:
                return kept
            inputs, outputs = inputs.double(), outputs.double()
        return self._instantiated(self._instantiate(inputs, outputs), x.dtype)

    def _by_gram(self, inputs: Tensor, outputs: Tensor) -> Kept | None:
        """What to keep without instantiating; None where that is not exact enough for some sample, or not finite."""
        x, g = inputs.double(), outputs.double()
        products, derivatives = torch.bmm(x, x.mT), torch.bmm(g, g.mT)
        if self.module.bias is not None:
            products += 1  # a bias is the weight of one more input, which is 1 everywhere
        longest = products.diagonal(dim1=1, dim2=2).amax()
        products *= derivatives
        uncancelled = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)  # A
        norms = products.flatten(1).sum(1).clamp_min(0).sqrt()
        cancelled = uncancelled > MOST_CANCELLED * norms
        if not (longest <= LONGEST_INPUT**2 and norms.isfinite().all()) or cancelled.any():
            return None
        rounding = (x.shape[1] + 1) * torch.finfo(inputs.dtype).eps / 2 * uncancelled
        return Kept((norms + rounding).square(), inputs=inputs, outputs=outputs, uncancelled=uncancelled)

    def add(self, total: Tensor, kept: Kept, factors: Tensor, rows: slice) -> None:
        """As in ``Layer``."""
        weight, bias = total[self.start : self.start + self.weights], total[self.start + self.weights : self.end]
        if kept.gradients is None:
            inputs, outputs = (part[rows].to(factors.dtype) for part in (kept.inputs, kept.outputs))
            scaled = (outputs * factors[rows, None, None]).flatten(0, 1)
            if total.dtype == scaled.dtype:
                weight.view(self.out, -1).addmm_(scaled.T, inputs.flatten(0, 1))
            else:
                weight.view(self.out, -1).add_(scaled.T @ inputs.flatten(0, 1))
            bias += scaled.sum(0)[: len(bias)]
        else:
            own = weighted_sum(factors[rows], kept.gradients[rows]).view(self.out, -1)
            bias += own[:, self.depth :].flatten()
            own = own[:, : self.depth]
            if self.kernel:  # from (O, kh, kw, C), the order of the patches, to (O, C, kh, kw)
                own = own.unflatten(1, (*self.kernel, -1)).permute(0, 3, 1, 2)
            weight.view(self.module.weight.shape).add_(own)

    def in_order(self, gradients: Tensor) -> Tensor:
        """As in ``Layer``: weights from (O, kh, kw, C), the order of the patches, to (O, C, kh, kw), then biases."""
        own = gradients.view(len(gradients), self.out, -1)
        weight = own[:, :, : self.depth]
        if self.kernel:
            weight = weight.unflatten(2, (*self.kernel, -1)).permute(0, 1, 4, 2, 3)
        return torch.cat([weight.flatten(1), own[:, :, self.depth :].flatten(1)], dim=1)

    def _windows(self, x: Tensor) -> Tensor:
        """A convolution's patch at each output position: a view (B, H', W', kh, kw, C) of the input (B, C, H, W)."""
        conv = self.module
        x = padded(conv, x).permute(0, 2, 3, 1)
        for axis, (size, step, gap) in enumerate(zip(self.kernel, conv.stride, conv.dilation, strict=True), start=1):
            x = x.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        return x.permute(0, 1, 2, 4, 5, 3)

    def _in_weight_order(self, windows: Tensor) -> Tensor:
        """Windows (B, H', W', kh, kw, C) as patches (B, P, C kh kw), one kernel position at a time: long copies."""
        high, wide = self.kernel
        patches = windows.new_empty(*windows.shape[:3], windows.shape[5], high, wide)
        for i, j in itertools.product(range(high), range(wide)):
            patches[..., i, j] = windows[..., i, j, :]
        return patches.view(len(windows), -1, self.depth)

    def _instantiate(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Each sample's gradient (B, O, D), or (B, O, D + 1) where the bias is one more input, 1 everywhere.

        Patches are made for a few samples at a time, so that they fit into the cache.
        """
        samples, positions = outputs.shape[:2]
        one = int(self.module.bias is not None)
        if self.pointwise:
            gradients = torch.bmm(outputs.mT, inputs)
            sums = (outputs.new_ones(positions) @ outputs)[..., None]
            return torch.cat([gradients, sums], dim=2) if one else gradients
        gradients = outputs.new_empty(samples, self.out, self.depth + one)
        fitting = (CACHED_GPU if accelerated(outputs) else CACHED) // (positions * self.depth)
        block = max(1, min(samples, fitting))
        space = outputs.new_ones(block, positions, self.depth + one)
        patches = space[..., : self.depth].view(block, *inputs.shape[1:])
        for first in range(0, samples, block):
            part = slice(first, first + block)
            count = len(inputs[part])
            patches[:count] = inputs[part]
            torch.bmm(outputs[part].mT, space[:count], out=gradients[part])
        return gradients


#: What is differentiated by formulas of its own. Everything else is a ``Layer``.
KINDS = {
    nn.Linear: LinearMap,
    nn.Conv2d: LinearMap,
    nn.Embedding: Embedding,
    nn.GroupNorm: Normalisation,
    nn.LayerNorm: Normalisation,
    nn.RMSNorm: Normalisation,
}


def layer_for(name: str, module: nn.Module, start: int) -> Layer:
    """The module, called ``name`` in its net, as the kind of layer that suits it; ``start`` as in ``Layer``.

    >>> type(layer_for("first", nn.Conv2d(4, 4, 3, groups=2), 0)).__name__
    'Convolution'
    """
    kind = KINDS.get(type(module), Layer)
    if not {key for key, _ in module.named_parameters()} <= {"weight", "bias"}:  # more was put into it
        kind = Layer
    if kind is Embedding and (module.max_norm is not None or module.scale_grad_by_freq):
        kind = Layer
    if kind is LinearMap and isinstance(module, nn.Conv2d):
        few = module.weight[0, 0].numel() >= LARGE_KERNEL and module.out_channels <= FEW_OUTPUTS
        kind = Convolution if few or module.groups > 1 else LinearMap
    return kind(name, module, start)
