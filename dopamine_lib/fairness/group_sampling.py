"""Group-aware sampling: a hospital that samples some groups of patients less often than others.

Handed to ``Training`` as ``hospital=``. What the ledger holds stays true: no patient is sampled at more than the
setting's rate.
"""

from typing import Any

import torch
from torch import Tensor

from dopamine_lib.errors import InputError
from dopamine_lib.federation.hospital import Hospital


class ThinnedHospital(Hospital):
    """A hospital that drops a drawn patient again with a probability that depends on the patient's group.

    keep  float (N,) in (0, 1]: each image's probability of staying in a sample once drawn

    A patient is then in a step with probability q * keep, independently of all others, so the bound at the setting's
    q holds for everybody, and a group with keep < 1 has a smaller epsilon (that at q * keep). To favour a group,
    declare its q for the setting and thin the others. The group must follow from the patient's own record alone.
    Raises InputError for a probability outside (0, 1].
    """

    def __init__(self, *arguments: Any, keep: Tensor, **more: Any):
        super().__init__(*arguments, **more)
        self._keep = torch.as_tensor(keep, dtype=torch.float64)
        if not ((self._keep > 0) & (self._keep <= 1)).all():
            bad = self._keep[~((self._keep > 0) & (self._keep <= 1))][0].item()
            raise InputError(f"probability to keep a patient is {bad:g}, but must lie in (0, 1]: raise q instead")

    def sample(self, step: int) -> Tensor:
        """The thinned Poisson sample of this step, indices into the task."""
        drawn = super().sample(step)
        if len(drawn) == 0:
            return drawn
        stream = self._randomness.stream(self.plan.setting.name, self.run, self.number, "thin", step)
        return drawn[stream.uniform(len(drawn)) < self._keep[drawn]]
