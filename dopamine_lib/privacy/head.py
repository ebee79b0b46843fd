"""A linear head on fixed features: the DP-SGD step in closed form, so that thousands of steps take seconds."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dopamine_lib.privacy.dpsgd import Task, clip_factors

#: Centred features have a norm of about 0.6; twice as long, they train at the learning rates of the others.
STRETCH = 2.0


class HeadTask(Task):
    """A linear layer on fixed features (N, p), whose per-sample gradients have a closed form.

    With the error e = softmax(logits) - onehot(y), the gradient of (W, b) is (e x^T, e): its norm is
    |e| sqrt(|x|^2 + 1), and a sum of clipped gradients is one matrix product. Nothing is differentiated.
    """

    def __init__(self, net: nn.Linear, features: Tensor, labels: Tensor):
        super().__init__(net, lambda index: features[index], labels)
        self.onehot = F.one_hot(labels, net.out_features).float()
        self._fixed, self.mean, self.stretch = features, torch.zeros(features.shape[1]), 1.0
        self._set_features(features)

    @classmethod
    def stacked(cls, tasks: list["HeadTask"]) -> "HeadTask":
        """One task with the patients of all ``tasks``, one after the other, each as its own task sees them now."""
        one = copy.copy(tasks[0])
        one.features, one.norms, one.onehot = (
            torch.cat([getattr(task, name) for task in tasks]) for name in ("features", "norms", "onehot")
        )
        return one

    def feature_sum(self, index: Tensor) -> Tensor:
        """The sum (p,) of the features of the patients at ``index``; one patient moves it by 1 at most."""
        features = self._fixed[index]
        return (features * clip_factors(features.norm(dim=1), 1.0)[:, None]).sum(0)

    def centre_on(self, mean: Tensor) -> None:
        """Train on 2 (x - mean) from here on; w is then a head for those, and ``load`` gives the one for x.

        Features of different patients are alike. What they share takes most of every gradient's norm, and clipping
        and noise are measured against that norm: without the shared part the same noise hides less of the rest.
        """
        self.mean, self.stretch = mean, STRETCH
        self._set_features(STRETCH * (self._fixed - mean))

    def load(self, w: Tensor) -> None:
        """Put w (d,) into the net, as weights for the features as they are: W 2 (x - m) + b = 2 W x + (b - 2 W m)."""
        matrix = self._matrix(w)
        weight = self.stretch * matrix[:, :-1]
        with torch.no_grad():
            self.net.weight.copy_(weight)
            self.net.bias.copy_(matrix[:, -1] - weight @ self.mean)

    def _set_features(self, features: Tensor) -> None:
        self.features = torch.cat([features, torch.ones(len(features), 1)], dim=1)  # the bias is one more input
        self.norms = self.features.norm(dim=1)

    def clipped_sums(self, w: Tensor, index: Tensor, max_grad_norm: float, group=None, groups: int = 1) -> Tensor:
        return self._sums(*self._clipped_errors(w, index, max_grad_norm), group, groups)

    def _sums(self, x: Tensor, error: Tensor, group, groups: int) -> Tensor:
        """Each group's sum of e x^T as a vector (groups, d)."""
        if groups == 1:
            return self._vector(error.T @ x)[None]
        # one block of columns per group: e_i stands in its group's block, so one product makes every sum
        classes = error.shape[1]
        blocks = error.new_zeros(len(x), groups, classes)
        blocks[torch.arange(len(x)), group] = error
        return self._vector((blocks.flatten(1).T @ x).view(groups, classes, -1))

    def clipped_sums_each(self, w: Tensor, samples: list[Tensor], max_grad_norm: float) -> Tensor:
        """The clipped sum of each sample at a model of its own, in one pass: w (groups, d), returns (groups, d)."""
        index = pad_sequence(samples, batch_first=True)  # (groups, largest sample)
        sizes = torch.tensor([[len(sample)] for sample in samples])
        x, error = self._clipped_errors(w, index, max_grad_norm)
        error *= (torch.arange(index.shape[1]) < sizes)[:, :, None]  # what fills up a sample is nobody
        return self._vector(error.mT @ x)

    def logits(self, w: Tensor, index: Tensor) -> Tensor:
        return self.features[index] @ self._matrix(w).T

    def _clipped_errors(self, w: Tensor, index: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
        """Inputs x (..., B, p + 1) and scaled errors e (..., B, classes) whose products e x^T are clipped gradients.

        w (..., d) and index (..., B).
        """
        x = self.features.index_select(0, index.flatten())  # quicker than features[index]
        x = x.view(*index.shape, self.features.shape[1])
        error = torch.softmax(x @ self._matrix(w).mT, dim=-1) - self.onehot[index]
        if not math.isinf(max_grad_norm):
            error *= clip_factors(error.norm(dim=-1) * self.norms[index], max_grad_norm)[..., None]
        return x, error

    def _matrix(self, w: Tensor) -> Tensor:
        """(..., d) as (..., classes, p + 1), the bias in the last column."""
        classes = self.onehot.shape[1]
        weight = w[..., :-classes].unflatten(-1, (classes, -1))
        return torch.cat([weight, w[..., -classes:, None]], dim=-1)

    @staticmethod
    def _vector(matrix: Tensor) -> Tensor:
        """``_matrix`` undone."""
        return torch.cat([matrix[..., :-1].flatten(-2), matrix[..., -1]], dim=-1)
