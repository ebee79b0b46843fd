"""Several local steps of any network under one round's noise: a trajectory for each patient, clipped once.

A hospital takes the model w of a round and one Poisson sample. Each sampled patient i starts from w and takes E steps
on their own loss l_i alone; what is sent is the sum of the clipped mean gradients of these trajectories:

    w_0 = w,   w_(e+1) = w_e - eta grad l_i(w_e),   u_i = (w - w_E) / (E eta) = mean of grad l_i(w_0), ..., l_i(w_(E-1))
    message = sum over i of u_i / max(1, |u_i| / C),  and a share of noise of sigma C

What may one patient change? u_i is computed from w, which everybody knows, and from patient i; nobody else's trajectory
depends on it. So the sum moves by at most C with a patient more or less, whatever E, eta, the network and its loss are:
a round is the sampled Gaussian mechanism of a single step, and costs what that costs. This is DP-FedAvg (McMahan,
Ramage, Talwar, Zhang 2018, algorithm 1) whose clients are patients. With eta a server's learning rate over E, the
server's step averages the patients' own models, as far as they are not clipped.

What the proof forbids: a trajectory that goes on where another patient's ended, as in ``local_steps``, where a convex
loss bounds what comes of that; and a clip for each step alone, after which the sum of E gradients may be E C long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dopamine_lib.errors import InputError


def mean_gradients(
    net: nn.Module,
    parameters: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    offset: Tensor | float,
    steps: int,
    eta: float,
) -> Tensor:
    """u (B, d), unclipped, of all trajectories, for inputs x (B, A, ...) and labels y (B,); ``offset`` as in Task.

    A patient's loss is the mean over A inputs: an image alone, or views of it (``augmentation``).
    Raises InputError for a net that torch.func cannot vectorise over patients.

    >>> net = nn.Linear(1, 2)
    >>> zero = {name: torch.zeros_like(weight) for name, weight in net.named_parameters()}
    >>> at_once = (torch.tensor([[[1.0]]]), torch.tensor([0]), 0.0)
    >>> mean_gradients(net, zero, *at_once, steps=1, eta=1.0).tolist()
    [[-0.5, 0.5, -0.5, 0.5]]
    >>> mean_gradients(net, zero, *at_once, steps=2, eta=1.0)[0, 0]  # the second gradient is -0.1192
    tensor(-0.3096)
    """

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, own, (x,)) + offset, y.expand(len(x)))

    def trajectory(start: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        own, total = start, 0.0
        for _ in range(steps):
            gradients = grad(loss)(own, x, y)
            own = {name: own[name] - eta * gradients[name] for name in own}
            total = total + torch.cat([gradient.flatten() for gradient in gradients.values()])
        return total / steps

    try:
        return vmap(trajectory, in_dims=(None, 0, 0))(parameters, x, y)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the network cannot take steps patient by patient ({reason}): take 1 local step") from error
