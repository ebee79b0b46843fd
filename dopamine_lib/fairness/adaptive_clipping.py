"""Clip at a quantile of the gradients' norms, learned privately while training (Andrew et al. 2021).

The quantile is a choice too: half of a screening's patients are healthy and soon graded with confidence, so the median
norm falls to almost zero, and C with it. At a higher quantile, e.g. 0.7, C follows the patients that still teach
something.

A patient in a step's sample adds to the sum a clipped gradient g of norm at most C, and one bit: was g short enough
to be left alone? Both travel as one vector

    ( a g / C,  b (bit - 1/2) )    with  a^2 + b^2 / 4 = 1

of norm at most 1, and every coordinate of the sum gets noise N(0, z^2). So a step is still one sampled Gaussian of
noise multiplier z, and the ledger needs no new line. Separately, the gradients have noise multiplier z / a and the
count of bits has noise of standard deviation z / b, which is Andrew et al.'s theorem 1:
(z / a)^-2 + (2 z / b)^-2 = z^-2. The price of knowing where to clip is gradient noise that is larger by 1 / a.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.federation.server import Server
from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.privacy.dpsgd import shorten_rows
from dopamine_lib.privacy.head import HeadTask


@dataclass(frozen=True)
class AdaptiveClip:
    """How C follows the quantile.

    target  gamma: the share of gradients that should not be clipped
    rate    eta_C: log C moves by rate * (target - observed share) in a step
    budget  the part of z^-2, the privacy of a step, that the bits use
    start   the first C
    Raises InputError for a target or budget outside (0, 1), or a rate or start that is not positive.
    """

    target: float = 0.7
    rate: float = 0.05
    budget: float = 0.02
    start: float = 0.5

    def __post_init__(self):
        check_within("target quantile", self.target, 0, 1, "0.7 leaves seven of ten alone", high_open=True)
        check_within("rate of the clip", self.rate, 0, 10, "0.05 follows within a hundred steps")
        check_within("budget of the bits", self.budget, 0, 1, "0.02 leaves the gradients 98 %", high_open=True)
        check_within("first clip", self.start, 0, 1e6, "start at a clip that has worked")

    @property
    def gradient_scale(self) -> float:
        """a: gradients carry noise of z / a times the clip."""
        return math.sqrt(1 - self.budget)

    @property
    def bit_scale(self) -> float:
        """b: the count of bits carries noise of standard deviation z / b."""
        return 2 * math.sqrt(self.budget)

    def next(self, log_clip: Tensor, share: Tensor) -> Tensor:
        """log C after a step in which the noisy ``share`` of gradients was not clipped (Andrew et al., section 2.3)."""
        return log_clip - self.rate * (share - self.target)


class AdaptiveHead(HeadTask):
    """A head whose vector w (d + 1,) ends in log C, so that the server hands out the clip with the model.

    A patient's vector has norm ``max_grad_norm`` at most, as with any Task; here that is only the unit of messages,
    e.g. 1. For settings in which hospitals take no local steps.
    """

    def __init__(self, net: nn.Linear, features: Tensor, labels: Tensor, clip: AdaptiveClip):
        super().__init__(net, features, labels)
        self.clip = clip
        self.start = torch.cat([self.start, torch.tensor([math.log(clip.start)])])

    def clipped_sums(
        self, w: Tensor, index: Tensor, max_grad_norm: float, group: Tensor | None = None, groups: int = 1
    ) -> Tensor:
        """Sums (groups, d + 1) of the module's vectors (a g / C, b (bit - 1/2)), in units of ``max_grad_norm``."""
        check_within("max_grad_norm", max_grad_norm, 0, 1e6, "it is the unit of a message: take 1")
        clip = math.exp(w[-1])
        x, error = self._clipped_errors(w, index, math.inf)
        error = error.double()
        norms = error.norm(dim=1) * self.norms[index]
        a = self.clip.gradient_scale
        error = shorten_rows(error * (a / clip), norms * (a / clip), a).to(w.dtype)
        bits = (norms <= clip).to(w.dtype) - 0.5
        group = torch.zeros_like(index) if group is None else group
        counts = w.new_zeros(groups).index_add(0, group, bits)
        sums = self._sums(x, error, group, groups)
        return max_grad_norm * torch.cat([sums, self.clip.bit_scale * counts[:, None]], dim=1)

    def _matrix(self, w: Tensor) -> Tensor:
        return super()._matrix(w[:-1])


class AdaptiveServer(Server):
    """The server of an ``AdaptiveHead``: w (d + 1,) ends in log C, which follows a quantile of the gradients' norms.

    Handed to ``Training`` as ``server=``. It works on totals, which are noisy already, so it costs no privacy.
    """

    def __init__(self, start: Tensor, setting: Setting, choice: Choice, population: int, clip: AdaptiveClip):
        super().__init__(start, setting, choice, population)
        self.clip = clip

    @property
    def max_grad_norm(self) -> float:
        """The clip C of the next step."""
        return float(self.w[-1].exp())

    def gradient_step(self, gradient: Tensor) -> None:
        """A step of the model at the present clip, and one of the clip; ``gradient`` (d + 1,) is total / (q N)."""
        gradient = gradient / self.choice.max_grad_norm
        own = gradient[:-1] * (self.max_grad_norm / self.clip.gradient_scale)
        # the bits' sum over the expected batch: unbiased, and no count of who was sampled is needed
        share = 0.5 + gradient[-1] / self.clip.bit_scale
        self.velocity = self.choice.momentum * self.velocity + torch.cat([own, own.new_zeros(1)])
        change = -self.choice.learning_rate * self.velocity
        change[-1] = self.clip.next(self.w[-1], share) - self.w[-1]
        self._move(change)

    def average_step(self, change: Tensor) -> None:
        """Raises InputError: where hospitals take local steps their gradients' norms are not those of one model."""
        raise InputError("adaptive clipping needs one step a round; choose CDP or FSCDP")
