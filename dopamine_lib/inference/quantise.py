"""Real weights to integers with as little loss as 32 bits allow. All of it is the provider's private business.

Each channel of a hidden value is multiplied by a number of its own, chosen so that on public images its range
fills the bits there are; the next layer's weights are divided by it. ReLU and pooling commute with that, so the
network's output stays the same (Nagel et al. 2019, "Data-free quantization through weight equalization"). Gains are
hidden in the weights: a layer's scale in the public plan says nothing about its magnitude.
"""

import torch
from torch import Tensor, nn

#: A channel's range is taken to be at least this share of the largest channel's: a channel that is quiet on public
#: images may be loud on another.
QUIETEST = 1 / 2


def gains_of(z: Tensor, room: float, spread: bool) -> Tensor:
    """The factor (C,) that brings each channel of z (N, C, H, W) to ``room``; with ``spread``, its differences too."""
    ranges = z.abs().amax((0, 2, 3))
    if spread:
        ranges = torch.maximum(ranges, z.amax((0, 2, 3)) - z.amin((0, 2, 3)))
    return room / ranges.clamp_min(max(float(ranges.max()) * QUIETEST, 1e-9))


def quantise(module: nn.Module, gain_in: Tensor, gain_out: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (M, K), rounded to integers, and the bias (M,) in ring units, both float64.

    gain_in   ring units per real unit of each input channel (C,)
    gain_out  the same of each output channel (M,)
    """
    weight = module.weight.double().flatten(1)
    bias = module.bias.double() if module.bias is not None else weight.new_zeros(len(weight))
    per_channel = weight.shape[1] // len(gain_in)
    exact = weight * gain_out.double()[:, None] / gain_in.double().repeat_interleave(per_channel)
    return exact.round(), bias * gain_out
