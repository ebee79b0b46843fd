"""A class-balanced loss: rare grades weigh more, by class counts that are themselves released with noise.

A patient's gradient is weighted by its grade and clipped afterwards, so one patient still moves a sum by at most C and
the steps cost the same. The weights come from the patients' grades, which costs privacy: the counts are released
together with the mean features, once, before training. A patient's part of that release is

    ( a feature,  b onehot(grade) )    with  a^2 + b^2 = 1

whose norm is at most 1; ``Choice.mean_noise_multiplier`` enters it into the ledger as an event.
"""

import math

import torch
from torch import Tensor, nn

from dopamine_lib.errors import check_within
from dopamine_lib.privacy.head import HeadTask

#: No grade counts as rarer than this: noise can make a share arbitrarily small, or negative.
LEAST_SHARE = 0.02


def class_weights(shares: Tensor) -> Tensor:
    """Weights (classes,) that make grades count alike: proportional to 1 / share, with mean 1 over patients.

    >>> class_weights(torch.tensor([0.8, 0.2]))
    tensor([0.6250, 2.5000])
    """
    shares = shares.clamp_min(LEAST_SHARE)
    shares = shares / shares.sum()
    weights = 1 / shares
    return weights / (weights * shares).sum()


class BalancedHead(HeadTask):
    """A head trained with ``class_weights``.

    counts  b^2, the class counts' part of the first release's privacy; the mean features have the rest
    ``weights`` are 1 until ``centre_on`` is given the released counts. Raises InputError for values out of bounds.
    """

    def __init__(self, net: nn.Linear, features: Tensor, labels: Tensor, *, counts: float = 0.5):
        super().__init__(net, features, labels)
        check_within("budget of the class counts", counts, 0, 1, "0.5 is a half", high_open=True)
        self.scales = math.sqrt(1 - counts), math.sqrt(counts)

    def feature_sum(self, index: Tensor) -> Tensor:
        """The sum float64 (p + classes,) of the module's vectors; one person moves it by at most 1."""
        a, b = self.scales
        return torch.cat(
            [a * super().feature_sum(index), b * (self.onehot[index] * self.shares(index)[:, None]).sum(0)]
        )

    def centre_on(self, mean: Tensor) -> None:
        """Take the noisy mean features and class counts, both per patient, from the released (p + classes,)."""
        a, b = self.scales
        classes = len(self.weights)
        self.weights = class_weights(mean[-classes:] / b)
        super().centre_on(mean[:-classes] / a)
