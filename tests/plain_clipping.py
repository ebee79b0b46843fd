"""Clipped sums by a plain loop over samples: what everything faster must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopamine_lib.privacy.dpsgd import clip_factors


def clipped_sums_by_loop(model: nn.Module, x: Tensor, y: Tensor, max_grad_norm: float, group: Tensor, groups: int):
    """Algorithm 1, lines 10 and 11: x (B, …), y (B,), group (B,) with values in 0 … groups-1; returns (groups, d)."""
    parameters = list(model.parameters())
    sums = torch.zeros(groups, sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    for x_i, y_i, g_i in zip(x, y, group, strict=True):
        loss = F.cross_entropy(model(x_i[None]), y_i[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])
        sums[g_i] += gradient * clip_factors(gradient.norm(), max_grad_norm)
    return sums
