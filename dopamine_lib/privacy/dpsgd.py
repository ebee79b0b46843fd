"""The DP-SGD step of Algorithm 1, lines 9 to 13, but for the noise: clip every patient's gradient, and sum.

A ``Task`` is a model together with its images, seen as functions of one flat parameter vector w in R^d: what hospitals
send, and what is later encrypted, is such a vector. ``clipped_sums`` serves several hospitals in one pass; row k of the
result is hospital k's sum.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dopamine_lib.errors import InputError
from dopamine_lib.privacy.augmentation import views
from dopamine_lib.privacy.balanced import join, log_shares, take_apart
from dopamine_lib.privacy.bookkeeping import BookKeeper
from dopamine_lib.privacy.float_sums import most_together, room, sum_type
from dopamine_lib.privacy.layer import accelerated
from dopamine_lib.privacy.operating_point import OperatingPoint
from dopamine_lib.privacy.trajectories import mean_gradients

#: Input numbers in one micro-batch: 128 images of 64 pixels, 10 of 224.
CHUNK_NUMBERS, CHUNK_SAMPLES = 128 * 3 * 64 * 64, 128
#: The same on a GPU, about 7 GB of SqueezeNet at 224 pixels: a step of the paper's in one pass.
CHUNK_NUMBERS_GPU, CHUNK_SAMPLES_GPU = 160 * 3 * 224 * 224, 1024
#: A GPU's batches are filled up to multiples of this, so that few sizes occur: its libraries choose kernels by size.
FILLED_TO = 16
#: The label whose loss, and gradient, is zero: of what fills a batch up.
NOBODY = -100
#: Numbers kept of all samples of a micro-batch between their norms and their sum: a gigabyte.
KEPT_NUMBERS = 2**28
#: Numbers below it have lost digits (they are subnormal), so that nothing is scaled by them.
SMALLEST = torch.finfo(torch.float32).tiny


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """1 / max(1, norm / C) for each of the norms (B,): Algorithm 1, line 11.

    What has no finite norm counts as zero: whether a message fails must not tell who is in it. So does what is longer
    than C by more than float32's range.

    >>> clip_factors(torch.tensor([0.5, 2.0, math.inf, math.nan]), max_grad_norm=1.0)
    tensor([1.0000, 0.5000, 0.0000, 0.0000])
    """
    factors = 1 / (norms / max_grad_norm).clamp_min(1)
    return torch.where(factors >= SMALLEST, factors, 0)  # not so for NaN


def shorten_rows(rows: Tensor, norms: Tensor, max_grad_norm: float) -> Tensor:
    """Rows (B, m) times the clip factors of ``norms`` (B,), float64 so that they are exact; zero where not finite.

    >>> shorten_rows(torch.tensor([[3.0, 4.0], [math.nan, 0.0]]), torch.tensor([5.0, math.nan]).double(), 1.0)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    clipped = (rows * clip_factors(norms, max_grad_norm)[:, None]).to(rows.dtype)
    return torch.where(clipped.abs() >= SMALLEST, clipped, 0)


def noise_share(noise_multiplier: float, max_grad_norm: float, hospitals: int) -> float:
    """Standard deviation of one hospital's noise, sigma C / sqrt(K): Algorithm 1, line 13, and Lemma 1.

    K independent shares add up to sigma C. (Line 13 has the variance sigma^2 C^2 / sqrt(K): register, row 1.)

    >>> noise_share(noise_multiplier=1.0, max_grad_norm=0.5, hospitals=4)
    0.25
    """
    return noise_multiplier * max_grad_norm / math.sqrt(hospitals)


