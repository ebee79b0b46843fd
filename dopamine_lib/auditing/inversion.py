"""Gradient inversion: from the update that a hospital sends in one round back to its patient's pixels.

Three attackers have three views. The *server* sees each hospital's message, or under secure aggregation only their
sum. A *curious hospital* sees the sum that all of them decrypt, and can subtract its own message, noise included. An
*outsider* sees the models that are handed out, whose differences are the sums again, or only the last model. All run
the same attack on what they see:

1. guess images at random, of the known grades (a single patient's can be read off the update: ``grade_of``);
2. compute the update that the guess would have caused;
3. move the pixels so that it points the same way (cosine) and neighbouring pixels are alike (total variation);
4. repeat (Geiping et al. 2020).

The cosine ignores the length of the update, so clipping, which only shortens it, is no defence. Noise is, and so is a
sum over many patients. The attacker knows everything else: net, weights, number of images, grades, image size.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call

from dopamine_lib.errors import InputError, check_within


def grade_of(update: Tensor, classes: int) -> int:
    """The grade of the one patient behind an ``update`` (d,), without any optimisation (Zhao et al. 2020).

    The last layer's bias has the derivative p_j - [j is the grade]: only the true grade's is negative. Clipping keeps
    signs. Raises InputError for an update with fewer entries than classes.

    >>> grade_of(torch.tensor([0.7, 0.2, 0.1, -0.6, 0.3]), classes=3)  # the last three are the bias's
    1
    """
    if update.dim() != 1 or len(update) < classes:
        raise InputError(f"the update has shape {tuple(update.shape)}, but must end in a bias of {classes} values")
    return int(update[-classes:].argmin())


def dense_inputs(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """The exact input (p,) of a linear layer for one patient, from the gradients (o, p) and (o,).

    With y = W x + b they are g x^T and g, so any row with g_j not 0 gives x; the largest is taken. Raises InputError
    if every g_j is 0: the layer learned nothing from this patient.

    >>> g, x = torch.tensor([0.0, -2.0]), torch.tensor([1.0, 3.0])
    >>> dense_inputs(torch.outer(g, x), g)
    tensor([1., 3.])
    """
    row = int(bias_gradient.abs().argmax())
    if bias_gradient[row] == 0:
        raise InputError("the layer's bias gradient is 0 everywhere: this update says nothing about its input")
    return weight_gradient[row] / bias_gradient[row]


def invert(
    net: nn.Module,
    w: Tensor,
    update: Tensor,
    grades: Tensor | Sequence[int],
    shape: tuple[int, int, int],
    *,
    steps: int = 200,
    tv: float = 1e-2,
    seed: int = 0,
) -> Tensor:
    """Images (P, C, H, W) in [-1, 1] whose summed gradients at w (d,) point where ``update`` (d,) does.

    grades  of the P patients in the sum;  shape (C, H, W) of an image
    tv      weight of the total variation;  seed of the first guess
    Raises InputError for an update of another length, no grades, or no steps.
    """
    grades = torch.as_tensor(grades)
    if update.shape != w.shape or grades.dim() != 1 or len(grades) == 0:
        raise InputError(
            f"an update of {tuple(update.shape)} with grades of {tuple(grades.shape)} does not fit a net of {len(w)} "
            "parameters: give one number per parameter and one grade per patient"
        )
    check_within("steps", steps, 1, 10**6, "a few hundred are usual", low_open=False)
    parameters, start = {}, 0
    for name, own in net.named_parameters():
        parameters[name] = w[start : start + own.numel()].view_as(own).detach().requires_grad_()
        start += own.numel()
    target = F.normalize(update, dim=0)
    x = 0.3 * torch.randn(len(grades), *shape, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(net, parameters, (x,)), grades, reduction="sum")
        gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        caused = torch.cat([part.flatten() for part in gradient])
        distance = 1 - F.cosine_similarity(caused, target, dim=0) + tv * total_variation(x)
        x.grad = torch.autograd.grad(distance, x)[0].sign()  # the sign alone: ReLU and pooling distort the size
        optimiser.step()
        falling.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
    return x.detach()


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of (P, C, H, W)."""
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def psnr(found: ArrayLike, true: ArrayLike) -> float:
    """Peak signal-to-noise ratio in decibels of images with values in [-1, 1]; infinite for equal ones.

    >>> psnr([1.0, 1.0], [0.8, 0.8])  # 20 log10(2 / 0.2)
    20.0
    """
    error = float(np.mean((np.asarray(found, dtype=float) - np.asarray(true, dtype=float)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(2**2 / error)


def rank_among(found: ArrayLike, true: int, candidates: ArrayLike) -> int:
    """The rank of candidate ``true`` among the ``candidates`` (M, ...) by distance to what was found; 1 is the nearest.

    A picture need not be sharp to do harm: rank 1 among many tells whose it is.
    """
    candidates = np.asarray(candidates, dtype=float)
    distances = ((candidates - np.asarray(found, dtype=float)) ** 2).reshape(len(candidates), -1).sum(1)
    return int(np.sum(distances <= distances[true]))
