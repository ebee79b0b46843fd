"""The server's model: it steps on totals, never on one hospital's message (aggregation.py adds those up)."""

import torch
from torch import Tensor

from dopamine_lib.federation.settings import Choice


class Server:
    """The global model: w_G, the momentum, and the running mean that is handed out.

    Momentum and learning rate act on the total, after decryption. Both are linear, so the model is the one
    Algorithm 1 gets by stepping at every hospital and averaging the weights.
    """

    def __init__(self, start: Tensor, choice: Choice):
        self.w, self.velocity, self.mean = start.clone(), torch.zeros_like(start), start.clone()
        self.choice, self.steps = choice, 0

    def gradient_step(self, gradient: Tensor) -> None:
        """Lines 14, 15 and 21 on the average gradient (d,): total / (q N)."""
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
