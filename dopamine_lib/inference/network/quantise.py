"""Real weights to integers with as little loss as 32 bits allow. All of it is the provider's secret.

Each channel of a hidden value is multiplied by a number of its own, chosen so that on public images its range fills
the available bits; the next layer's weights are divided by it. ReLU and pooling commute with that, so the
network's output stays the same (Nagel et al. 2019, "Data-free quantization through weight equalization"). Gains are
hidden in the weights: a layer's scale in the public plan says nothing about its magnitude.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A channel's range is taken to be at least this share of the largest channel's: a channel that is quiet on public
#: images may be loud on another.
QUIETEST = 1 / 2
#: With more inputs in one sum, each weight is rounded on its own: ``second_moments`` grows with their square.
MOST_TOGETHER = 4096
#: Share of the inputs' mean energy that is added to each, so that the moments can be inverted.
DAMPENING = 0.01


def gains_of(z: Tensor, room: float, spread: bool) -> Tensor:
    """The factor (C,) that brings each channel of z (N, C, H, W) to ``room``; with ``spread``, its differences too."""
    ranges = z.abs().amax((0, 2, 3))
    if spread:
        ranges = torch.maximum(ranges, z.amax((0, 2, 3)) - z.amin((0, 2, 3)))
    return room / ranges.clamp_min(max(float(ranges.max()) * QUIETEST, 1e-9))


def quantise(module: nn.Module, x: Tensor, gain_in: Tensor, gain_out: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (M, K), rounded to integers, and the bias (M,) in ring units, both float64.

    x         what the layer reads on public images, real (N, C, H, W)
    gain_in   ring units per real unit of each input channel (C,)
    gain_out  the same of each output channel (M,)
    """
    weight = module.weight.detach().double().flatten(1)
    bias = module.bias.detach().double() if module.bias is not None else weight.new_zeros(len(weight))
    per_channel = weight.shape[1] // len(gain_in)
    exact = weight * gain_out.double()[:, None] / gain_in.double().repeat_interleave(per_channel)
    if exact.shape[1] > MOST_TOGETHER:
        return exact.round(), bias * gain_out
    return round_together(exact, second_moments(module, x * gain_in[:, None, None])), bias * gain_out


def second_moments(module: nn.Module, x: Tensor) -> Tensor:
    """Mean of u u^T (K, K), float64, over the inputs u (K,) of all sums that the layer makes of x (N, C, H, W)."""
    if isinstance(module, nn.Linear):
        parts = [x.flatten(1).T]
    else:  # image by image: unfolded for a 3 x 3 kernel, an image takes nine times its memory
        parts = (
            F.unfold(one, module.kernel_size, stride=module.stride, padding=module.padding)[0] for one in x.split(1)
        )
    total, count = 0, 0
    for u in parts:
        total, count = total + (u @ u.T).double(), count + u.shape[1]
    return total / count


def round_together(exact: Tensor, moments: Tensor) -> Tensor:
    """Integers near ``exact`` (M, K) such that sums of inputs with them are near the exact ones.

    Each column in turn is rounded, and the columns after it make up for its error as far as their inputs correlate with
    its own, which ``moments`` (K, K) says. Without correlation this is plain rounding.
    Frantar et al. 2023, "GPTQ: accurate post-training quantization", algorithm 1 with blocks of one column.
    """
    energy = moments.diagonal().mean().clamp_min(1e-9)
    moments = moments + DAMPENING * energy * torch.eye(len(moments), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    left = exact.T.clone(memory_format=torch.contiguous_format)  # a column is a row here, which is faster
    for k in range(len(left)):
        rounded = left[k].round()
        left[k + 1 :].addr_(upper[k, k + 1 :], (left[k] - rounded) / upper[k, k], alpha=-1)
        left[k] = rounded
    return left.T.contiguous()
