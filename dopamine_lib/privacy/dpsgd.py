"""The DP-SGD step of Algorithm 1, lines 8 to 13: sample, clip every patient's gradient, sum, add noise.

A ``Task`` is a model together with images, seen as functions of one flat parameter vector w in R^d: what
hospitals send and what is later encrypted is such a vector. ``clipped_sums`` serves several hospitals in one
pass; a hospital's own sum is the row of its number.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """1 / max(1, norm / C) for each sample: Algorithm 1, line 11."""
    return 1 / (norms / max_grad_norm).clamp_min(1)


def clipped_sums_reference(model: nn.Module, x: Tensor, y: Tensor, max_grad_norm: float, group: Tensor, groups: int):
    """Sums of clipped gradients by a plain loop over samples: what ``Task.clipped_sums`` must equal.

    x (B, …), y (B,), group (B,) with values in 0 … groups-1; returns (groups, d).
    """
    parameters = list(model.parameters())
    sums = torch.zeros(groups, sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    for x_i, y_i, g_i in zip(x, y, group, strict=True):
        loss = F.cross_entropy(model(x_i[None]), y_i[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])  # line 10
        sums[g_i] += gradient * clip_factors(gradient.norm(), max_grad_norm)  # line 11
    return sums


def noise_share(noise_multiplier: float, max_grad_norm: float, hospitals: int) -> float:
    """Standard deviation of one hospital's noise, sigma C / sqrt(K): Algorithm 1, line 13, and Lemma 1.

    K independent shares add up to sigma C. (The line's own variance sigma^2 C^2 / sqrt(K) is a slip.)
    """
    return noise_multiplier * max_grad_norm / math.sqrt(hospitals)


class Task:
    """A classifier and its images as functions of a flat parameter vector w (d,).

    net     module from a batch of inputs to logits
    inputs  function from int64 indices (B,) to the net's inputs (B, …)
    labels  int64 (N,)
    chunk   samples whose gradients are held in memory at once
    """

    def __init__(self, net: nn.Module, inputs, labels: Tensor, chunk: int = 32):
        self.net, self.inputs, self.labels, self.chunk = net.eval(), inputs, labels, chunk
        self.start = parameters_to_vector(net.parameters()).detach().clone()

    @property
    def d(self) -> int:
        """Number of trainable parameters."""
        return len(self.start)

    def clipped_sums(self, w: Tensor, index: Tensor, max_grad_norm: float, group=None, groups: int = 1) -> Tensor:
        """Sum of the clipped per-sample gradients of each group: Algorithm 1, lines 9 to 11, and 13's sum.

        w (d,), index (B,), group (B,) in 0 … groups-1 or None for one group; returns (groups, d). An infinite
        ``max_grad_norm`` clips nothing. An empty batch gives zeros.
        """
        sums = w.new_zeros(groups, self.d)
        group = torch.zeros_like(index) if group is None else group
        if math.isinf(max_grad_norm):  # without clipping a sum needs no single gradients
            for g in range(groups):
                sums[g] = self._plain_sum(w, index[group == g])
            return sums
        parameters = self._unflatten(w)
        per_sample = vmap(grad(self._loss), in_dims=(None, 0, 0))
        for at in range(0, len(index), self.chunk):
            part = index[at : at + self.chunk]
            gradients = per_sample(parameters, self.inputs(part), self.labels[part])
            flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
            flat *= clip_factors(flat.norm(dim=1), max_grad_norm)[:, None]
            sums.index_add_(0, group[at : at + self.chunk], flat)
        return sums

    @torch.no_grad()
    def logits(self, w: Tensor, index: Tensor) -> Tensor:
        """Class scores (B, classes) of the images at ``index``."""
        self.load(w)
        return torch.cat([self.net(self.inputs(part)) for part in index.split(128)])

    def load(self, w: Tensor) -> None:
        """Put w (d,) into the net."""
        vector_to_parameters(w, self.net.parameters())

    def _unflatten(self, w: Tensor) -> dict[str, Tensor]:
        named = dict(self.net.named_parameters())
        pieces = w.split([p.numel() for p in named.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}

    def _loss(self, parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.net, parameters, (x[None],)), y[None])

    def _plain_sum(self, w: Tensor, index: Tensor) -> Tensor:
        if len(index) == 0:
            return torch.zeros_like(w)
        self.load(w)
        loss = F.cross_entropy(self.net(self.inputs(index)), self.labels[index], reduction="sum")
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.net.parameters()))])
