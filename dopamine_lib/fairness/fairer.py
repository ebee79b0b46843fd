"""Parties for fairer training: hospitals that sample some groups less than others, a server that follows a clip.

Handed to ``Training`` as ``hospital=`` and ``server=``. Neither changes what the ledger must hold: a setting's sample
rate and noise multiplier stay true for every patient.
"""

import torch
from torch import Tensor

from dopamine_lib.errors import InputError
from dopamine_lib.fairness.adaptive_clipping import AdaptiveClip
from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.server import Server
from dopamine_lib.federation.settings import Choice, Setting


class ThinnedHospital(Hospital):
    """A hospital that drops a drawn patient again with a probability that its group decides: group-aware sampling.

    keep  float (N,) in (0, 1], for each image of the task the probability to stay in a sample once drawn

    A patient is then in a step with probability q * keep, independently of all others, so the bound at the setting's
    q holds for everybody and for a group with keep < 1 a smaller one does too (``epsilon`` at q * keep). To favour a
    group, declare a q that is its own and thin the others. The group must follow from the patient's own record alone.
    Raises InputError for a probability outside (0, 1].
    """

    def __init__(self, *arguments, keep: Tensor, **more):
        super().__init__(*arguments, **more)
        self._keep = torch.as_tensor(keep, dtype=torch.float64)
        if not ((self._keep > 0) & (self._keep <= 1)).all():
            bad = self._keep[~((self._keep > 0) & (self._keep <= 1))][0].item()
            raise InputError(f"probability to keep a patient is {bad:g}, but must lie in (0, 1]: raise q instead")

    def sample(self, step: int) -> Tensor:
        drawn = super().sample(step)
        if len(drawn) == 0:
            return drawn
        stream = self._randomness.stream(self.plan.setting.name, self.run, self.number, "thin", step)
        return drawn[stream.uniform(len(drawn)) < self._keep[drawn]]


class AdaptiveServer(Server):
    """The server of an ``AdaptiveHead``: w (d + 1,) ends in log C, which follows a quantile of the gradients' norms.

    It works on totals as any server does, on what is already noisy, so it costs no privacy.
    """

    def __init__(self, start: Tensor, setting: Setting, choice: Choice, population: int, clip: AdaptiveClip):
        super().__init__(start, setting, choice, population)
        self.clip = clip

    @property
    def max_grad_norm(self) -> float:
        """The clip C of the next step."""
        return float(self.w[-1].exp())

    def gradient_step(self, gradient: Tensor) -> None:
        """A step of the model at today's clip, and of the clip; ``gradient`` (d + 1,) is total / (q N)."""
        gradient = gradient / self.choice.max_grad_norm
        own = gradient[:-1] * (self.max_grad_norm / self.clip.gradient_scale)
        # the bits' sum over the expected batch: unbiased, and no count of who was sampled is needed
        share = 0.5 + gradient[-1] / self.clip.bit_scale
        self.velocity = self.choice.momentum * self.velocity + torch.cat([own, own.new_zeros(1)])
        change = -self.choice.learning_rate * self.velocity
        change[-1] = self.clip.next(self.w[-1], share) - self.w[-1]
        self._move(change)

    def average_step(self, change: Tensor) -> None:
        """Refused: where hospitals take steps alone their norms are not of one model."""
        raise InputError("adaptive clipping needs one step a round; choose CDP or FSCDP")
