"""The total of a round: how hospitals' messages are added up, in the clear, under BFV, or behind masks (line 21).

One verb, ``total``, for every transport. This module has its interface and the sum in the clear; ``transports`` has
the encrypted and masked sums of one process, ``mpi.sums`` those between processes.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.encryption.codec import Codec
from dopamine_lib.federation.plan import Plan
from dopamine_lib.privacy.integer_noise import IntegerNoise

#: A hospital's message (d,): floats, or int64 where discrete noise has made it integers.
Message = Tensor | np.ndarray


class Aggregation(Protocol):
    """Adds up messages of d values."""

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor | None:
        """The sum (d,) of ``messages``, by hospital; None for a party that is not to learn it.

        Invited hospitals without a message have vanished. Raises AggregationAborted where too few are left.
        """


class PlainAggregation:
    """The sum in the clear: the party that adds sees every message."""

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
    """Sums of integers (in the clear, encrypted or masked), with floats made integers by a codec.

    codec  ``Plan.codec``
    """

    def __init__(self, sums: IntegerSum, codec: Codec | IntegerNoise):
        self.sums, self.codec = sums, codec

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """The exact total of the integers, decoded. RangeError names a value that does not fit."""
        integers = {k: to_integers(message, self.codec) for k, message in messages.items()}
        return decoded(self.sums.sum(round_number, invited, integers), self.codec)


def to_integers(message: Message, codec: Codec | IntegerNoise) -> np.ndarray:
    """A message as int64 (d,): encoded, unless discrete noise has made it integers already."""
    return message if isinstance(message, np.ndarray) else codec.encode(message.numpy())


def decoded(total: np.ndarray, codec: Codec | IntegerNoise) -> Tensor:
    """A total int64 (d,) as float32 (d,)."""
    return torch.from_numpy(codec.decode(total)).float()


def in_the_clear(plan: Plan) -> Aggregation:
    """A sum that hides nothing, with the plan's codec: for a simulation, and as the reference for the others."""
    return PlainAggregation() if plan.codec is None else IntegerAggregation(PlainSum(), plan.codec)
