"""Is x >= 0? Two parties hold shares of x in Z_2^32 and end with shares of the answer, in three rounds.

From the crypto-provider, for each element: a mask r (32 bits); for each of the four nibbles v of bits 15 … 30 of r its
thermometer, the 16 bits [j <= v] for j = 0 … 15; six mask bits and the 15 products of them that step 3 needs; a bit
sigma. All of it is shared: bits by exclusive or, and rho = sigma xor msb(r) as a number.

    1. Open m = x + r. Then x = m - r, so msb(x) = msb(m) ^ msb(r) ^ borrow with borrow = [m < r] on the low 31 bits.
    2. For each nibble a of m read two bits of its thermometer: [a <= v] and [a + 1 <= v] = [a < v] = l; the two
       together give [a = v] = e (``kernels.look_up``, no message). Open l0 e1 l1 e2 l2 e3, each under one of the six
       mask bits.
    3. borrow = l3 ^ e3 (l2 ^ e2 (l1 ^ e1 l0)), multiplied out over opened bits, mask bits and products of mask bits.
       Open beta = 1 ^ msb(m) ^ borrow ^ sigma.
    4. [x >= 0] = beta ^ msb(r) ^ sigma = beta ^ rho, so a share of it is beta + (1 - 2 beta) rho: no message.

Why this hides x: r, the six bits and sigma are uniform, independent of all else, and used once. So m, the masked bits
and beta are uniform whatever x is: a simulator draws them from coins. A share of an opened value adds nothing, being
the opened value minus one's own share. With r used twice, m - m' would be x - x'.

Coarse. Where what follows drops the lower 12 bits anyway, they are not sent either. Before step 1 the patient rounds
its share of x down to a multiple of 2^12, the provider its own up: x becomes one of the two multiples next to it, at
random with the right mean, and stays as it is if it is one. r is a multiple of 2^12 as well, so 20 bits of m are left
to open, 2.5 bytes in place of 4.

Why this hides x: each party rounds on its own, and the upper 20 bits of r are as uniform modulo 2^20 as r was modulo
2^32. Why it is never wrong by a turn of the ring: sums of upper bits modulo 2^20 are upper bits of sums but for one
carry out of the lower ones.

What is dropped: bits 0 … 14 are not compared, so where bits 15 … 30 of m and r agree, the borrow is taken as 0: a
negative x above -2^15 may count as positive (and an x within 2^15 of the ring's end may count wrongly).

Is x near the ring's end? The other party's picture may drive values out of the ring, where they wrap around. So of the
same m it is asked whether x lies outside [-2^30, 2^30), where msb(x + 2^30) = 1:

    a. m' = m + 2^30 masks x + 2^30 by the same r. Of its two upper nibbles look up l2, l3 and e3; open l2 and e3 with
       step 2, each under a mask bit of its own.
    b. o = msb(m') ^ msb(r) ^ l3 ^ e3 l2, with a share of the product of the two mask bits, and msb(r) = rho ^ sigma:
       the last bits of two shares of the number rho are shares of the bit. Each party keeps its share of o for the end
       (``room``). No message. (``truncation`` asks the same.)

Why this hides x: two more bits are opened, under masks of their own. What is dropped: bits 0 … 22, so within 2^23 of
the two bounds o may be either.

Why three rounds. Tables can be read at m only once m is open; step 3 multiplies bits that step 2 opens; and shares of
a number [x >= 0] take beta in the open. Larger tables do not help until they are too large: with two bytes in place of
four nibbles (256 bits each) one product is left, which takes the same round, and a single table has 2^16 bits an
element. The input of a convolution follows from beta, so its message comes after it; two candidates sent ahead, one for
each beta, would differ by what the shares hide. So a network takes three messages one behind another for each
comparison, and one for each convolution: 108 for SqueezeNet, then ``room``'s and the answer, each half a round trip.
"""

from itertools import combinations

import numpy as np

from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.kernels import Bits, Words
from dopamine_lib.inference.protocols.operation import PATIENT, TAGS, BufferLayout, Operation, Own, Party, Workspace

#: Bits that are not compared.
DROPPED = 15
#: Bits that are not sent where what follows drops them.
COARSE = 12
#: Absolute values from here on may be compared wrongly.
LIMIT = 2**31 - 2**DROPPED
#: The six bits opened in step 2, in the order of their mask bits; l3 needs no mask, nothing is multiplied by it.
L0, E1, L1, E2, L2, E3 = range(6)
L3, SIGMA = 6, 6
#: Mask bits of the question whether x is near the ring's end.
RANGE = slice(7, 9)


