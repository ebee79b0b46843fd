"""How hospitals' messages are added up: in the clear, under BFV, or behind masks, in floats or in integers.

One interface for all: a hospital encodes its message, and ``total`` gives the sum of those that arrived. In the
encrypted kinds the server sees no message; all parties live in this process, but what passes between them is bytes.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.encryption.codec import Codec, find_layout
from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.privacy.integer_noise import IntegerNoise, most_in_a_sum

AGGREGATIONS = ("plain", "bfv", "masks")
NOISES = ("float", "integer")
#: Integers on the way: slots of 16 bits for floats that are rounded, of 24 where the noise is in the integers.
LAYOUT = {"float": "packed", "integer": "wide"}


class Aggregation(Protocol):
    """Adds up messages of d values."""

    def encode(self, message):
        """A hospital's message (d,) as it is sent."""

    def total(self, round_number: int, invited: list[int], messages: dict) -> Tensor:
        """The sum (d,) of what arrived, by hospital; the other invited ones vanished. May raise AggregationAborted."""


class PlainAggregation:
    """The sum in the clear: whoever runs it sees every message."""

    def encode(self, message: Tensor) -> Tensor:
        """The message itself."""
        return message

    def total(self, round_number: int, invited: list[int], messages: dict[int, Tensor]) -> Tensor:
        """The sum of the messages."""
        return torch.stack(list(messages.values())).sum(0)


class IntegerAggregation:
    """Sums of integers (in the clear, encrypted or masked), with floats made integers by a codec.

    sums   adds int64 (d,): a BfvSum, MaskSum or PlainSum
    codec  a Codec, or the IntegerNoise whose messages are integers already
    """

    def __init__(self, sums, codec: Codec | IntegerNoise):
        self.sums, self.codec = sums, codec

    def encode(self, message) -> np.ndarray:
        """int64 (d,). RangeError names a value that does not fit."""
        return message if isinstance(message, np.ndarray) else self.codec.encode(message.numpy())

    def total(self, round_number: int, invited: list[int], messages: dict[int, np.ndarray]) -> Tensor:
        """The exact total of the integers, decoded."""
        return torch.from_numpy(self.codec.decode(self.sums.sum(round_number, invited, messages))).float()


class PlainSum:
    """Integers added in the clear: the reference for encrypted sums."""

    def sum(self, round_number: int, invited: list[int], values: dict[int, np.ndarray]) -> np.ndarray:
        """The total int64 (d,)."""
        return sum(values.values())


def layout_of(kind: str, noise: str) -> str:
    """The layout that an aggregation sends integers in."""
    return "ring32" if kind == "masks" else LAYOUT[noise]


def make_integer_noise(
    kind: str, setting: Setting, choice: Choice, sizes: list[int], d: int, least: int
) -> IntegerNoise:
    """Noise in the integers for messages of d values, as wide as the aggregation's layout allows.

    sizes  patients of each hospital
    """
    return IntegerNoise(
        setting.noise_multiplier,
        choice.max_grad_norm,
        len(sizes),
        d,
        patients=most_in_a_sum(setting.sample_rate, max(sizes)),
        total_range=find_layout(layout_of(kind, "integer")).total_range,
        sample_rate=setting.sample_rate,
        steps=setting.rounds,
        least=least,
    )


def make_aggregation(
    kind: str,
    choice: Choice,
    *,
    hospitals: int,
    d: int,
    least: int,
    integer: IntegerNoise | None = None,
    transcript=None,
) -> Aggregation:
    """The aggregation of that kind, with fresh keys.

    least    hospitals that must arrive in a round;  integer: noise that messages carry already as integers
    """
    if kind == "plain" and integer is None:
        return PlainAggregation()
    layout = layout_of(kind, "float" if integer is None else "integer")
    codec = integer or Codec(layout, hospitals=hospitals, bound=choice.reach or 16 * choice.max_grad_norm)
    if kind == "plain":
        return IntegerAggregation(PlainSum(), codec)
    least = max(2, least)  # a sum of one hides nothing
    if kind == "masks":
        from dopamine_lib.encryption.masks import MaskSum

        return IntegerAggregation(MaskSum(hospitals, d, least=least, transcript=transcript), codec)
    from dopamine_lib.encryption.aggregation import BfvSum  # tenseal takes a second to load

    # noise may take one hospital past its share of the range: what overflows was computed and charged to delta
    limit = None if integer is None else integer.total_range
    return IntegerAggregation(BfvSum(hospitals, d, layout, least=least, limit=limit, transcript=transcript), codec)
