"""The step on a round's total: Algorithm 1, lines 13 to 15 and 21. It never sees one hospital's message."""

import torch
from torch import Tensor

from dopamine_lib.federation.settings import Choice, Setting


class Server:
    """The global model: w_G, the momentum, and the running mean that is handed out.

    Momentum and learning rate act on the total, after decryption. Both are linear, so the model is the one
    Algorithm 1 gets by stepping at every hospital and averaging the weights.

    start       w (d,) at the beginning; several models at once are (…, d)
    population  N, all hospitals' declared patients; one number, or one per model as a Tensor that broadcasts
    """

    def __init__(self, start: Tensor, setting: Setting, choice: Choice, population: int | Tensor):
        self.w, self.velocity, self.mean = start.clone(), torch.zeros_like(start), start.clone()
        self.setting, self.choice, self.population, self.steps = setting, choice, population, 0

    def step(self, total: Tensor, present: int | Tensor) -> None:
        """Step on a round's total (d,), which holds hospitals of ``present`` declared patients.

        In Algorithm 1 the total is divided by the declared expected batch, which is public; the true number of patients
        and the size of the batch that was drawn are not (register, row 2). In F and FPDP it is the weighted mean of the
        hospitals' changes.
        """
        if self.setting.local_steps > 1:
            self.average_step(total * (self.population / present))
        else:
            self.gradient_step(total / (self.setting.sample_rate * present))

    def gradient_step(self, gradient: Tensor) -> None:
        """Lines 14, 15 and 21 on the average gradient (d,)."""
        self.velocity = self.choice.momentum * self.velocity + gradient
        self._move(-self.choice.learning_rate * self.velocity)

    def average_step(self, change: Tensor) -> None:
        """Line 21 where hospitals trained locally: the weighted mean (d,) of their models' changes."""
        self._move(change)

    @property
    def model(self) -> Tensor:
        """The model handed out (d,): the final iterate, or the running mean of all of them."""
        return self.w if self.choice.averaging is None else self.mean

    def _move(self, change: Tensor) -> None:
        self.w = self.w + change
        self.steps += 1
        if self.choice.averaging is not None:
            self.mean = torch.lerp(
                self.mean, self.w, (self.choice.averaging + 1) / (self.steps + self.choice.averaging)
            )
