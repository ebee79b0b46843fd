"""A linear head on fixed features: the DP-SGD step in closed form, so that thousands of steps take seconds."""

import logging
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopamine_lib.errors import InputError
from dopamine_lib.privacy.dpsgd import Task, shorten_rows
from dopamine_lib.privacy.float_sums import most_together, sum_type
from dopamine_lib.privacy.local_steps import local_sum

#: Centred features have norms of about 0.6; stretched by this, they train at the learning rates of uncentred ones.
STRETCH = 2.0


def unit_rows(features: Tensor) -> Tensor:
    """Features (N, p), each row shortened to norm 1 if it is longer, and zero if it is not finite."""
    finite = torch.where(_norms(features).isfinite()[:, None], features, 0)
    return shorten_rows(finite, _norms(finite), 1.0)


def _norms(rows: Tensor) -> Tensor:
    """Norms (N,) of rows (N, p) in float64: exact, and without overflow."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def for_raw_features(matrix: Tensor, mean: Tensor, stretch: float) -> Tensor:
    """A head (…, classes, p + 1) for stretched, centred features as one for the features as they are.

    With a for ``stretch`` and m (…, p) for ``mean``: W a (x - m) + b = a W x + (b - a W m); b is the last column.
    """
    weight = stretch * matrix[..., :-1]
    bias = matrix[..., -1] - (weight @ mean[..., None])[..., 0]
    return torch.cat([weight, bias[..., None]], dim=-1)


class HeadTask(Task):
    """A linear layer on fixed features (N, p), whose per-sample gradients have a closed form.

    With the error e = softmax(logits) - onehot(y), the gradient of (W, b) is (e x^T, e): its norm is
    |e| sqrt(|x|^2 + 1). Nothing is differentiated.
    """

    threads = 1

    def __init__(self, net: nn.Linear, features: Tensor, labels: Tensor):
        super().__init__(net, lambda index: features[index], labels, classes=net.out_features)
        self.onehot = F.one_hot(labels, net.out_features).to(features.dtype)
        self.offset = features.new_zeros(net.out_features)
        self._fixed, self.mean, self.stretch = features, features.new_zeros(features.shape[1]), 1.0
        self._set_features(features)

    def feature_sum(self, index: Tensor) -> Tensor:
        """The sum float64 (p,) of persons' features, for all images of theirs at ``index``; one moves it by at most 1.

        Several images of one person stand for it as their mean.
        """
        return (unit_rows(self._fixed[index]) * self.shares(index)[:, None]).sum(0)

    def centre_on(self, mean: Tensor) -> None:
        """Train on 2 (x - mean) from now on; w is then a head for these, and ``load`` turns it into one for x.

        Features of different patients are alike. What they share takes up most of every gradient's norm, and clipping
        and noise are relative to that norm: without the shared part the same noise hides less of the rest.
        Raises InputError for a mean that is not finite.
        """
        if not torch.isfinite(mean).all():
            raise InputError("the mean features are not finite, and nobody is centred on them: begin the run again")
        self.mean, self.stretch = mean, STRETCH
        self._set_features(STRETCH * (self._fixed - mean))

    def load(self, w: Tensor) -> None:
        """Write w (d,) into the net, as a head for the features as given."""
        matrix = for_raw_features(self._matrix(w), self.mean, self.stretch)
        with torch.no_grad():
            self.net.weight.copy_(matrix[:, :-1])
            self.net.bias.copy_(matrix[:, -1])

    def _set_features(self, features: Tensor) -> None:
        self.features = F.pad(features, (0, 1), value=1.0)  # the bias is one more input
        self.features[~_norms(features).isfinite()] = 0  # such a patient has no gradient
        self.norms = _norms(self.features)

    def clipped_sums(
        self, w: Tensor, index: Tensor, max_grad_norm: float, group: Tensor | None = None, groups: int = 1
    ) -> Tensor:
        """As for any Task: by ``head_loop`` on a CPU with numba, else by ``product_sums``."""
        add_clipped = _loop()
        if add_clipped is None or w.device.type != "cpu":
            return self.product_sums(w, index, max_grad_norm, group, groups)
        sums = w.new_zeros(groups, self.d, dtype=sum_type(most_together(index, group), w.dtype))
        group = torch.zeros_like(index) if group is None else group
        head = w.detach().numpy(), self.features.numpy(), self.labels.numpy(), self.offset.numpy(), self.norms.numpy()
        add_clipped(*head, index.numpy(), group.numpy(), float(max_grad_norm), sums.numpy())
        return sums

    def product_sums(
        self, w: Tensor, index: Tensor, max_grad_norm: float, group: Tensor | None = None, groups: int = 1
    ) -> Tensor:
        """``clipped_sums`` as matrix products: for a GPU, and where numba is missing."""
        return self._sums(*self._clipped_errors(w, index, max_grad_norm), group, groups)

    def local_sum(self, w: Tensor, samples: Sequence[Tensor], max_grad_norm: float, eta: float) -> Tensor:
        """The sum of gradients float64 (d,) of steps from w through ``samples``: ``local_steps.local_sum``."""
        terms = self.labels, self.offset, samples, max_grad_norm, eta
        matrix = local_sum(self._matrix(w), self.features, *terms)
        return torch.cat([matrix[:, :-1].flatten(), matrix[:, -1]])

    def logits(self, w: Tensor, index: Tensor) -> Tensor:
        """As for any Task."""
        return self.features[index] @ self._matrix(w).T

    def _exact_logits(self, w: Tensor, index: Tensor) -> Tensor:
        return self.features[index].double() @ self._matrix(w).double().T

    def _batch(self, index: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.features[index, :-1], self.labels[index]  # centred, as w is for them

    def _clipped_errors(self, w: Tensor, index: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
        """Inputs x (B, p + 1) and scaled errors e (B, classes) whose products e x^T are clipped gradients."""
        x = self.features[index]
        error = torch.softmax(x @ self._matrix(w).T + self.offset.to(w), dim=1) - self.onehot[index]
        return x, shorten_rows(error, _norms(error) * self.norms[index], max_grad_norm)

    def _sums(self, x: Tensor, error: Tensor, group: Tensor | None, groups: int) -> Tensor:
        """Each group's sum of e x^T, as (groups, d), for x (B, p + 1), error (B, classes) and group (B,) or None."""
        # one block of columns per group: e_i stands in its group's block, so one product gives every sum
        classes, kind = error.shape[1], sum_type(most_together(error, group), error.dtype)
        blocks = error.new_zeros(len(x), groups, classes, dtype=kind)
        blocks[torch.arange(len(x)), 0 if group is None else group] = error.to(kind)
        matrix = (blocks.flatten(1).T @ x.to(kind)).view(groups, classes, -1)
        return torch.cat([matrix[..., :-1].flatten(1), matrix[..., -1]], dim=1)

    def _matrix(self, w: Tensor) -> Tensor:
        """w (d,) as (classes, p + 1), the biases in the last column."""
        classes = self.onehot.shape[1]
        return torch.cat([w[:-classes].view(classes, -1), w[-classes:, None]], dim=1)


@cache
def _loop():
    """``head_loop.add_clipped``; None where numba is missing, with one warning per process."""
    try:
        from dopamine_lib.privacy.head_loop import add_clipped

        return add_clipped
    except ImportError:
        logging.getLogger(__name__).warning(
            "numba cannot be imported: a head trains through PyTorch, several times slower; pip install numba"
        )
