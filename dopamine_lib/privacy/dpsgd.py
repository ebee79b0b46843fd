"""The DP-SGD step of Algorithm 1, lines 8 to 13: sample, clip every patient's gradient, sum, add noise.

A ``Task`` is a model together with images, seen as functions of one flat parameter vector w in R^d: what
hospitals send and what is later encrypted is such a vector. ``clipped_sums`` serves several hospitals in one
pass; a hospital's own sum is the row of its number.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dopamine_lib.privacy.accounting import SampledGaussian
from dopamine_lib.privacy.bookkeeping import BookKeeper
from dopamine_lib.privacy.randomness import Stream

#: Numbers of input in one micro-batch: 128 images of 64 pixels, 10 of 224.
CHUNK_NUMBERS, CHUNK_SAMPLES = 128 * 3 * 64 * 64, 128


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


@dataclass(frozen=True)
class GaussianNoise:
    """One hospital's share of Gaussian noise: Algorithm 1, line 13. ``IntegerNoise`` is its discrete twin.

    noise_multiplier  sigma of ``shares`` hospitals' noise together, in units of C = ``max_grad_norm``
    sample_rate       q;  d: parameters
    """

    noise_multiplier: float
    max_grad_norm: float
    shares: int
    sample_rate: float
    d: int

    def draw(self, stream: Stream, steps: int = 1) -> list[Tensor]:
        """Noise for ``steps``, to be used once: for each float32 (d,). Drawn for many steps at once it costs less."""
        std = noise_share(self.noise_multiplier, self.max_grad_norm, self.shares)
        return list(stream.normal(steps * self.d, std).view(steps, -1).unbind())

    def combine(self, clipped_sum: Tensor, drawn: Tensor) -> Tensor:
        """What one hospital sends in a step: its clipped sum (d,) with its share of the noise."""
        return clipped_sum + drawn

    def event(self, steps: int, colluding: int = 0) -> SampledGaussian:
        """What ``steps`` totals spend, where ``colluding`` hospitals subtract their own shares."""
        left = math.sqrt((self.shares - colluding) / self.shares)
        return SampledGaussian(left * self.noise_multiplier, self.sample_rate, steps)


class Task:
    """A classifier and its images as functions of a flat parameter vector w (d,).

    net     module from a batch of inputs to logits, made of Conv2d, Linear and layers without parameters
    inputs  function from int64 indices (B,) to the net's inputs (B, ...)
    labels  int64 (N,)
    chunk   samples in one micro-batch, which bounds the memory of any batch; by default from the inputs' size
    All is computed where w is, on whatever device. Raises InputError for a net with other layers.
    """

    def __init__(self, net: nn.Module, inputs, labels: Tensor, chunk: int | None = None):
        self.net, self.inputs, self.labels, self.chunk = net.eval(), inputs, labels, chunk
        self.start = parameters_to_vector(net.parameters()).detach().clone()
        self._keeper = BookKeeper(net)

    @property
    def d(self) -> int:
        """Number of trainable parameters."""
        return len(self.start)

    def clipped_sums(self, w: Tensor, index: Tensor, max_grad_norm: float, group=None, groups: int = 1) -> Tensor:
        """Sum of the clipped per-sample gradients of each group: Algorithm 1, lines 9 to 11, and 13's sum.

        w (d,), index (B,), group (B,) in 0 ... groups-1 or None for one group; returns (groups, d). An infinite
        ``max_grad_norm`` clips nothing. An empty batch gives zeros.
        """
        sums = w.new_zeros(groups, self.d)
        if len(index) == 0:
            return sums
        group = torch.zeros_like(index) if group is None else group
        group, order = group.sort(stable=True)  # a book adds group by group
        index = index[order]
        if math.isinf(max_grad_norm):  # without clipping a sum needs no single gradients
            for g in group.unique().tolist():
                self._add_plain_sum(w, index[group == g], sums[g])
            return sums
        parameters = self._unflatten(w.detach())
        for part, owners in self._micro_batches(index, group):
            book = self._keeper.open(parameters, *self._batch(part, w))  # line 10
            book.add_to(sums, clip_factors(book.norms, max_grad_norm), owners.tolist())  # line 11
        return sums

    @torch.no_grad()
    def logits(self, w: Tensor, index: Tensor) -> Tensor:
        """Class scores (B, classes) of the images at ``index``."""
        parameters = self._unflatten(w)
        parts = [self._batch(part, w)[0] for (part,) in self._micro_batches(index)]
        return torch.cat([functional_call(self.net, parameters, (x,)) for x in parts])

    def load(self, w: Tensor) -> None:
        """Put w (d,) into the net."""
        vector_to_parameters(w, self.net.parameters())

    def _micro_batches(self, *tensors: Tensor):
        """The tensors, the first of them an index (B,), cut into pieces of at most ``chunk`` rows."""
        size = self.chunk
        if size is None:
            size = min(CHUNK_SAMPLES, max(1, CHUNK_NUMBERS // max(1, self.inputs(tensors[0][:1]).numel())))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def _batch(self, index: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a micro-batch, images in channels_last memory, on w's device."""
        x, y = self.inputs(index).to(w.device), self.labels[index].to(w.device)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, y

    def _unflatten(self, w: Tensor) -> dict[str, Tensor]:
        named = dict(self.net.named_parameters())
        pieces = w.split([p.numel() for p in named.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}

    @torch.enable_grad()
    def _add_plain_sum(self, w: Tensor, index: Tensor, total: Tensor) -> None:
        """Add the unclipped gradients' sum to ``total`` (d,)."""
        parameters = {name: piece.requires_grad_() for name, piece in self._unflatten(w.detach()).items()}
        for (part,) in self._micro_batches(index):
            x, y = self._batch(part, w)
            loss = F.cross_entropy(functional_call(self.net, parameters, (x,)), y, reduction="sum")
            total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
