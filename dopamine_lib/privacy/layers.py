"""Which layers have formulas for the gradient of every sample, and which formulas: ``KINDS``.

A linear map's are in ``linear_map``: of a fully connected layer, and of a convolution, which is such a map of its
patches. Those of normalisations, embeddings and grouped convolutions are here. Anything else is a ``Layer``,
differentiated by ``torch.func``, for all samples at once where vmap can.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopamine_lib.privacy.layer import Kept, Layer, padded
from dopamine_lib.privacy.linear_map import LinearMap

#: A convolution with a kernel this large and at most this many outputs spends more on copying patches than on products.
LARGE_KERNEL, FEW_OUTPUTS = 25, 32
#: Channels from which on oneDNN prefers a channel's positions together.
WIDE = 16


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

    def keep(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor], views: int = 1) -> Kept:
        """As in ``Layer``; each sum stands at the first of its positions, those of all views."""
        samples = len(x) // views
        x, g = x.reshape(samples, -1), g.reshape(samples, -1, g.shape[-1])
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
