"""Algorithm 1 between processes: every rank walks the loop of ``Training``, and does its own part of each round.

A hospital computes the gradients of its own patients, sends one message, gets the total back and steps the model. So
all hospitals hold the same model, and the server, which has none, needs none: it walks along to know whose turn it is
and what is charged. All parties must arrive: a rank that dies ends the run, so nothing is sized for dropouts.
"""

import json
import math
from dataclasses import asdict

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from dopamine_lib.federation.training import Progress, Training


class Elsewhere:
    """A hospital in another process: its number and how many patients it has, which is public."""

    def __init__(self, number: int, patients: int):
        self.number, self.patients = number, patients

    def __len__(self) -> int:
        return self.patients


class Part(Training):
    """What hospitals and server share.

    number  the hospital's, or None for the server
    sizes   patients of each hospital, by number; its own are the rows 0 ... N_k - 1 of its task
    end     its end of the aggregation (``sums.make_end``)
    The rest as for Training.
    """

    def __init__(self, number: int | None, sizes: list[int], end, **arguments):
        super().__init__(patients=[np.arange(size) for size in sizes], **arguments)
        self.number, self.end = number, end
        # Training made a Hospital of each, on rows that are not here: only its own remains
        self.hospitals = [
            own if k == number else Elsewhere(k, size)
            for k, (own, size) in enumerate(zip(self.hospitals, sizes, strict=True))
        ]


class HospitalPart(Part):
    """One hospital's part of a run."""

    @torch.no_grad()
    def _centre(self) -> None:
        own, share = self.hospitals[self.number], self.population / len(self.hospitals)
        features = own.centre_message((self.choice.centre or 0.0) / math.sqrt(self.least))
        message = torch.cat([features / share, features.new_zeros(self.task.d - len(features))])
        total = self.end.total(0, list(range(len(self.hospitals))), message)
        self._centre_on(total[: len(features)] * share / self.population)

    @torch.no_grad()
    def _round(self, number: int) -> None:
        """Lines 7 to 15 and 21 of Algorithm 1 for this hospital."""
        invited, own = self.schedule[number], self.hospitals[self.number]
        if not invited:  # all budgets are spent
            self.progress.aborted += 1
            return
        here, message = sum(len(self.hospitals[k]) for k in invited), None
        local = self.setting.local_steps > 1
        if self.number in invited:
            if local:
                message = own.train_locally(self.server.w, number) * (len(own) / self.population)
            else:
                message = own.message(self.server.w, number)
        total = self.end.total(number + 1, invited, message)
        if local:
            self.server.average_step(total * (self.population / here))
        else:
            self.server.gradient_step(total / (self.setting.sample_rate * here))

    def model(self) -> Tensor:
        """The model handed out, as the parameters (d,) of the net, whatever the features were centred on."""
        self.task.load(self.server.model)
        return torch.nn.utils.parameters_to_vector(self.task.net.parameters()).detach().clone()


class ServerPart(Part):
    """The server's part of a run."""

    def _centre(self) -> None:
        self.end.total(0, list(range(len(self.hospitals))))

    def _round(self, number: int) -> None:
        invited = self.schedule[number]
        if not invited:
            self.progress.aborted += 1
            return
        self.end.total(number + 1, invited)

    def finish(self, model: Tensor) -> None:
        """Take the final model (d,), the only one it ever sees."""
        self.server.w = self.server.mean = model

    def restore(self, vectors: dict[str, Tensor], record: dict) -> None:
        """Go on from a hospital's ``state`` without its vectors."""
        for ledger, charged in zip(self.ledgers, record["charged"], strict=True):
            ledger.charged = charged
        self.progress = Progress(**{key: record[key] for key in asdict(self.progress)})


def state_bytes(vectors: dict[str, Tensor], record: dict) -> bytes:
    """A ``state`` as bytes for other ranks."""
    text = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    return save({**{key: value.contiguous() for key, value in vectors.items()}, "record": text})


def read_state(data: bytes) -> tuple[dict[str, Tensor], dict]:
    """The inverse of ``state_bytes``."""
    vectors = load(data)
    return vectors, json.loads(vectors.pop("record").numpy().tobytes())