class Task:
    """A classifier and its images as functions of a flat parameter vector w (d,).

    net      module from a batch of inputs to logits which treats every sample alone; all its parameters are trained
    inputs   function from int64 indices (B,) to the net's inputs (B, ...)
    labels   int64 (N,)
    chunk    samples in one micro-batch, which bounds the memory of any batch; by default set by the inputs' size, and
             by that of what must be kept of each
    classes  logits that the net must give, where that is known
    Everything is computed on w's device. Raises InputError for a net that mixes samples, gives chance a part, writes on
    its buffers or gives another number of logits.
    """

    #: Threads that training takes: a small model is faster on one. None for all.
    threads: int | None = None

    def __init__(
        self,
        net: nn.Module,
        inputs: Callable[[Tensor], Tensor],
        labels: Tensor,
        chunk: int | None = None,
        classes: int | None = None,
    ):
        self.net, self.inputs, self.labels, self.chunk = net.eval(), inputs, labels, chunk
        #: Who each image belongs to, int64 (N,): what one person adds to a sum is bounded, not what one image does.
        self.person = torch.arange(len(labels))
        self.start = parameters_to_vector(net.parameters()).detach().clone()
        #: Added to the logits (classes,) in training alone, for a balanced loss; None for the loss as it is.
        self.offset: Tensor | None = None
        self._keeper, self._classes = BookKeeper(net, classes), classes

    @property
    def d(self) -> int:
        """Number of trainable parameters."""
        return len(self.start)

    def clipped_sums(
        self,
        w: Tensor,
        index: Tensor,
        max_grad_norm: float,
        group: Tensor | None = None,
        groups: int = 1,
        chance: Tensor | None = None,
    ) -> Tensor:
        """Sum of the clipped per-sample gradients of each group: Algorithm 1, lines 9 to 11, and line 13's sum.

        w (d,), index (B,), group (B,) in 0 ... groups-1 or None for one group; returns (groups, d), float64 where many
        patients are in one sum (``float_sums``). A sample's loss is that of its image, or the mean over the views that
        ``chance`` (B, A, 3) makes of it (``augmentation``). Whatever the image and w, a sample's own vector is no
        longer than C (1 + 1e-6), and zero where its gradient is not finite. An infinite ``max_grad_norm`` clips
        nothing. An empty batch gives zeros. With w = 0 the gradient of the first of two classes at x = 3 is (-1.5, 1.5)
        for W and (-0.5, 0.5) for b, of norm sqrt(5); clipped to 1:

        >>> x, y = torch.tensor([[3.0], [0.0]]), torch.tensor([0, 1])
        >>> task = Task(nn.Linear(1, 2), lambda index: x[index], y)
        >>> task.clipped_sums(torch.zeros(4), torch.tensor([0]), max_grad_norm=1.0)
        tensor([[-0.6708,  0.6708, -0.2236,  0.2236]])
        """
        most = most_together(index, group)
        sums = w.new_zeros(groups, self.d, dtype=sum_type(most, w.dtype))
        if len(index) == 0:
            return sums
        group = torch.zeros_like(index) if group is None else group
        group, order = group.sort(stable=True)  # a book adds group by group
        index, chance = index[order], torch.zeros(len(index), 0, 3) if chance is None else chance[order]
        if math.isinf(max_grad_norm):  # without clipping a sum needs no single gradients
            for g in group.unique().tolist():
                self._add_plain_sum(w, index[group == g], chance[group == g], sums[g])
            return sums
        parameters = self._unflatten(w.detach())
        copies = max(1, chance.shape[1])
        for part, owners, drawn in self._micro_batches(w, index, group, chance, clipped=True, copies=copies):
            book = self._keeper.open(parameters, *self._seen(part, drawn, w), self._offset(w), copies)  # line 10
            factors = clip_factors(book.norms, max_grad_norm)  # line 11
            book.add_to(sums, factors, owners.tolist(), max_grad_norm * room(most))
        return sums

    def trajectory_sum(
        self, w: Tensor, index: Tensor, max_grad_norm: float, steps: int, eta: float, chance: Tensor | None = None
    ) -> Tensor:
        """The sum (d,) of the mean gradients on the trajectories of patients at ``index`` (B,), each clipped once.

        From w (d,) by ``steps`` steps of length ``eta`` (``trajectories``); ``chance``, bounds and rounding as in
        ``clipped_sums``, which it is with one step. Raises InputError for a net that cannot be vectorised.
        """
        total = w.new_zeros(self.d, dtype=sum_type(len(index), w.dtype))
        if len(index) == 0:
            return total
        parameters = self._unflatten(w.detach())
        # of each patient: a model, its gradients, and sums of these
        chance = torch.zeros(len(index), 0, 3) if chance is None else chance
        terms = {"clipped": True, "kept": 4 * self.d, "copies": max(1, chance.shape[1])}
        for part, drawn in self._micro_batches(w, index, chance, **terms):
            x, y = self._batch(part, w)
            x = views(x, drawn.to(w.device)) if drawn.shape[1] else x[:, None]
            own = mean_gradients(self.net, parameters, x, y, self._offset(w), steps, eta)
            norms = torch.linalg.vector_norm(own, dim=1, dtype=torch.float64)
            total += shorten_rows(own, norms, max_grad_norm).to(total.dtype).sum(0)
        return total

    def histogram_sum(self, w: Tensor, index: Tensor, max_grad_norm: float, point: OperatingPoint) -> Tensor:
        """The histogram (d,) of patients at ``index`` (B,) under w (d,): each counts C, or 1 where C is infinite.

        What follows the ``point.cells`` counts is padding, so that it is a message like any other.
        """
        counts = point.histogram(self._exact_logits(w, index), self.labels[index]) if len(index) else torch.zeros(0)
        counted = counts * (1.0 if math.isinf(max_grad_norm) else max_grad_norm)
        return F.pad(counted.double(), (0, self.d - len(counted))).to(w.device)

    def first_sum(self, index: Tensor, counts: float = 0.0) -> Tensor:
        """What is asked for once, before training, summed in float64 over persons: features, class counts or both.

        index   all images of theirs (B,);  counts  the class counts' part of the release, b^2 in ``balanced``
        Several images of one person stand for it as their mean, so one person moves the sum by at most 1.
        """
        features = self.feature_sum(index)
        if not counts:
            return features
        onehot = F.one_hot(self.labels[index], self._classes) * self.shares(index)[:, None]
        return join(features, onehot.sum(0), counts)

    def take_first(self, mean: Tensor, counts: float = 0.0) -> None:
        """Train from now on by what ``first_sum`` gave, noised and per person: (m,), in the model's own type.

        Raises InputError where that is not finite.
        """
        if counts:
            mean, shares = take_apart(mean, self._classes, counts)
            self.offset = log_shares(shares)
        if len(mean):
            self.centre_on(mean)

    def feature_sum(self, index: Tensor) -> Tensor:
        """The sum (p,) of features to centre on: none, where they are learned."""
        return torch.zeros(0, dtype=torch.float64)

    def centre_on(self, mean: Tensor) -> None:
        """Raises InputError: only features that are not learned have a mean."""
        raise InputError("the mean features are for a head or a linear model: leave out centre")

    def shares(self, index: Tensor) -> Tensor:
        """1 over the number of images at ``index`` that are the same person's, for each of them: float64 (B,)."""
        _, whose, images = self.person[index].unique(return_inverse=True, return_counts=True)
        return (1 / images.double())[whose]

    @torch.no_grad()
    def logits(self, w: Tensor, index: Tensor) -> Tensor:
        """Class scores (B, classes) of the images at ``index``."""
        parameters = self._unflatten(w)
        parts = self._micro_batches(w, index)
        return torch.cat([functional_call(self.net, parameters, self._batch(part, w)[:1]) for (part,) in parts])

    def _exact_logits(self, w: Tensor, index: Tensor) -> Tensor:
        """Logits (B, classes), in float64 where that costs nothing: who else is asked about must not show in them."""
        return self.logits(w, index)

    def load(self, w: Tensor) -> None:
        """Write w (d,) into the net."""
        vector_to_parameters(w, self.net.parameters())

    def _micro_batches(self, w: Tensor, *tensors: Tensor, clipped: bool = False, kept: int = 0, copies: int = 1):
        """The tensors, the first of them an index (B,), cut into pieces of at most ``chunk`` rows.

        kept  numbers kept of each sample, where those are more than what ``clipped`` gradients need
        copies  of each input that are made
        """
        size = self.chunk
        if size is None:
            one, _ = self._batch(tensors[0][:1], w)
            # tried for any use: what will not do is told before training
            kept = max(kept, self._keeper.try_out(one) * clipped * copies)
            samples, numbers = CHUNK_SAMPLES, CHUNK_NUMBERS
            if accelerated(w):
                samples, numbers = CHUNK_SAMPLES_GPU, CHUNK_NUMBERS_GPU
            size = max(1, min(samples, numbers // max(1, one.numel() * copies), KEPT_NUMBERS // max(1, kept)))
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def _batch(self, index: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a micro-batch, images in channels_last memory, on w's device."""
        x, y = self.inputs(index).to(w.device), self.labels[index].to(w.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, y

    def _filled(self, index: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The same for training: on a GPU followed by images that have no gradient, up to ``FILLED_TO``."""
        if not accelerated(w):
            return self._batch(index, w)
        x, y = self._batch(torch.cat([index, index[:1].expand(-len(index) % FILLED_TO)]), w)
        y[len(index) :] = NOBODY
        return x, y

    def _seen(self, index: Tensor, chance: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the views that ``chance`` (B, A, 3) makes of an image in its place: (B A, ...); labels (B,)."""
        x, y = self._filled(index, w)
        if chance.shape[1]:
            chance = F.pad(chance, (0, 0, 0, 0, 0, len(x) - len(chance)))
            x = views(x, chance.to(w.device)).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return x, y

    def _offset(self, w: Tensor) -> Tensor | float:
        return 0.0 if self.offset is None else self.offset.to(w)

    def _unflatten(self, w: Tensor) -> dict[str, Tensor]:
        named = dict(self.net.named_parameters())
        pieces = w.split([p.numel() for p in named.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}

    @torch.enable_grad()
    def _add_plain_sum(self, w: Tensor, index: Tensor, chance: Tensor, total: Tensor) -> None:
        """Add the unclipped gradients' sum to ``total`` (d,)."""
        copies = max(1, chance.shape[1])
        parameters = {name: piece.requires_grad_() for name, piece in self._unflatten(w.detach()).items()}
        for part, drawn in self._micro_batches(w, index, chance, copies=copies):
            x, y = self._seen(part, drawn, w)
            logits, y = functional_call(self.net, parameters, (x,)) + self._offset(w), y.repeat_interleave(copies)
            loss = F.cross_entropy(logits, y, reduction="sum") / copies
            total += torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, [*parameters.values()], materialize_grads=True)]
            )
