"""Real weights to integers with as little loss as 32 bits allow. All of it is the provider's secret.

Each channel of a hidden value is multiplied by a number of its own, chosen so that on public images its range fills
the available bits; the next layer's weights are divided by it. ReLU and pooling commute with that, so the
network's output stays the same (Nagel et al. 2019, "Data-free quantization through weight equalization"). Gains are
hidden in the weights: a layer's scale in the public plan says nothing about its magnitude.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: With fewer or more inputs in one sum, each weight is rounded on its own: few have little to make up for, and
#: the time for many grows with their cube.
LEAST_TOGETHER, MOST_TOGETHER = 16, 1024
#: Sums whose inputs' moments are taken.
SUMS = 2**14
#: Columns after which the errors of all are handed on to the rest at once.
BLOCK = 64
#: Share of the inputs' mean energy that is added to each, so that the moments can be inverted.
DAMPENING = 0.01


def quantise(module: nn.Module, x: Tensor, gain_in: Tensor, gain_out: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (M, K), rounded to integers, and the bias (M,) in ring units, both float64.

    What rounding adds to a sum of mean inputs is taken off the bias (Nagel et al. 2019, section 4.2).

    x         what the layer reads on public images, real (N, C, H, W)
    gain_in   ring units per real unit of each input channel (C,)
    gain_out  the same of each output channel (M,)
    """
    weight = module.weight.detach().flatten(1)
    bias = module.bias.detach().double() * gain_out if module.bias is not None else torch.zeros(len(weight)).double()
    groups = getattr(module, "groups", 1)
    rows, columns, count = len(weight) // groups, len(gain_in) // groups, weight.shape[1]
    gains = gain_in.repeat_interleave(count // columns)
    together = LEAST_TOGETHER <= count <= MOST_TOGETHER
    if together:
        u = torch.cat([*inputs(module, x)], 1)
        mean = u.mean(1)
    else:
        mean = sum(u.mean(1) for u in inputs(module, x)) / len(x)
    rounded = torch.empty(weight.shape, dtype=torch.float64)
    for g in range(groups):
        own, read = slice(g * rows, (g + 1) * rows), slice(g * count, (g + 1) * count)
        exact = weight[own].double() * gain_out[own].double()[:, None] / gains[read].double()
        rounded[own] = round_together(exact, second_moments(u[read] * gains[read, None])) if together else exact.round()
        bias[own] += exact.sub_(rounded[own]) @ (mean[read] * gains[read]).double()
    return rounded, bias


def inputs(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs u (K, sums) of sums that a layer makes of each image of x (N, C, H, W), evenly spread, all groups'.

    Of ``SUMS`` in all: more would take minutes and change no more than the last places.
    """
    for one in x.split(1):  # unfolded for a 3 x 3 kernel, an image takes nine times its memory
        if isinstance(module, nn.Linear):
            yield one.flatten(1).T
        else:
            u = F.unfold(one, module.kernel_size, stride=module.stride, padding=module.padding)[0]
            yield u[:, :: max(1, len(x) * u.shape[1] // SUMS)]


def second_moments(u: Tensor) -> Tensor:
    """Mean of u u^T (K, K), float64, over the columns of (K, sums)."""
    return (u @ u.T).double() / u.shape[1]


def round_together(exact: Tensor, moments: Tensor) -> Tensor:
    """Integers near ``exact`` (M, K) such that sums of inputs with them are near the exact ones.

    Each column in turn is rounded, and the columns after it make up for its error as far as their inputs correlate with
    its own, which ``moments`` (K, K) says. Without correlation this is plain rounding.
    Frantar et al. 2023, "GPTQ: accurate post-training quantization", algorithm 1.
    """
    energy = moments.diagonal().mean().clamp_min(1e-9)
    moments = moments + DAMPENING * energy * torch.eye(len(moments), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    left = exact.T.clone(memory_format=torch.contiguous_format)  # a column is a row here, which is faster
    for block, rows in zip(left.split(BLOCK), upper.split(BLOCK), strict=True):
        first = block.storage_offset() // left.shape[1]
        errors, own = torch.empty_like(block), rows[:, first : first + len(block)]
        for k, column in enumerate(block):
            rounded = column.round()
            errors[k] = (column - rounded) / own[k, k]
            block[k + 1 :].addr_(own[k, k + 1 :], errors[k], alpha=-1)
            column[:] = rounded
        left[first + len(block) :] -= rows[:, first + len(block) :].T @ errors
    return left.T.contiguous()
