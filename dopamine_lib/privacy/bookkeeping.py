"""Sums of clipped gradients at nearly the price of one ordinary gradient: book-keeping (Bu et al., 2023).

The gradient of a sample at a linear map y = W x + b, applied at P positions, is the matrix G^T X, where X (P, D) are
the map's inputs and G (P, O) the derivatives of the loss with respect to its outputs. A convolution is such a map of
its patches. One forward and one backward pass give X and G of every layer and every sample; the gradients of the
weights, a third of an ordinary step, are left out. Then each layer's norm is computed in the cheaper of two ways:

Gram          |G^T X|^2 = sum of (X X^T) * (G G^T), two (P, P) matrices; the gradient itself is never made
instantiated  make G^T X for each sample, and use it twice: for the norm and for the sum

Once the factors f of all samples are known, a group's sum is (f G)^T X over its samples and positions at once, or f
times the instantiated gradients. Nothing is differentiated a second time.

The bound on a patient is a bound on these sums as they are rounded. An instantiated gradient is the very vector that
is added, whatever was rounded before. With Gram matrices the norm is taken in float64, and what float32 can add to a
sum of P products, P + 1 roundings of the products' own norm A = sum of |x_p| |g_p|, is added to it. Where A is many
times the norm, because positions cancel, this would clip far too much: such a layer is instantiated, in float64.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dopamine_lib.errors import InputError

#: Multiplications that cost as much as writing one number and reading it twice (measured: 10 to 30).
MEMORY = 16
#: Numbers that fit into a core's cache.
CACHED = 2**18
#: The same on a GPU, where launching a kernel costs more than memory does.
CACHED_GPU = 2**24
#: A / |G^T X| up to which Gram matrices do: about 2 in training.
MOST_CANCELLED = 8
#: The longest input for which they do: with it every number of a clipped gradient that counts has all its digits.
LONGEST_INPUT = 2.0**100
#: Squares of which float32 gives the sum to a millionth: 80 in each lane of a vector register.
MOST_SQUARES = 640


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
    if matrices.shape[2] <= MOST_SQUARES:  # at the price of float32
        norms = torch.linalg.vector_norm(torch.linalg.vector_norm(matrices, dim=2).double(), dim=1)
        if norms.isfinite().all():
            return norms
    return torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64)  # where squares overflowed, too


class _Anchor(torch.autograd.Function):
    """The identity, in place: puts a first layer's output into the graph although nothing before it is in there."""

    @staticmethod
    def forward(ctx, x, anchor):
        ctx.mark_dirty(x)
        ctx.save_for_backward(anchor)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return None, torch.zeros_like(ctx.saved_tensors[0])


@dataclass
class _Kept:
    """What is kept of a layer: X as ``inputs`` (B, P, D) and G as ``outputs`` (B, P, O), or ``gradients`` (B, O D).

    squares  float64 (B,), the gradients' squared norms; not finite where a gradient is not, which is then kept as zeros
    """

    squares: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    gradients: Tensor | None = None


