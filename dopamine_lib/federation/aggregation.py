"""The total of a round: how hospitals' messages are added up, in the clear, under BFV, or behind masks (line 21).

One verb, ``total``, for every transport. This module has its interface, the sum in the clear and what takes a sum's
place; ``transports`` has the encrypted and masked sums of one process, ``wires.sums`` those between processes.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.data.function import find_function, is_function
from dopamine_lib.errors import InputError
from dopamine_lib.federation.plan import Plan

#: A hospital's message (d,): int64, or floats where they are added in the clear and without privacy.
Message = Tensor | np.ndarray


class Aggregation(Protocol):
    """Adds up messages of d values."""

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor | None:
        """The sum (d,) of ``messages``, by hospital; None for a party that is not to learn it.

        Invited hospitals without a message have vanished. Raises AggregationAborted where too few are left.
        """


class PlainAggregation:
    """The sum of floats in the clear, for settings without privacy."""

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Tensor]) -> Tensor:
        """The sum of the messages."""
        return torch.stack(list(messages.values())).sum(0)


class IntegerSum(Protocol):
    """Adds up integers: ``PlainSum`` in the clear, or BfvSum, or MaskSum."""

    def sum(self, round_number: int, invited: Sequence[int], values: dict[int, np.ndarray]) -> np.ndarray:
        """The total int64 (d,) of ``values``, by hospital."""


class PlainSum:
    """The sum of integers in the clear: the reference for encrypted and masked sums."""

    def sum(self, round_number: int, invited: Sequence[int], values: dict[int, np.ndarray]) -> np.ndarray:
        """The total int64 (d,)."""
        return sum(values.values())


class IntegerAggregation:
    """Sums of integers (in the clear, encrypted or masked), decoded as the plan says."""

    def __init__(self, sums: IntegerSum, plan: Plan):
        self.sums, self.plan = sums, plan

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, np.ndarray]) -> Tensor:
        """The exact total of the integers, decoded."""
        if not isinstance(self.sums, PlainSum):  # encryption is the processor's work
            messages = {k: np.asarray(own if isinstance(own, np.ndarray) else own.cpu()) for k, own in messages.items()}
        return self.plan.decoded(round_number, self.sums.sum(round_number, invited, messages))


class OwnAggregation:
    """``module:function`` in the sum's place: it reads every message, and its answer is taken for their sum.

    It is called with the messages that arrived, float32 (m, d), and, as far as it takes them by name, with
    ``patients``, the declared numbers of those hospitals (m,), and ``round_number`` (0: that of the mean features).
    """

    def __init__(self, plan: Plan):
        self.plan, self.function = plan, find_function(plan.aggregation, "aggregation")

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """What the function gives (d,). Raises InputError for another shape, and for values that are not finite."""
        arrived = sorted(messages)
        sent = [
            messages[k] if self.plan.codec is None else self.plan.decoded(round_number, messages[k]) for k in arrived
        ]
        patients = torch.tensor([self.plan.sizes[k] for k in arrived])
        total = self.function(torch.stack(sent).cpu(), patients=patients, round_number=round_number)
        if not isinstance(total, Tensor) or total.shape != (self.plan.d,) or not torch.isfinite(total).all():
            shape = f"a tensor {tuple(total.shape)}" if isinstance(total, Tensor) else f"a {type(total).__name__}"
            given = "numbers that are not finite" if f"({self.plan.d},)" in shape else shape
            raise InputError(
                f"aggregation {self.plan.aggregation} gives {given} for {len(sent)} messages in round {round_number}; "
                f"it must give a tensor ({self.plan.d},) of finite numbers"
            )
        return total.float()


def in_the_clear(plan: Plan) -> Aggregation:
    """A sum that hides nothing: for a simulation, as the reference for the others, and what takes a sum's place."""
    if is_function(plan.aggregation):
        return OwnAggregation(plan)
    return PlainAggregation() if plan.codec is None else IntegerAggregation(PlainSum(), plan)
