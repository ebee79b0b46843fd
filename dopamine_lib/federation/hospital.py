"""A hospital: the only party that touches its patients. Algorithm 1, lines 7 to 13."""

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.privacy.dpsgd import GaussianNoise, Task
from dopamine_lib.privacy.integer_noise import IntegerNoise
from dopamine_lib.privacy.randomness import Randomness


class Hospital:
    """One of K hospitals with its own patients.

    number    k, from 0
    patients  int64 (N_k,), indices of its images in the task
    shares    how many hospitals' noise makes up sigma: K, or as many as must survive a round; 1 where a hospital
              protects its message alone
    integer   where the noise is added in the integers, after rounding
    run       names the run, so that two runs from one seed draw different samples
    """

    def __init__(
        self,
        number: int,
        patients: np.ndarray,
        task: Task,
        setting: Setting,
        choice: Choice,
        randomness: Randomness,
        *,
        shares: int,
        run: int = 0,
        integer: IntegerNoise | None = None,
    ):
        self.number, self.patients, self.task = number, torch.as_tensor(patients), task
        self.setting, self.choice, self.run = setting, choice, run
        terms = (setting.noise_multiplier, choice.max_grad_norm, shares, setting.sample_rate, task.d)
        self.noise = (integer or GaussianNoise(*terms)) if setting.private else None
        self._randomness = randomness
        # draws are made for a block of steps at once: for a small model the calls cost more than the numbers
        together = setting.local_steps if setting.local_steps > 1 else 32
        self._block, self._drawn = max(1, min(together, 2**17 // task.d)), None

    def __len__(self) -> int:
        return len(self.patients)

    def sample(self, step: int) -> Tensor:
        """The Poisson sample of this step, indices into the task (line 8)."""
        return self._draw(step)[0]

    def noised(self, clipped_sum: Tensor, step: int) -> Tensor | np.ndarray:
        """The clipped sum (d,) with this hospital's share of the noise (line 13); unchanged without privacy.

        Sum and noise are added whatever the sample's size: an empty batch is noised like any other. Integers,
        int64 (d,), where the noise is in the integers.
        """
        return clipped_sum if self.noise is None else self.noise.combine(clipped_sum, self._draw(step)[1])

    def centre_message(self, noise_multiplier: float) -> Tensor:
        """The noisy sum (p,) of the features of all its patients, each of norm 1 at most."""
        total = self.task.feature_sum(self.patients)
        if not self.setting.private:
            return total
        stream = self._randomness.stream(self.setting.name, self.run, self.number, "centre")
        return total + stream.normal(len(total), noise_multiplier)

    def message(self, w: Tensor, step: int) -> Tensor:
        """What is sent in one round of Algorithm 1: the clipped, noised gradient sum (d,), lines 7 to 13.

        The sum, not the stepped weights: those would carry this hospital's earlier rounds along (register, 19).
        """
        return self.noised(self.task.clipped_sums(w, self.sample(step), self.choice.max_grad_norm)[0], step)

    def train_locally(self, w: Tensor, round_number: int) -> Tensor:
        """What is sent in F and FPDP: the change (d,) of the model over ``local_steps`` steps of its own.

        Momentum starts at zero in every round, so a message depends on this round's samples alone.
        """
        expected_batch = self.setting.sample_rate * len(self)
        local, velocity = w, torch.zeros_like(w)
        for i in range(self.setting.local_steps):
            gradient = self.message(local, round_number * self.setting.local_steps + i) / expected_batch
            velocity = self.choice.momentum * velocity + gradient
            local = local - self.choice.learning_rate * velocity
        return local - w

    def _draw(self, step: int) -> tuple[Tensor, Tensor | tuple | None]:
        """The sample of ``step``, indices into the task, and its noise, both from the stream of the step's block."""
        number, at = divmod(step, self._block)
        if self._drawn != number:
            stream = self._randomness.stream(self.setting.name, self.run, self.number, number)
            present = stream.uniform(self._block * len(self)).view(self._block, -1) < self.setting.sample_rate
            who, sizes = self.patients[present.nonzero()[:, 1]], present.sum(1)
            self._samples = who.split(sizes.tolist())
            self._noise = [None] * self._block if self.noise is None else self.noise.draw(stream, self._block)
            self._drawn = number
        return self._samples[at], self._noise[at]
