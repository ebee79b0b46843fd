"""A linear map's gradient of every sample: its norm, and what the sums need, in the cheaper of two ways.

The gradient of a sample at a linear map y = W x + b, applied at P positions, is the matrix G^T X, where X (P, D) are
the map's inputs and G (P, O) the derivatives of the loss with respect to its outputs. A convolution is such a map of
its patches.

Gram          |G^T X|^2 = sum of (X X^T) * (G G^T), two (P, P) matrices; the gradient itself is never made
instantiated  make G^T X for each sample, and use it twice: for the norm and for the sum

With Gram matrices the norm is taken in float64, and what float32 can add to a sum of P products, P + 1 roundings of
the products' own norm A = sum of |x_p| |g_p|, is added to it. Where A is many times the norm, because positions cancel,
this would clip far too much: such a layer is instantiated, in float64. In a sum over n samples there are n P products,
whose n P + 3 roundings are of the sum of the samples' f A. Where that may be more than ``float_sums`` has room for,
they are added in float64.
"""

import itertools

import torch
from torch import Tensor, nn

from dopamine_lib.privacy.layer import CACHED, Kept, Layer, accelerated, padded, weighted_sum

#: Multiplications that cost as much as writing one number and reading it twice (measured: 10 to 30).
MEMORY = 16
#: Numbers of patches that are made at once on a GPU, where launching a kernel costs more than memory does.
CACHED_GPU = 2**27
#: A / |G^T X| up to which Gram matrices do: about 2 in training.
MOST_CANCELLED = 8
#: The longest input for which they do: with it every number of a clipped gradient that counts has all its digits.
LONGEST_INPUT = 2.0**100


def cheaper_by_gram(positions: int, inputs: int, outputs: int) -> bool:
    """Whether a layer's norm costs less by Gram matrices: P^2 (D + O) multiplications against D O numbers kept.

    >>> cheaper_by_gram(positions=1, inputs=512, outputs=5), cheaper_by_gram(positions=784, inputs=27, outputs=64)
    (True, False)
    """
    return positions**2 * (inputs + outputs) <= MEMORY * inputs * outputs


class LinearMap(Layer):
    """A Linear, or a Conv2d without groups."""

    def __init__(self, name: str, module: nn.Module, start: int):
        super().__init__(name, module, start)
        self.weights = module.weight.numel()
        self.out = module.weight.shape[0]
        self.depth = self.weights // self.out
        self.kernel = module.weight.shape[2:]
        self.pointwise = self.kernel.numel() == 1  # Linear and 1x1: the input at a position is its patch

    def keep(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor], views: int = 1) -> Kept:
        """As in ``Layer``. A view's positions are further ones of its sample."""
        samples = len(x) // views
        outputs = (g.permute(0, 2, 3, 1) if self.kernel else g).reshape(samples, -1, self.out)
        inputs = self._windows(x) if self.kernel else x
        if self.pointwise:  # not copied: the images are in channels_last memory
            inputs = inputs.reshape(samples, -1, self.depth)
        if not accelerated(x) and cheaper_by_gram(outputs.shape[1], self.depth, self.out):
            patches = inputs if self.pointwise else self._in_weight_order(inputs).view(samples, -1, self.depth)
            kept = self._by_gram(patches, outputs)
            if kept is not None:
                return kept
            inputs, outputs = inputs.double(), outputs.double()
        if not self.pointwise:
            inputs = inputs.unflatten(0, (samples, views))
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
