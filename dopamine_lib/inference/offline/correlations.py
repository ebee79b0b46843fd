"""The correlated randomness of every operation but convolutions, made by patient and provider from oblivious transfers.

Two steps, each a function of a bit c that the patient chose and of something that the provider knows (``transfer``;
K_0, K_1 the provider's pads, K_c the patient's):

    product   shares of c x for the provider's word x: it sends d = x + K_0 - K_1 and keeps -K_0; the patient has
              K_c + c d.
    look-up   shares by exclusive or of F[p ^ q], F a public table of 2^k words: p is k of the patient's bits, q the
              provider's. The pads of the k bits make 2^k pads, of which the patient has the one with the number p. The
              provider sends F[i ^ q] under pad i, for i = 1, 2 …, and pad 0 makes its own share.

A comparison (``protocols.comparison``), for each element, from the patient's bits p_0 … p_31, rho_0 and six for masks,
and the provider's q_0 … q_31, rho_1 and six: 39 transfers, 27 where the lower 12 bits of r are left out (coarse).

    1. r has the bits p_i ^ q_i. As a number p ^ q = p + q - 2 p q, so one product for each bit gives shares of r, of
       r >> f, and of msb(r); and of rho, whose bits are rho_0 and rho_1.
    2. Thermometers of the nibbles of r, and products of mask bits, are look-ups.
    3. sigma = rho ^ msb(r), each party with its own bits.
    4. rho s, for s = r (maximum) or s[1], msb(r) (ReLU): with s = s_0 + s_1, (rho_0 ^ rho_1) s_1 is rho_1 s_1 and a
       product of the patient's bit with (1 - 2 rho_1) s_1; (rho_0 ^ rho_1) s_0 the same with exchanged roles, for which
       the provider chooses in one transfer of its own.

Why this hides: all that is sent is either columns of an extension or masked by a pad that the receiver does not have.
What either party ends with is uniform given what the other has, as from the crypto-provider. 0.75 to 1 kilobyte an
element; the crypto-provider's corrections have 18 to 26 bytes.
"""

from math import prod

import numpy as np

from dopamine_lib.inference.offline.transfer import Chooser, Pads, Sender
from dopamine_lib.inference.protocols.channel import Channel
from dopamine_lib.inference.protocols.comparison import (
    E1,
    E2,
    E3,
    L0,
    L1,
    L2,
    PRODUCTS,
    RANGE,
    SIGMA,
    Comparison,
)
from dopamine_lib.inference.protocols.normalised import NormalisedOperation
from dopamine_lib.inference.protocols.operation import PATIENT, BufferLayout, Own
from dopamine_lib.inference.protocols.randomness import fill, fresh_seed
from dopamine_lib.inference.protocols.relu import ReLUOperation
from dopamine_lib.inference.protocols.room import RoomOperation, times
from dopamine_lib.inference.protocols.truncation import UPPER, TruncationOperation

Words = np.ndarray
#: Elements worked on at once.
BLOCK = 2**14
#: Bits of r; behind them, less those that are left out, come a comparison's rho and mask bits.
WORD = 32
#: Uses of pads by look-ups; products use them as number 0, or, of a vector, from 0 on.
NIBBLES, GROUPS = 1, 2
#: The mask bits whose products are looked up together.
TOGETHER = ((L0, E1, E2, E3), (L1, E2, E3), (L2, E3))
#: The two mask bits of values that are watched; their product is the last one.
WATCHED = (RANGE.start, RANGE.start + 1)
#: Thermometers of 0 … 15.
THERMOMETERS = np.uint16(2**16 - 1) >> np.arange(16, dtype=np.uint16)[::-1]


