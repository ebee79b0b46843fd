"""A class-balanced loss that clipping does not undo: logit adjustment, by class counts released once with noise.

The logarithms of the classes' shares are added to a model's scores while it trains, and left out when it is used. Each
class then counts alike: the softmax of the scores alone is the posterior under equal shares (Menon et al. 2021, theorem
1 and Eq. 10). Weights on the loss would come to nothing here: where nearly every gradient is clipped, all are of length
C again afterwards. An added constant leaves clipping, and so every step's bound, as it was. It works less than it
would without clipping, which shortens the rare classes' long gradients most.

The shares are the patients', which costs privacy. They are asked for together with a head's mean features, in one
release; a patient's part of it is

    ( a features,  b onehot(class) )    with  a^2 + b^2 = 1

whose norm is at most 1, as that of the features alone; ``Choice.mean_noise_multiplier`` enters it into the ledger as an
event. b^2, ``Choice.counts``, is the class counts' part of that event: 1 where there are no features to centre.
"""

import math

import torch
from torch import Tensor

from dopamine_lib.errors import InputError

#: Nothing counts as rarer than this part of an equal share: noise can make a share arbitrarily small, or negative.
LEAST = 0.1


def join(features: Tensor, onehot: Tensor, counts: float) -> Tensor:
    """The release (p + classes,) out of a sum of features (p,) and one of classes (classes,), for b^2 = ``counts``.

    >>> join(torch.tensor([3.0]), torch.tensor([1.0, 2.0]), counts=0.64)
    tensor([1.8000, 0.8000, 1.6000])
    """
    return torch.cat([math.sqrt(1 - counts) * features, math.sqrt(counts) * onehot])


def take_apart(released: Tensor, classes: int, counts: float) -> tuple[Tensor, Tensor]:
    """The inverse of ``join``: features (p,), empty where ``counts`` is 1, and classes (classes,)."""
    features, onehot = released[:-classes], released[-classes:] / math.sqrt(counts)
    return features[:0] if counts == 1 else features / math.sqrt(1 - counts), onehot


def log_shares(shares: Tensor) -> Tensor:
    """What is added to the scores (classes,), from noisy shares of the patients (classes,).

    Raises InputError for shares that are not finite.

    >>> log_shares(torch.tensor([0.8, 0.21, -0.01])).exp()
    tensor([0.7668, 0.2013, 0.0319])
    """
    if not torch.isfinite(shares).all():
        raise InputError("the class counts are not finite, and no loss is balanced by them: begin the run again")
    shares = shares.clamp_min(LEAST / len(shares))
    return (shares / shares.sum()).log()
