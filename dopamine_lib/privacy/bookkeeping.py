"""Sums of clipped gradients at nearly the price of one ordinary gradient: book-keeping (Bu et al., 2023).

One forward and one backward pass give the inputs of every layer with parameters, and the derivatives of every sample's
loss at its outputs; the gradients of the weights, a third of an ordinary step, are left out. From these, ``layers``
makes each sample's norm, layer by layer. Once the factors f of all samples are known, a group's sum is taken from what
was kept: nothing is differentiated a second time.

Any net will do in which samples do not touch each other. What cannot be taken by itself, since it is used twice, shares
parameters or takes more than one tensor, is left to the module around it, at worst to the whole net.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dopamine_lib.errors import InputError
from dopamine_lib.privacy.layer import Kept, Layer, accelerated
from dopamine_lib.privacy.layers import layer_for
from dopamine_lib.privacy.trial import noise_like, refuse_mixed_samples, same, scores_of


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


class Book:
    """One batch after its forward and backward pass: the norm of every sample's gradient, and what the sums need.

    norms    float64 (B,), not finite where a gradient is not
    numbers  kept of each sample
    """

    def __init__(self, kept: list[tuple[Layer, Kept]]):
        self._kept = kept
        self.norms = sum(entry.squares for _, entry in kept).sqrt()
        tensors = (t for _, entry in kept for t in (entry.inputs, entry.outputs, entry.gradients) if t is not None)
        self.numbers = sum(t.numel() // len(t) for t in tensors)

    def add_to(self, sums: Tensor, factors: Tensor, group: list[int], room: float = 0.0) -> None:
        """Add factors[i] times sample i's gradient to row group[i] of ``sums`` (groups, d); ``group`` ascends.

        room  how far off float32 products may be, for each sample (``float_sums``)
        A sample without a finite norm needs the factor 0, as ``clip_factors`` gives it. On a GPU all groups are added
        at once, and what fills a batch up beyond ``group`` is left out.
        """
        first, kept, exact_factors, factors = 0, self._kept, factors.double(), factors.to(sums.dtype)
        if accelerated(sums):
            member = torch.tensor(group) == torch.arange(len(sums))[:, None]
            member = F.pad(member.to(sums.dtype), (0, len(factors) - len(group)))
            weights = member.to(sums.device, non_blocking=True) * factors
            for layer, entry in kept:
                if entry.gradients is not None:
                    own = layer.in_order(weights @ entry.gradients.to(sums.dtype))
                    sums[:, layer.start : layer.end] += own
            kept = [(layer, entry) for layer, entry in kept if entry.gradients is None]
        while first < len(group):
            last = first + group[first:].count(group[first])
            rows = slice(first, last)
            exact = not self._rounding(exact_factors, rows) <= (last - first) * room
            for layer, entry in kept:
                own = exact_factors if exact and entry.uncancelled is not None else factors
                layer.add(sums[group[first]], entry, own, rows)
            first = last

    def _rounding(self, factors: Tensor, rows: slice) -> float:
        """How far off the sum of float32 products of the samples ``rows`` may be: see ``linear_map``."""
        off = [
            (entry.inputs[rows, :, 0].numel() + 3) * 2**-24 * float(factors[rows] @ entry.uncancelled[rows])
            for _, entry in self._kept
            if entry.uncancelled is not None
        ]
        return math.hypot(*off)


class BookKeeper:
    """Opens a ``Book`` for any batch of a net in which samples do not touch each other.

    layers   the modules by which the net is differentiated; None until it has been tried out
    classes  scores that the net must give to each sample, where that is known
    Raises InputError for batch normalisation, and when it is tried out for a net that mixes samples otherwise or draws
    at random: no per-sample gradient exists then, and one patient moves all the others'. So it does for a net that
    writes on its buffers: they would be released without noise.
    """

    def __init__(self, net: nn.Module, classes: int | None = None):
        self.net, self.classes, self.layers = net, classes, None
        for name, module in net.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # in whatever mode, with or without parameters
                raise InputError(
                    f"layer '{name}' ({type(module).__name__}) has statistics of batches; replace it: nn.GroupNorm has "
                    "none"
                )

    def open(
        self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, offset: Tensor | float = 0.0, views: int = 1
    ) -> Book:
        """Forward and backward pass over x (B A, ...) and y (B,) at ``parameters``, by name as in the net.

        offset  added to the scores (classes,), for a balanced loss
        views   A: this many inputs in a row are one sample's, whose loss is the mean of theirs
        """
        self.try_out(x)
        return self._open(self.layers, parameters, x, y, offset, views)

    def try_out(self, like: Tensor) -> int:
        """Find the layers by which to differentiate, once; how many numbers are kept of each sample.

        like  inputs (B, ...), of which nothing but shape, dtype and device is used: the trial is made on noise, and at
              the net's own weights, not at those that a server sent, where one that fails would tell of a patient
        """
        if self.layers is not None:
            return self._numbers
        parameters = {name: weight.detach().to(like.device) for name, weight in self.net.named_parameters()}
        samples, beside = noise_like(like)
        alone = refuse_mixed_samples(self.net, parameters, samples, beside, self.classes)
        reasons = []
        for names in (self._independent(alone), {""}):
            layers = self._layers(names)
            try:
                self._numbers = self._check(layers, parameters, torch.stack(samples[:2]))
            except (InputError, RuntimeError) as error:
                reasons.append(str(error).strip().splitlines()[0])
            else:
                self.layers = layers
                return self._numbers
        raise InputError(f"no sample's own gradient can be taken of the net: {reasons[0]}")

    def _independent(self, alone: set[str]) -> set[str]:
        """Names of the smallest modules that have all the net's parameters among them and are each differentiable."""
        modules = dict(self.net.named_modules(remove_duplicate=False))
        names = {name for name, module in modules.items() if module._parameters}
        while True:
            names = {name for name in names if not any(_around(other, name) for other in names)}
            users = defaultdict(set)
            for name in names:
                for parameter in modules[name].parameters():
                    users[parameter].add(name)
            shared = set().union(*(own for own in users.values() if len(own) > 1))
            left = {name for name in names if name and (name not in alone or name in shared)}
            if not left:
                return {name for name in names if any(True for _ in modules[name].parameters())}
            names = (names - left) | {name.rpartition(".")[0] for name in left}

    def _layers(self, names: set[str]) -> list[Layer]:
        starts, start = {}, 0
        for name, parameter in self.net.named_parameters():
            starts[name] = start
            start += parameter.numel()
        layers = []
        for name in names:
            module, prefix = self.net.get_submodule(name), name and name + "."
            layers.append(layer_for(name, module, starts[prefix + next(iter(module.named_parameters()))[0]]))
        return sorted(layers, key=lambda layer: layer.start)

    def _check(self, layers: list[Layer], parameters: dict[str, Tensor], x: Tensor) -> int:
        """Numbers kept of each sample. Raises InputError unless these layers' sum is the gradient of the loss's."""
        y, factors = torch.zeros(2, dtype=torch.int64, device=x.device), torch.tensor([1.0, 0.5], device=x.device)
        book = self._open(layers, parameters, x, y)
        own = x.new_zeros(1, sum(weight.numel() for weight in parameters.values()), dtype=factors.dtype)
        own = own.to(next(iter(parameters.values())))
        book.add_to(own, factors, [0, 0])
        with torch.enable_grad():
            weights = {name: weight.detach().requires_grad_() for name, weight in parameters.items()}
            losses = F.cross_entropy(scores_of(self.net, weights, x), y, reduction="none")
            true = torch.autograd.grad(losses @ factors.to(losses), list(weights.values()), materialize_grads=True)
        if not same(own[0], torch.cat([gradient.flatten() for gradient in true])):
            raise InputError("its modules' gradients are not the net's; use every layer by calling it")
        return book.numbers

    def _open(self, layers, parameters, x: Tensor, y: Tensor, offset: Tensor | float = 0.0, views: int = 1) -> Book:
        kept: dict[Layer, Kept] = {}
        anchor = next(iter(parameters.values())).new_zeros((), requires_grad=True)
        hooks = [layer.module.register_forward_hook(_hook(layer, anchor, parameters, kept, views)) for layer in layers]
        with torch.enable_grad():
            try:
                logits = functional_call(self.net, parameters, (x,))
            finally:  # a layer may be called again on the way back
                for hook in hooks:
                    hook.remove()
            losses = F.cross_entropy(logits + offset, y.repeat_interleave(views), reduction="sum")
            torch.autograd.grad(losses / views, anchor)
        return Book(list(kept.items()))


def _hook(layer: Layer, anchor: Tensor, parameters: dict[str, Tensor], kept: dict, views: int) -> Callable:
    """A forward hook that keeps what ``layer`` needs, as soon as the derivatives at its outputs are there."""
    prefix = layer.name and layer.name + "."
    own = {name: parameters[prefix + name] for name, _ in layer.module.named_parameters()}

    def forward(module, arguments, output):
        x = arguments[0].detach()
        version = x._version

        def backward(gradient):
            if x._version != version:
                raise InputError(f"the input of layer '{layer.name}' is changed in place after its use; change a copy")
            kept[layer] = layer.keep(x, gradient, own, views)

        if not output.requires_grad:
            output = _Anchor.apply(output, anchor)
        output.register_hook(backward)  # before an in-place ReLU, so it sees the derivative at the layer's output
        return output

    return forward


def _around(outer: str, inner: str) -> bool:
    """Whether the module called ``inner`` lies in another, called ``outer``.

    >>> _around("features", "features.0"), _around("", "features"), _around("features", "features")
    (True, True, False)
    """
    return outer != inner and (not outer or inner.startswith(outer + "."))