def _subsets(*bits) -> list[frozenset]:
    return [frozenset(chosen) for size in range(len(bits) + 1) for chosen in combinations(bits, size)]


#: Products of mask bits that occur when step 3 is multiplied out.
_NEEDED = (
    _subsets(L0, E1, E2, E3)
    + [frozenset({L1}) | rest for rest in _subsets(E2, E3)]
    + [frozenset({L2}) | rest for rest in _subsets(E3)]
)
PRODUCTS = [chosen for chosen in _NEEDED if len(chosen) > 1]


class Comparison(Operation):
    """[x >= 0] for ``count`` elements, as the pair (beta, rho). Subclasses say what follows from it.

    extra    what a subclass has shared besides, name=(dtype, numbers of an element)
    watched  of how many elements, the first ones, it is asked whether they are near the ring's end
    coarse   bits of x and r that are left out: 0 or ``COARSE``
    """

    rounds = 3

    def __init__(self, count: int, watched: int = 0, coarse: int = 0, **extra: tuple[str, int]):
        self.count, self.comparisons, self.watched, self.coarse = count, count, watched, coarse
        self.opened, masks, products = (8, 9, len(PRODUCTS) + 1) if watched else (6, 7, len(PRODUCTS))
        self.messages = "m = x + r", f"{'eight' if watched else 'six'} masked bits", "beta"
        self.padded = -(-count // 8) * 8  # eight bits a byte
        size, packed = self.padded, self.padded // 8
        shares = {
            "thermometer": ("u2", (4, size)),
            "rho": ("u4", (size,)),
            "products": ("u1", (products, packed)),
            **{name: (dtype, (numbers, size)) for name, (dtype, numbers) in extra.items()},
        }
        self.provider = BufferLayout(r=("u4", (size,)), bits=("u1", (masks, packed)))
        self.patient = BufferLayout(r=("u4", (size,)), bits=("u1", (masks, packed)), **shares)
        self.corrections = BufferLayout(**shares)
        self.sent_by_patient = self.sent_by_provider = self.masked_bytes + (self.opened + 1) * packed

    @property
    def masked_bytes(self) -> int:
        """Bytes of step 1's message: 20 bits of each element, or all 32."""
        return self.padded * 5 // 2 if self.coarse else self.padded * 4

    def deal(self, patient: Own, provider: Own, corrections: Own, weight_masks: list, space: Workspace) -> None:
        bits = patient.bits ^ provider.bits
        for i, chosen in enumerate([*PRODUCTS, (7, 8)] if self.watched else PRODUCTS):
            product = np.bitwise_and.reduce([bits[j] for j in chosen])
            np.bitwise_xor(product, patient.products[i], out=corrections.products[i])
        r, rho = space.array("r", (self.padded,)), space.array("rho", (self.padded,), np.uint8)
        kernels.active().deal_comparison(
            patient.r, provider.r, unpack(bits[SIGMA]), patient.thermometer, patient.rho,
            r, rho, corrections.thermometer, corrections.rho, self.coarse,
        )  # fmt: skip
        self.deal_extra(r, rho, patient, corrections)

    def deal_extra(self, r: np.ndarray, rho: np.ndarray, patient: Own, corrections: Own) -> None:
        """Fill the corrections of ``extra`` from the mask r (n,) and the bits rho (n,)."""

    def rest(self, number: int) -> np.uint32:
        """What this party adds to its share before the lower bits go: the patient rounds down, the provider up."""
        return np.uint32(2**self.coarse - 1 if number != PATIENT else 0)

    def open_masked(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """Step 1 with the other party: m (n,), from this party's share x (count,), which it rounds where coarse."""
        space, size = party.workspace, self.padded
        if not self.coarse:
            masked = space.array("masked", (size,))
            np.add(x, own.r[: self.count], out=masked[: self.count])
            masked[self.count :] = own.r[self.count :]
            return party.open(tag, masked)
        mine, theirs = (space.array(name, (self.masked_bytes,), np.uint8) for name in ("upper", "opened"))
        kernels.active().pack_masked(x, self.rest(party.number), own.r, *halves(mine))
        party.channel.exchange(tag, mine, theirs)
        m = space.array(f"opened {tag % TAGS}", (size,))
        kernels.active().open_upper(*halves(mine), *halves(theirs), m)
        return m

    def look_up(self, m: np.ndarray, own: Own, planes: np.ndarray) -> np.ndarray:
        """Step 2: this party's shares (7, n / 8) of l0 e1 l1 e2 l2 e3 l3; the first six masked in place."""
        kernels.active().look_up(m, own.thermometer, planes)
        planes[:6] ^= own.bits[:6]
        return planes

    def decide(self, number: int, m: np.ndarray, opened: np.ndarray, last: np.ndarray, own: Own) -> np.ndarray:
        """Step 3: this party's share (n / 8,) of beta, from ``opened`` (6, n / 8) and ``last``, its share of l3."""
        beta = borrow(number, opened, own.bits[:6], own.products[: len(PRODUCTS)])
        beta ^= last
        beta ^= own.bits[SIGMA]
        if number == PATIENT:
            beta ^= ~np.packbits(m.view(np.int32) < 0, bitorder="little")
        return beta

    def compare(self, party: Party, tag: int, own: Own, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps 1 to 3 with the other party: m (n,) and beta (n,), n the padded count."""
        m = self.open_masked(party, tag, own, x)
        planes = party.workspace.array("planes", (10, self.padded // 8), np.uint8)
        self.look_up(m, own, planes[2:9])
        if self.watched:
            self.look_up_end(party.number, m, own, planes[:2], planes[9])
        opened = party.open(tag + 1, planes[8 - self.opened : 8], np.bitwise_xor)
        if self.watched:
            self.watch(party, opened[:2], planes[9], own)
        beta = party.open(tag + 2, self.decide(party.number, m, opened[-6:], planes[2 + L3], own), np.bitwise_xor)
        return m, unpack(beta)

    def look_up_end(self, number: int, m: Words, own: Own, planes: Bits, rest: Bits) -> None:
        """Step a: fill in this party's shares (2, n / 8) of e3 and l2 of m', masked, and the rest of o (n / 8,)."""
        kernels.active().look_up_end(number, m, own.thermometer[2:], own.rho, planes, rest)
        planes ^= own.bits[RANGE]

    def watch(self, party: Party, opened: Bits, rest: Bits, own: Own) -> None:
        """Step b, for ``opened`` (2, n / 8) and ``rest`` (n / 8,): keep this party's shares of o, packed."""
        rest ^= own.bits[SIGMA]
        keep_outside(party, self.watched, opened, rest, own.bits[RANGE], own.products[-1])


def keep_outside(party: Party, count: int, opened: Bits, rest: Bits, masks: Bits, product: Bits) -> None:
    """Hash this party's share of o of the first ``count`` elements, all packed.

    opened  masked e3 and l2 (2, n / 8); masks: its shares of what masks them; product (n / 8,): of the product of that
    rest    its share of all in o that does not depend on them
    """
    (e3, l2), (mask_e3, mask_l2) = opened, masks
    o = rest ^ e3 & mask_l2 ^ l2 & mask_e3 ^ product
    if party.number == PATIENT:
        o ^= e3 & l2
    o = o[: -(-count // 8)]
    o[-1] &= 0xFF >> -count % 8
    party.outside.update(o)


def halves(message: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """20 bits an element, as they travel, uint8 (5 n / 2,): their lower 16 uint16 (n,), and two upper fours a byte."""
    lower = len(message) * 4 // 5
    return message[:lower].view("<u2"), message[lower:]


def borrow(number: int, opened: np.ndarray, masks: np.ndarray, products: np.ndarray) -> np.ndarray:
    """A share (n / 8,) of e3 (l2 ^ e2 (l1 ^ e1 l0)), packed, from opened masked bits and shares of masks and products.

    A shared value times a masked bit b = B ^ mask is B (value) ^ (mask value): so we carry, from the inside out, the
    shares of h times every product T of the mask bits that are still to come.
    """
    one = np.full_like(opened[0], 0xFF if number == PATIENT else 0)
    share = {frozenset(): one} | {frozenset({i}): plane for i, plane in enumerate(masks)}
    share |= dict(zip(PRODUCTS, products, strict=True))

    def times(bit, values, T):
        return opened[bit] & values[T] ^ values[T | {bit}]

    h = {T: times(L0, share, T) for T in _subsets(E1, E2, E3)}
    h = {T: times(E1, h, T) ^ times(L1, share, T) for T in _subsets(E2, E3)}
    h = {T: times(E2, h, T) ^ times(L2, share, T) for T in _subsets(E3)}
    return times(E3, h, frozenset())


def unpack(bits: np.ndarray) -> np.ndarray:
    """Packed bits (n / 8,) as bytes (n,) of 0 and 1; element i is bit i % 8 of byte i // 8."""
    return np.unpackbits(bits, bitorder="little")