class _Layer:
    """A Conv2d or Linear, and the place of its parameters in the flat vector."""

    def __init__(self, name: str, module: nn.Module, start: int):
        self.name, self.module, self.start = name, module, start
        self.weights = module.weight.numel()
        self.out = module.weight.shape[0]
        self.depth = self.weights // self.out
        self.end = start + self.weights + (self.out if module.bias is not None else 0)
        self.kernel = module.weight.shape[2:]
        self.pointwise = self.kernel.numel() == 1  # Linear and 1x1: the input at a position is its patch

    def keep(self, x: Tensor, g: Tensor) -> _Kept:
        """Squared norms, and what the sums need, from the layer's inputs and the derivatives at its outputs."""
        outputs = g.permute(0, 2, 3, 1).flatten(1, 2) if self.kernel else g.reshape(len(g), -1, self.out)
        inputs = self._windows(x) if self.kernel else x.reshape(len(x), -1, self.depth)
        if self.pointwise:  # a view: the images are in channels_last memory
            inputs = inputs.reshape(len(x), -1, self.depth)
        if cheaper_by_gram(outputs.shape[1], self.depth, self.out):
            kept = self._by_gram(inputs if self.pointwise else self._in_weight_order(inputs), outputs)
            if kept is not None:
                return kept
            inputs, outputs = inputs.double(), outputs.double()
        gradients = self._instantiate(inputs, outputs).to(x.dtype)
        squares = matrix_norms(gradients).square()
        if not squares.isfinite().all():
            gradients[~squares.isfinite()] = 0
        return _Kept(squares, gradients=gradients.flatten(1))

    def _by_gram(self, inputs: Tensor, outputs: Tensor) -> _Kept | None:
        """What to keep without instantiating; None where that is not exact enough for some sample, or not finite."""
        x, g = inputs.double(), outputs.double()
        products, derivatives = torch.bmm(x, x.mT), torch.bmm(g, g.mT)
        if self.module.bias is not None:
            products += 1  # a bias is the weight of one more input, which is 1 everywhere
        longest = products.diagonal(dim1=1, dim2=2).amax()
        products *= derivatives
        uncancelled = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)  # A
        norms = products.flatten(1).sum(1).clamp_min(0).sqrt()
        if not (longest <= LONGEST_INPUT**2 and (uncancelled <= MOST_CANCELLED * norms).all()):
            return None
        rounding = (x.shape[1] + 1) * torch.finfo(inputs.dtype).eps / 2 * uncancelled
        return _Kept((norms + rounding).square(), inputs=inputs, outputs=outputs)

    def add(self, total: Tensor, kept: _Kept, factors: Tensor, rows: slice) -> None:
        """Add the clipped gradients of the samples ``rows`` to ``total`` (d,)."""
        weight, bias = total[self.start : self.start + self.weights], total[self.start + self.weights : self.end]
        if kept.gradients is None:
            scaled = (kept.outputs[rows] * factors[rows, None, None]).flatten(0, 1)
            weight.view(self.out, -1).addmm_(scaled.T, kept.inputs[rows].flatten(0, 1))
            bias += scaled.sum(0)[: len(bias)]
        else:
            own = (factors[rows] @ kept.gradients[rows]).view(self.out, -1)
            bias += own[:, self.depth :].flatten()
            own = own[:, : self.depth]
            if self.kernel:  # from (O, kh, kw, C), the order of the patches, to (O, C, kh, kw)
                own = own.unflatten(1, (*self.kernel, -1)).permute(0, 3, 1, 2)
            weight.view(self.module.weight.shape).add_(own)

    def _windows(self, x: Tensor) -> Tensor:
        """A convolution's patch at each output position: a view (B, H', W', kh, kw, C) of the input (B, C, H, W)."""
        conv = self.module
        pads = conv._reversed_padding_repeated_twice  # (left, right, top, bottom), however padding was given
        if any(pads):
            x = F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
        x = x.permute(0, 2, 3, 1)
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
        block = max(1, (CACHED if outputs.device.type == "cpu" else CACHED_GPU) // (positions * self.depth))
        space = outputs.new_ones(block, positions, self.depth + one)
        patches = space[..., : self.depth].view(block, *inputs.shape[1:])
        for first in range(0, samples, block):
            part = slice(first, first + block)
            count = len(inputs[part])
            patches[:count] = inputs[part]
            torch.bmm(outputs[part].mT, space[:count], out=gradients[part])
        return gradients


class Book:
    """One batch after its forward and backward pass: the norm of every sample's gradient, and what the sums need.

    norms  float64 (B,), not finite where a gradient is not
    """

    def __init__(self, kept: list[tuple[_Layer, _Kept]]):
        self._kept = kept
        self.norms = sum(entry.squares for _, entry in kept).sqrt()

    def add_to(self, sums: Tensor, factors: Tensor, group: list[int]) -> None:
        """Add factors[i] times sample i's gradient to row group[i] of ``sums`` (groups, d); ``group`` ascends.

        A sample without a finite norm needs the factor 0, as ``clip_factors`` gives it.
        """
        factors, first = factors.to(sums.dtype), 0
        while first < len(group):
            last = first + group[first:].count(group[first])
            for layer, entry in self._kept:
                layer.add(sums[group[first]], entry, factors, slice(first, last))
            first = last


class BookKeeper:
    """Opens a ``Book`` for any batch of a net made of Conv2d (groups=1), Linear and layers without parameters.

    Raises InputError for any other layer, for parameters used twice, and for a net that does not treat every sample
    alone: no per-sample gradient exists then, and one patient moves all the others'. The last is tried out on noise,
    with the first batch's shape.
    """

    def __init__(self, net: nn.Module):
        self.net, self.layers, self._tried = net, [], False
        start, seen = 0, set()
        for name, module in net.named_modules():
            own = dict(module.named_parameters(recurse=False))
            what = f"layer '{name}' ({type(module).__name__})"
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # in whatever mode, with or without parameters
                raise InputError(
                    f"{what} has statistics of batches; replace it: nn.GroupNorm(…, affine=False) has none"
                )
            if not own:
                continue
            plain = type(module) in (nn.Conv2d, nn.Linear) and own.keys() <= {"weight", "bias"}
            if not plain or getattr(module, "groups", 1) != 1:
                raise InputError(
                    f"{what} has no per-sample gradient here: Conv2d with groups=1, Linear and layers without "
                    "parameters have one; replace it"
                )
            if not seen.isdisjoint(own.values()):
                raise InputError(f"{what} shares parameters with another layer; give each layer its own")
            seen.update(own.values())
            self.layers.append(_Layer(name, module, start))
            start = self.layers[-1].end

    def open(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Book:
        """Forward and backward pass over x (B, ...) and y (B,) at ``parameters``, by name as in the net."""
        if not self._tried:
            self._refuse_mixed_samples(x)
            self._tried = True
        kept: dict[_Layer, _Kept] = {}
        anchor = torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)
        hooks = [layer.module.register_forward_hook(self._hook(layer, anchor, kept)) for layer in self.layers]
        try:
            with torch.enable_grad():
                logits = functional_call(self.net, parameters, (x,))
                torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), anchor)
        finally:
            for hook in hooks:
                hook.remove()
        return Book(list(kept.items()))

    @torch.no_grad()
    def _refuse_mixed_samples(self, like: Tensor) -> None:
        """Raise InputError unless a sample's scores stay what they are beside others: usual, large and NaN.

        At the net's own weights, not at those that a server sent, where a trial that fails would tell of a patient.
        """
        parameters = {name: weight.to(like.device) for name, weight in self.net.named_parameters()}
        draws = torch.Generator().manual_seed(0)
        one, usual, large = torch.randn(3, *like.shape[1:], generator=draws).to(like)
        alone, *beside = (
            functional_call(self.net, parameters, (torch.stack([one, other]),))[0]
            for other in (one, usual, 1e3 * large, one * math.nan)
        )
        for scores in beside:
            if not torch.allclose(scores, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()), equal_nan=True):
                raise InputError(
                    "the net's scores of a sample depend on the others in its batch (or on chance), so that no sample "
                    "has a gradient of its own; take out what averages or normalises over the batch"
                )

    @staticmethod
    def _hook(layer: _Layer, anchor: Tensor, kept: dict) -> Callable:
        used = []

        def forward(module, arguments, output):
            if used:
                raise InputError(f"layer '{layer.name}' is used twice in one pass; give each use a layer of its own")
            used.append(module)
            x = arguments[0].detach()
            version = x._version

            def backward(gradient):
                if x._version != version:
                    raise InputError(
                        f"the input of layer '{layer.name}' is changed in place after its use; change a copy"
                    )
                kept[layer] = layer.keep(x, gradient)

            if not output.requires_grad:
                output = _Anchor.apply(output, anchor)
            output.register_hook(backward)  # before an in-place ReLU, so it sees the derivative at the layer's output
            return output

        return forward