def products_of(group: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
    """Which of ``PRODUCTS`` one look-up gives: their numbers, and its table, with the first in each word's bit 0.

    >>> numbers, table = products_of((L2, E3))
    >>> [sorted(PRODUCTS[i]) for i in numbers], table.tolist()
    ([[4, 5]], [0, 0, 0, 1])
    """
    if group == WATCHED:
        return [len(PRODUCTS)], np.array([0, 0, 0, 1], np.uint16)
    numbers = [i for i, chosen in enumerate(PRODUCTS) if next(g for g in TOGETHER if chosen <= set(g)) == group]
    table = np.zeros(2 ** len(group), np.uint16)
    for at in range(len(table)):
        set_bits = {bit for j, bit in enumerate(group) if at >> j & 1}
        table[at] = sum((PRODUCTS[i] <= set_bits) << k for k, i in enumerate(numbers))
    return numbers, table


class Direction:
    """Products and look-ups of one session in which always the same party is the chooser; both parties call alike."""

    def __init__(self, chooser: bool, channel: Channel, tag: int):
        self.chooser, self._channel, self._tag = chooser, channel, tag
        self._ends = Chooser(channel, tag) if chooser else Sender(channel, tag)
        self._pads: Pads | None = None
        self._buffer = np.empty(0, np.uint8)

    def extend(self, choices: np.ndarray) -> None:
        """New transfers, for packed bits uint8 (planes, n / 8): of the sender's own only the shape counts."""
        planes, size = choices.shape
        self._pads = self._ends.extend(choices) if self.chooser else self._ends.extend(planes, 8 * size)

    def message(self, **fields: tuple) -> Own:
        """The arrays of one message of the sender's, to be filled by it and ``sent``; the chooser has received them."""
        layout = BufferLayout(**fields)
        self._buffer = np.zeros(layout.nbytes, np.uint8)
        if self.chooser:
            self._channel.receive(self._tag, self._buffer)
        return Own(**layout.arrays(self._buffer))

    def sent(self) -> None:
        """The message is full."""
        if not self.chooser:
            self._channel.send(self._tag, self._buffer)

    def product(self, d: np.ndarray, planes: slice, word: int, c: np.ndarray, x: np.ndarray, use: int = 0) -> Words:
        """A share of c x: the chooser's bits c and the sender's words x, both (planes, n); d is the message's part."""
        pads = [pad[..., word] for pad in self._pads.of(planes, use, d.dtype)]
        if self.chooser:
            return pads[0] + c * d
        d[:] = x + pads[0] - pads[1]
        return -pads[0]

    def binary_product(self, d: np.ndarray, c: np.ndarray, x: np.ndarray) -> Words:
        """The same for words whose sum is their exclusive or, of all planes."""
        pads = [pad[..., 0] for pad in self._pads.of(slice(None), 0, d.dtype)]
        if self.chooser:
            return pads[0] ^ c * d
        d[:] = x ^ pads[0] ^ pads[1]
        return pads[0]

    def look_up(self, words: np.ndarray, planes: list[int], use: int, bits: np.ndarray, table: np.ndarray) -> Words:
        """A share of table[p ^ q]: words (n,) for the bits p, q (k, n) of both; ``words`` is the message's part."""
        index = sum(plane.astype(np.int64) << j for j, plane in enumerate(bits))
        pads = self._pads.of(planes, use, np.uint16)
        if self.chooser:
            here = np.arange(len(index))
            own = np.bitwise_xor.reduce([pad[here, _without(index, j)] for j, pad in enumerate(pads[0])])
            return np.where(index, words[index - 1, here], 0) ^ own
        pads = [
            np.bitwise_xor.reduce([pads[i >> j & 1][j, :, _without(i, j)] for j in range(len(bits))])
            for i in range(len(table))
        ]
        own = pads[0] ^ table[index]
        for i in range(1, len(table)):
            words[i - 1] = table[i ^ index] ^ own ^ pads[i]
        return own


def _without(index: int | np.ndarray, j: int) -> int | np.ndarray:
    """A number without its bit j."""
    return index & (1 << j) - 1 | index >> j + 1 << j


class Correlations:
    """One party's side for one session. ``number`` says whose; both parties call the same methods in the same order."""

    def __init__(self, number: int, channel: Channel, tag: int):
        first = number == PATIENT
        self._forward, self._backward = (Direction(chooses, channel, tag) for chooses in (first, not first))
        self._key, self._draws = fresh_seed(), 0

    def _draw(self, *shape: int, dtype: type = np.uint8) -> np.ndarray:
        drawn = np.empty(shape, dtype)
        fill(drawn.reshape(-1), self._key, self._draws)
        self._draws += 1
        return drawn

    def _numbers(self, message: Own, bits: np.ndarray, shift: int, first: int = 0) -> tuple[Words, Words]:
        """Step 1: shares of r uint32 (n,), and in the ring of ``message.d`` of r >> shift.

        bits  of r, from bit number ``first`` <= shift on; those before it are 0 in r and in both shares
        """
        ring, count = message.d.dtype.type, WORD - first
        weights = np.array([1 << (i - (shift if i >= shift else first)) for i in range(first, WORD)], ring)[:, None]
        own = weights * bits[:count]
        own += self._forward.product(message.d, slice(count), 0, bits[:count], -(own + own))
        below = shift - first
        upper, low = (part.sum(0, dtype=ring) for part in (own[below:], own[:below]))
        return ((upper << ring(below)) + low << ring(first)).astype(np.uint32), upper

    def _top(self, message: Own, bits: np.ndarray, last: int) -> Words:
        """Step 1: shares (n,) of msb(r), plane number ``last`` of its bits, in the ring of ``message.t``."""
        own, ahead = bits[last:][:1].astype(message.t.dtype), message.d.itemsize // message.t.itemsize
        return (own + self._forward.product(message.t, slice(last, last + 1), ahead, own, -(own + own)))[0]

    def comparison(self, operation: Comparison, own: Own) -> None:
        """Fill all that a party holds for a comparison."""
        for start in range(0, operation.padded, BLOCK):
            part = slice(start, min(start + BLOCK, operation.padded))
            self._compare(operation, own, part, slice(part.start // 8, part.stop // 8))

    def _compare(self, operation: Comparison, own: Own, part: slice, packed: slice) -> None:
        n, forward = part.stop - part.start, self._forward
        relu = isinstance(operation, ReLUOperation)
        shift = operation.shift if relu else operation.coarse
        masks = [bit for bit in range(len(own.bits)) if bit != SIGMA]
        together = (*TOGETHER, WATCHED) if operation.watched else TOGETHER
        rho_at = WORD - operation.coarse
        masks_at = rho_at + 1
        choices = self._draw(masks_at + len(masks), n // 8)
        bits = np.unpackbits(choices, axis=1, bitorder="little")
        forward.extend(choices)
        groups = {f"group{i}": ("u2", (2 ** len(group) - 1, n)) for i, group in enumerate(together)}
        factors = {"s0": ("u4", (1, n))} | ({"s1": (operation.top, (1, n))} if relu else {})
        top = {"t": factors["s1"]} if relu else {}
        message = forward.message(
            d=("u4", (rho_at, n)), rho=("u4", (1, n)), nibbles=("u2", (4, 15, n)), **factors, **top, **groups
        )
        own.r[part], upper = self._numbers(message, bits, shift, operation.coarse)
        rho, plane = bits[rho_at].astype(np.uint32), slice(rho_at, masks_at)
        own.rho[part] = rho + forward.product(message.rho, plane, 0, rho, -(rho + rho))[0]
        for k in range(4):  # step 2
            planes = [i - operation.coarse for i in range(15 + 4 * k, 19 + 4 * k)]
            words = message.nibbles[k]
            own.thermometer[k, part] = forward.look_up(words, planes, NIBBLES, bits[planes], THERMOMETERS)
        for i, group in enumerate(together):
            numbers, table = products_of(group)
            planes = [masks_at + masks.index(bit) for bit in group]
            words = forward.look_up(getattr(message, f"group{i}"), planes, GROUPS + i, bits[planes], table)
            for k, number in enumerate(numbers):
                own.products[number, packed] = np.packbits(words >> k & 1, bitorder="little")
        own.bits[masks, packed] = choices[masks_at:]
        own.bits[SIGMA, packed] = choices[rho_at] ^ choices[rho_at - 1]  # step 3
        s = [-upper, self._top(message, bits, rho_at - 1)] if relu else [own.r[part]]  # step 4
        turned = [(1 - rho - rho).astype(one.dtype) * one for one in s]
        chosen = []
        for i, one in enumerate(s):  # behind rho's own pad: every number of a use has a place of its own in the pad
            d, bit = getattr(message, f"s{i}"), rho.astype(one.dtype)
            chosen.append(bit * one + forward.product(d, plane, 4 * (1 + i) // d.itemsize, bit, turned[i])[0])
        forward.sent()
        self._backward.extend(choices[plane])
        answer = self._backward.message(**factors)
        for i, one in enumerate(chosen):
            d, bit = getattr(answer, f"s{i}"), rho.astype(one.dtype)
            one += self._backward.product(d, slice(1), 4 * i // d.itemsize, bit, turned[i])[0]
        self._backward.sent()
        own.extra[0, part] = chosen[0]
        if relu:
            own.extra[1, part], own.tops[0, part], own.tops[1, part] = s[0], chosen[1], s[1]

    def truncation(self, operation: TruncationOperation, own: Own) -> None:
        """Fill all that a party holds for a truncation: numbers as in step 1, thermometers and product as in step 2."""
        size = prod(operation.shape)
        r, v = np.empty(size, np.uint32), np.empty((2, size), operation.ring)
        for start in range(0, size, BLOCK):
            part = slice(start, min(start + BLOCK, size))
            n = -(-(part.stop - part.start) // 8) * 8
            here, packed, forward = slice(start, start + n), slice(start // 8, (start + n) // 8), self._forward
            choices = self._draw(WORD + 2, n // 8)
            choices[:WORD, -1] &= 0xFF >> (start - part.stop) % 8  # beyond the last element r is 0
            forward.extend(choices)
            message = forward.message(
                d=(operation.ring, (WORD, n)), t=(operation.ring, (1, n)),
                nibbles=("u2", (2, 15, n)), group=("u2", (3, n)),
            )  # fmt: skip
            bits = np.unpackbits(choices, axis=1, bitorder="little")
            numbers, top = self._numbers(message, bits, operation.shift), self._top(message, bits, WORD - 1)
            for k, first in enumerate(UPPER):
                planes = [*range(first, first + 4)]
                looked_up = forward.look_up(message.nibbles[k], planes, NIBBLES, bits[planes], THERMOMETERS)
                own.thermometer[k, here] = looked_up
            planes = [WORD, WORD + 1]
            product = forward.look_up(message.group, planes, GROUPS, bits[planes], products_of(WATCHED)[1])
            own.product[packed] = np.packbits(product & 1, bitorder="little")
            own.top[packed], own.bits[:, packed] = choices[WORD - 1], choices[WORD:]
            forward.sent()
            top <<= operation.ring(31 - operation.shift)
            top <<= operation.ring(1)
            r[part], upper, top = (one[: part.stop - part.start] for one in (*numbers, top))
            v[:, part] = top - upper, -upper
        own.r[:], own.v[:] = r.reshape(own.r.shape), v.reshape(own.v.shape)

    def room(self, operation: RoomOperation, own: Own) -> None:
        """Fill what a party holds to compare two hashes: shares of a b in GF(2^64), b times each bit of a."""
        choices = self._draw(64, 1)
        self._forward.extend(choices)
        message = self._forward.message(d=("u8", (64, 8)))
        drawn = sum(int(bits) & 1 and 1 << i for i, bits in enumerate(choices[:, 0]))
        if self._forward.chooser:
            own.a[0] = drawn
            words = np.empty((64, 8), np.uint64)
        else:
            own.b[0] = drawn
            words = np.array([[times(drawn, 1 << i)] * 8 for i in range(64)], np.uint64)
        shares = self._forward.binary_product(message.d, np.unpackbits(choices, axis=1, bitorder="little"), words)
        own.c[0] = np.bitwise_xor.reduce(shares[:, 0])
        self._forward.sent()

    def normalised(self, operation: NormalisedOperation, own: Own) -> None:
        """Fill all that a party holds for a normalised head; the provider's ``own.weights`` must be there.

        The patient's share of u is that of W a, whole: ``prepare`` has nothing left to add.
        """
        n, classes = np.uint64(operation.features), operation.classes
        if self._forward.chooser:
            own.a[:], own.k[:] = self._draw(*own.a.shape, dtype=np.uint64), self._draw(1, dtype=np.uint64)
            products = self._linear(own.a, np.empty((classes + 1, len(own.a)), np.uint64))
            own.last[:] = self._linear(own.k, np.empty((classes, 1), np.uint64))
        else:
            own.g[:], own.h[:] = (self._draw(len(x), dtype=np.uint64) for x in (own.g, own.h))
            form = np.uint64(2) * (n * own.g - own.g.sum(dtype=np.uint64))  # 2 Q(a, g) is linear in a
            products = self._linear(np.zeros(len(own.g), np.uint64), np.vstack([own.weights[0], form]))
            own.last[:] = self._linear(np.zeros(1, np.uint64), own.h[:, None])
        own.u[:], own.q[:] = products[:-1], products[-1:]

    def _linear(self, x: np.ndarray, matrix: np.ndarray) -> Words:
        """Shares of matrix x mod 2^64: products with each bit of the patient's x. The other's: shapes."""
        size = -(-len(x) // 8) * 8
        bits = np.zeros((64, size), np.uint8)
        bits[:, : len(x)] = x >> np.arange(64, dtype=np.uint64)[:, None] & np.uint64(1)
        self._forward.extend(np.packbits(bits, axis=1, bitorder="little"))
        shares = np.empty(len(matrix), np.uint64)
        for i, row in enumerate(matrix):
            message = self._forward.message(d=("u8", (64, size)))
            words = np.zeros((64, size), np.uint64)
            words[:, : len(x)] = row << np.arange(64, dtype=np.uint64)[:, None]
            shares[i] = self._forward.product(message.d, slice(64), i % 2, bits, words, use=i // 2).sum(dtype=np.uint64)
            self._forward.sent()
        return shares
