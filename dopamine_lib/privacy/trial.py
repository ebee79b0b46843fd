"""A net tried out on noise before a patient is used: whether samples touch each other in it, and what it leaves behind.

A sample's gradient can only be clipped where nothing else moves it. A net that normalises over the batch, compares its
rows or draws at random is refused, and so is one that gathers anything in its buffers.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dopamine_lib.errors import InputError

#: Relative difference of float32 sums that is put down to rounding.
ROUNDING = 1e-3


def noise_like(like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Samples of noise shaped as a row of ``like`` (B, ...), and others to stand beside them.

    Two usual draws and a small one, beside large and NaN; of integers zeros and ones, beside nothing else.
    """
    if not like.is_floating_point():
        return [torch.zeros_like(like[0]), torch.ones_like(like[0])], []
    draws = torch.Generator().manual_seed(0)
    one, usual, small, large = torch.randn(4, *like.shape[1:], generator=draws).to(like)
    return [one, usual, small / 100], [1e3 * large, one * math.nan]


def refuse_mixed_samples(
    net: nn.Module,
    parameters: dict[str, Tensor],
    samples: list[Tensor],
    beside: list[Tensor],
    classes: int | None = None,
) -> set[str]:
    """Names of modules that treat every sample alone, called once, with one tensor in and one out.

    samples, beside  as ``noise_like`` gives them;  classes  scores for each sample, where that is known
    Raises InputError unless each sample's scores are the same at the first place of a batch, in the middle and at
    the last, since a row may depend on those before it or on those behind, and in a batch of its own; also where
    ``scores_of`` does, and for scores of another shape.
    """
    ring, n = [*samples, *beside], len(samples)
    orders = [[*range(len(ring))[k:], *range(k)] for k in range(0, len(ring), 2)]
    alone = {name for name, module in net.named_modules() if any(True for _ in module.parameters())}
    own: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
    for order in [list(range(n))[::-1], *orders, *([i] for i in range(n))]:
        scores, seen = _watched(net, parameters, torch.stack([ring[i] for i in order]), classes)
        alone = {name for name in alone if len(seen[name]) == 1 and seen[name][0] is not None}
        for place, i in enumerate(order):
            if i >= n:
                continue
            score, inputs = own.setdefault(i, (scores[place], {name: seen[name][0][place] for name in alone}))
            if not same(scores[place], score):
                raise InputError(
                    "the net's scores of a sample depend on the others in its batch (or on chance), so that no sample "
                    "has a gradient of its own; take out what averages or normalises over the batch"
                )
            alone = {name for name in alone if same(seen[name][0][place], inputs[name])}
    return alone


@torch.enable_grad()  # as in training
def _watched(
    net: nn.Module, parameters: dict[str, Tensor], x: Tensor, classes: int | None
) -> tuple[Tensor, dict[str, list[Tensor | None]]]:
    """Scores, and the input of each call of each module; None where not every sample has its row in and out."""
    seen = defaultdict(list)

    def watch(name: str) -> Callable:
        def hook(module, arguments, keywords, output):
            tensors = [*arguments, *keywords.values(), output]
            rows = len(tensors) == 2 and all(isinstance(t, Tensor) and t.shape[:1] == x.shape[:1] for t in tensors)
            seen[name].append(tensors[0].clone() if rows and arguments else None)

        return hook

    hooks = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in net.named_modules()
        if any(True for _ in module.parameters())
    ]
    try:
        scores = scores_of(net, parameters, x)
    finally:
        for hook in hooks:
            hook.remove()
    got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if not isinstance(scores, Tensor) or scores.dim() != 2 or got != (len(x), classes or got[1]):
        raise InputError(
            f"the net returns {got} for a batch of {len(x)}; let it return scores of shape "
            f"({len(x)}, {classes or 'classes'}): a row for each sample, a column for each class"
        )
    return scores, seen


def scores_of(net: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the net returns for x (B, ...) at ``parameters``, by name; its buffers stay as they are.

    Raises InputError where it fails, or writes on its buffers.
    """
    buffers = {name: buffer.detach().to(x.device, copy=True) for name, buffer in net.named_buffers()}
    state = {**parameters, **buffers}
    try:
        scores = functional_call(net, state, (x,))
    except Exception as error:  # a net's own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the net does not take inputs of shape {tuple(x.shape[1:])} in a batch of {len(x)} ({why}); change --size "
            "or the net"
        ) from error
    written = [name for name, own in buffers.items() if state[name] is not own or own._version]
    if written:
        raise InputError(
            f"the net writes on its buffer '{written[0]}' when it is used: what that gathers from patients would be "
            "released without noise; compute it beforehand"
        )
    return scores


def same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors differ by no more than rounding.

    >>> same(torch.tensor([1.0, 0.0]), torch.tensor([1.0001, 1e-6])), same(torch.zeros(2), torch.zeros(1))
    (True, False)
    """
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = other[other.isfinite()].abs()
    most = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=ROUNDING, atol=ROUNDING * most, equal_nan=True)
