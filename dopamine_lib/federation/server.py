"""The step on a round's total: Algorithm 1, lines 13 to 15 and 21. It never sees one hospital's message."""

from typing import Any

import torch
from torch import Tensor

from dopamine_lib.data.function import find_function, users_code
from dopamine_lib.errors import InputError
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
        hospitals' changes. After E local steps whose sums are shared (``privacy.local_steps``) it is eta times less
        than the weighted mean of the local models' changes, so that line 15 makes it just that.
        """
        if self.setting.averages:
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

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a checkpoint holds of it: vectors, and the rest as plain data."""
        return {"w": self.w, "velocity": self.velocity, "mean": self.mean}, {"server_steps": self.steps}

    def restore(self, vectors: dict[str, Tensor], record: dict) -> None:
        """Go on from a ``state``. Raises KeyError or ValueError for a state of something else."""
        w, velocity, mean = (vectors[key].to(self.w.device) for key in ("w", "velocity", "mean"))
        if any(vector.shape != self.w.shape for vector in (w, velocity, mean)):
            raise ValueError(f"the model has {len(w)} parameters, not {len(self.w)}")
        self.w, self.velocity, self.mean, self.steps = w, velocity, mean, record["server_steps"]

    @property
    def model(self) -> Tensor:
        """The model handed out (d,): the final iterate, or the running mean of all of them."""
        return self.w if self.choice.averaging is None else self.mean

    def _move(self, change: Tensor) -> None:
        self._reach(self.w + change)

    def _reach(self, w: Tensor) -> None:
        self.w = w
        self.steps += 1
        if self.choice.averaging is not None:
            self.mean = torch.lerp(
                self.mean, self.w, (self.choice.averaging + 1) / (self.steps + self.choice.averaging)
            )


class OptimizingServer(Server):
    """A server that steps by an optimiser like torch's, ``module:name``, instead of lines 14, 15 and 21.

    It is called with the parameters and, as far as it takes them by name, ``lr`` and ``momentum`` of the choice, and
    sees gradients that are noised totals: what it makes of them is post-processing. Where hospitals train locally, the
    gradient is minus their models' mean change, and lr 1 (FedOpt: Reddi et al. 2021, algorithm 1).
    Raises InputError where it is no optimiser, and for whatever it raises.

    >>> from dopamine_lib.federation.settings import CHOICES, SETTINGS
    >>> choice = CHOICES["cnn"]["FSCDP"]  # learning rate 0.1
    >>> server = OptimizingServer(torch.zeros(2), SETTINGS["FSCDP"], choice, 100, optimizer="torch.optim:Adam")
    >>> server.gradient_step(torch.tensor([5.0, -0.01]))  # Adam's first step goes one learning rate, whatever the size
    >>> [round(value, 3) for value in server.w.tolist()]
    [-0.1, 0.1]
    """

    def __init__(self, start: Tensor, setting: Setting, choice: Choice, population: int, *, optimizer: str):
        super().__init__(start, setting, choice, population)
        self.name, self._parameter = optimizer, torch.nn.Parameter(start.clone())
        lr, momentum = (1.0, 0.0) if setting.averages else (choice.learning_rate, choice.momentum)
        self.optimizer = find_function(optimizer, "optimizer")([self._parameter], lr=lr, momentum=momentum)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            kind = type(self.optimizer).__name__
            raise InputError(f"optimizer {optimizer} gives a {kind}; it must give a torch.optim.Optimizer")

    def gradient_step(self, gradient: Tensor) -> None:
        """The optimiser's step on the average gradient (d,)."""
        self._parameter.data, self._parameter.grad = self.w.clone(), gradient
        with users_code(self.name, "optimizer"):
            self.optimizer.step()
        self._reach(self._parameter.detach().clone())

    def average_step(self, change: Tensor) -> None:
        """The optimiser's step on minus the weighted mean (d,) of the models' changes."""
        self.gradient_step(-change)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """As a ``Server``'s, with the optimiser's tensors and numbers."""
        vectors, record = super().state()
        kept = self.optimizer.state_dict()["state"].get(0, {})
        tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in kept.items() if key not in tensors}
        if not all(isinstance(value, (int, float, str, type(None))) for value in rest.values()):
            raise InputError(f"optimizer {self.name} keeps {', '.join(rest)} as its state: keep tensors and numbers")
        return vectors | {f"optimizer {key}": value for key, value in tensors.items()}, record | {"optimizer": rest}

    def restore(self, vectors: dict[str, Tensor], record: dict) -> None:
        """As a ``Server``'s."""
        super().restore(vectors, record)
        tensors = {key.removeprefix("optimizer "): value for key, value in vectors.items() if " " in key}
        kept: dict[str, Any] = {**tensors, **record["optimizer"]}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: kept} if kept else {}, "param_groups": groups})
