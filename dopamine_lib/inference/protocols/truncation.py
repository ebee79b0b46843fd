"""Truncation without ReLU, and the way from Z_2^32 to Z_2^64: one round.

From the crypto-provider: a mask r (32 bits), and shares in the target ring of v[0] and v[1], where
v[1] = -(r >> shift) and v[0] = v[1] + msb(r) 2^(32 - shift). For step 3, by exclusive or: the thermometers of the two
upper nibbles of r (``comparison``), msb(r), two mask bits and their product.

    1. The patient adds 2^30 to its share, so that x is positive. Open m = x + r.
    2. m wrapped around exactly where msb(r) = 1 and msb(m) = 0; so x >> shift = (m >> shift) + v[msb m].
       The patient subtracts 2^30 >> shift again.
    3. Is x near the ring's end? m is the m' of ``comparison``, steps a and b: look up l2, l3 and e3. Nothing waits for
       the answer, so l2 and e3 of all truncations are opened at once, at the end, each under its mask bit.

Why this hides x: m is masked by a uniform r, used once; v is shared afresh; for step 3 see ``comparison``. The result
is rounded down or up at random, with the right mean, and is exact for shift = 0. Needs |x| < 2^30 and shift <= 30.

The other way, x << shift, each party goes alone, since it is a multiplication by a public number; so it does a sum.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.comparison import keep_outside, unpack
from dopamine_lib.inference.protocols.operation import (
    PATIENT,
    BufferLayout,
    Layer,
    Operation,
    Own,
    Party,
    Shape,
    Workspace,
)
from dopamine_lib.inference.protocols.sharing import RINGS

OFFSET = np.uint32(2**30)
#: Where the two upper nibbles that are compared begin.
UPPER = (23, 27)


class TruncationOperation(Operation):
    """x >> shift for an array of ``shape``, as shares in Z_2^bits."""

    rounds = 1
    messages = ("m = x + r",)

    def __init__(self, shape: Shape, shift: int, bits: int = 32):
        self.shape, self.shift, self.watched = shape, shift, prod(shape)
        self.ring, self.padded = RINGS[bits], -(-prod(shape) // 8) * 8
        packed = self.padded // 8
        shares = {
            "v": (self.ring, (2, *shape)),
            "thermometer": ("u2", (2, self.padded)),
            "top": ("u1", (packed,)),
            "product": ("u1", (packed,)),
        }
        self.provider = BufferLayout(r=("u4", shape), bits=("u1", (2, packed)))
        self.patient = BufferLayout(r=("u4", shape), bits=("u1", (2, packed)), **shares)
        self.corrections = BufferLayout(**shares)
        self.sent_by_patient = self.sent_by_provider = 4 * prod(shape)

    def deal(self, patient: Own, provider: Own, corrections: Own, weight_masks: list, space: Workspace) -> None:
        r = patient.r + provider.r
        v_1 = -(r >> self.shift).astype(self.ring)
        v_0 = v_1 + ((r >> 31).astype(self.ring) << (31 - self.shift) << 1)
        np.subtract(np.stack([v_0, v_1]), patient.v, out=corrections.v)
        r = self._padded(r, space)
        for k, by in enumerate(UPPER):
            nibble = (r >> by & 15).astype(np.uint16)
            corrections.thermometer[k] = patient.thermometer[k] ^ np.uint16(2**16 - 1) >> np.uint16(15) - nibble
        corrections.top[:] = patient.top ^ np.packbits(r >= 2**31, bitorder="little")
        corrections.product[:] = patient.product ^ np.bitwise_and(*(patient.bits ^ provider.bits))

    def run(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """Shares of x >> shift."""
        masked = x + own.r
        if party.number == PATIENT:
            masked += OFFSET
        m = party.open(tag, masked)
        y = np.where(m >= 2**31, own.v[1], own.v[0])
        if party.number == PATIENT:
            y += (m >> self.shift).astype(self.ring)
            y -= self.ring(OFFSET >> self.shift)
        self._ask(party, m, own)
        return y

    def _ask(self, party: Party, m: np.ndarray, own: Own) -> None:
        """Step 3, up to what is opened: this party's shares of e3 and l2, masked, and the rest of o."""
        planes, rest = np.empty((2, self.padded // 8), np.uint8), np.empty(self.padded // 8, np.uint8)
        m = self._padded(m, party.workspace)
        m -= OFFSET  # which the look-up adds
        top = unpack(own.top).astype(np.uint32)
        kernels.active().look_up_end(party.number, m, own.thermometer, top, planes, rest)
        planes ^= own.bits
        party.asked.append((self.watched, planes, rest, own))

    def _padded(self, x: np.ndarray, space: Workspace) -> np.ndarray:
        """A copy of x as a row (n,), n the padded count."""
        row = space.array("row", (self.padded,))
        row[: x.size], row[x.size :] = x.reshape(-1), 0
        return row


class RangeOperation(Operation):
    """Step 3's end, for truncations of these counts of elements, in their order: each was dealt all it takes."""

    rounds = 1
    messages = ("two masked bits",)

    def __init__(self, counts: Sequence[int]):
        self.sent_by_patient = self.sent_by_provider = sum(2 * -(-count // 8) for count in counts)

    def run(self, party: Party, tag: int, own: Own) -> None:
        """Hash this party's shares of whether values are near the ring's end."""
        opened = party.open(
            tag, np.concatenate([planes.reshape(-1) for _, planes, _, _ in party.asked]), np.bitwise_xor
        )
        for count, planes, rest, its in party.asked:
            bits, opened = opened[: planes.size].reshape(planes.shape), opened[planes.size :]
            keep_outside(party, count, bits, rest, its.bits, its.product)


@dataclass(frozen=True)
class Shift(Layer):
    """A layer that shifts by 0 to 30 bits."""

    shift: int

    def output_shape(self, *inputs: Shape) -> Shape:
        _check_shifts(self, (self.shift,))
        return inputs[0]


@dataclass(frozen=True)
class Truncate(Shift):
    """x >> shift."""

    input_limit = 2**30

    def operations(self, input_shape: Shape) -> list[Operation]:
        return [TruncationOperation(input_shape, self.shift)]

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return np.rint(inputs[0] / 2**self.shift)


@dataclass(frozen=True)
class Raise(Shift):
    """x << shift, by each party on its own."""

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return inputs[0] * 2**self.shift


@dataclass(frozen=True)
class Aligned(Layer):
    """Several values, each first multiplied by 2^shift so that they have one scale."""

    shifts: tuple[int, ...]

    def output_shape(self, *inputs: Shape) -> Shape:
        _check_shifts(self, self.shifts)
        if len(self.shifts) != len(inputs):
            raise InputError(f"layer '{self.name}': it shifts {len(self.shifts)} values, but reads {len(inputs)}")
        return inputs[0]

    def work(self, input_shape: Shape) -> int:
        return len(self.sources) * prod(self.shape)

    def aligned(self, inputs: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The values on one scale, one after the other: a plan may name one value hundreds of times."""
        return (x * 2**shift if shift else x for x, shift in zip(inputs, self.shifts, strict=True))


@dataclass(frozen=True)
class Sum(Aligned):
    """The sum of values of one shape."""

    torch_layers = ("Add",)

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        compiler.add(cls, name)

    def output_shape(self, *inputs: Shape) -> Shape:
        if len(set(inputs)) != 1:
            raise InputError(f"layer '{self.name}': it adds {list(inputs)}, whose shapes differ")
        return super().output_shape(*inputs)

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return functools.reduce(operator.add, self.aligned(inputs))


@dataclass(frozen=True)
class Concatenate(Aligned):
    """Values joined by channel."""

    torch_layers = ("Join",)

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        compiler.join(cls, name)

    def output_shape(self, *inputs: Shape) -> Shape:
        super().output_shape(*inputs)
        if len({shape[1:] for shape in inputs}) != 1:
            raise InputError(f"layer '{self.name}': it joins {list(inputs)}, whose heights and widths differ")
        return (sum(shape[0] for shape in inputs), *inputs[0][1:])

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return np.concatenate(list(self.aligned(inputs)))  # as large as what comes out


def _check_shifts(layer: Layer, shifts: tuple[int, ...]) -> None:
    if not all(0 <= shift <= 30 for shift in shifts):
        raise InputError(f"layer '{layer.name}' shifts by {shifts}; it must be by 0 to 30 bits")
