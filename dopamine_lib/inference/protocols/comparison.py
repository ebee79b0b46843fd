"""Is x >= 0? Two parties hold shares of x in Z_2^32 and end with shares of the answer, in three rounds.

From the crypto-provider, for each element: a mask r (32 bits); for each of the four nibbles v of bits 15 … 30 of r its
thermometer, the 16 bits [j <= v] for j = 0 … 15; six mask bits and the 15 products of them that step 3 needs; a bit
sigma. All of it is shared: bits by exclusive or, and rho = sigma xor msb(r) as a number.

    1. Open m = x + r. Then x = m - r, so msb(x) = msb(m) ^ msb(r) ^ borrow with borrow = [m < r] on the low 31 bits.
    2. For each nibble a of m read two bits of its thermometer: [a <= v] and [a + 1 <= v] = [a < v] = l; the two
       together give [a = v] = e. This needs no message. Open l0 e1 l1 e2 l2 e3, each under one of the six mask bits.
    3. borrow = l3 ^ e3 (l2 ^ e2 (l1 ^ e1 l0)), multiplied out over opened bits, mask bits and products of mask bits.
       Open beta = 1 ^ msb(m) ^ borrow ^ sigma.
    4. [x >= 0] = beta ^ msb(r) ^ sigma = beta ^ rho, so a share of it is beta + (1 - 2 beta) rho: no message.

Why this hides x: r, the six bits and sigma are uniform, independent of all else, and used once. So m, the masked bits
and beta are uniform whatever x is: a simulator draws them from coins. A share of an opened value adds nothing, being
the opened value minus one's own share. Used twice, m - m' would be x - x'.

What is dropped: bits 0 … 14 are not compared, so where bits 15 … 30 of m and r agree, the borrow is taken as 0: a
negative x above -2^15 may count as positive (and an x within 2^15 of the ring's end may count wrongly). The
operations that use the answer say what this costs them.
"""

from itertools import combinations

import numpy as np

from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.buffers import Layout
from dopamine_lib.inference.protocols.operation import PATIENT, Operation

#: Bits that are not compared.
DROPPED = 15
#: The six bits opened in step 2, in the order of their mask bits; l3 needs no mask, nothing is multiplied by it.
L0, E1, L1, E2, L2, E3 = range(6)
L3, SIGMA = 6, 6


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
    """[x >= 0] for ``count`` elements, as the pair (beta, rho). What to do with it is up to the subclasses."""

    rounds = 3
    messages = ("m = x + r", "six masked bits", "beta")

    def __init__(self, count: int, extra: int = 0):
        self.count = self.comparisons = count
        self.padded = -(-count // 8) * 8  # eight bits a byte
        size, packed = self.padded, self.padded // 8
        shares = {
            "thermometer": ("u2", (4, size)),
            "rho": ("u4", (size,)),
            "products": ("u1", (len(PRODUCTS), packed)),
        }
        if extra:
            shares["extra"] = ("u4", (extra, size))
        self.provider = Layout(r=("u4", (size,)), bits=("u1", (7, packed)))
        self.patient = Layout(r=("u4", (size,)), bits=("u1", (7, packed)), **shares)
        self.corrections = Layout(**shares)
        self.sent_by_patient = self.sent_by_provider = 4 * size + 7 * packed

    def deal(self, patient, provider, corrections, session, space) -> None:
        bits = patient.bits ^ provider.bits
        for i, chosen in enumerate(PRODUCTS):
            product = np.bitwise_and.reduce([bits[j] for j in chosen])
            np.bitwise_xor(product, patient.products[i], out=corrections.products[i])
        r, rho = space.array("r", (self.padded,)), space.array("rho", (self.padded,), np.uint8)
        kernels.active().deal_comparison(
            patient.r, provider.r, unpack(bits[SIGMA]), patient.thermometer, patient.rho,
            r, rho, corrections.thermometer, corrections.rho,
        )  # fmt: skip
        self.deal_extra(r, rho, patient, corrections)

    def deal_extra(self, r, rho, patient, corrections) -> None:
        """Fill ``corrections.extra`` from the mask r (n,) and the bits rho (n,)."""

    def mask(self, x: np.ndarray, own, out: np.ndarray) -> np.ndarray:
        """Step 1: this party's share (n,) of m = x + r."""
        np.add(x, own.r[: self.count], out=out[: self.count])
        out[self.count :] = own.r[self.count :]
        return out

    def look_up(self, m: np.ndarray, own, planes: np.ndarray) -> np.ndarray:
        """Step 2: this party's shares (7, n / 8) of l0 e1 l1 e2 l2 e3 l3; the first six masked in place."""
        kernels.active().look_up(m, own.thermometer, planes)
        planes[:6] ^= own.bits[:6]
        return planes

    def decide(self, number: int, m: np.ndarray, opened: np.ndarray, last: np.ndarray, own) -> np.ndarray:
        """Step 3: this party's share (n / 8,) of beta; ``opened`` (6, n / 8), ``last`` its share of l3."""
        beta = borrow(number, opened, own.bits[:6], own.products)
        beta ^= last
        beta ^= own.bits[SIGMA]
        if number == PATIENT:
            beta ^= ~np.packbits(m.view(np.int32) < 0, bitorder="little")
        return beta

    def compare(self, party, tag: int, x: np.ndarray, own) -> tuple[np.ndarray, np.ndarray]:
        """Steps 1 to 3 with the other party: m (n,) and beta (n,), n the padded count."""
        space = party.workspace
        m = party.open(tag, self.mask(x, own, space.array("masked", (self.padded,))))
        planes = self.look_up(m, own, space.array("planes", (8, self.padded // 8), np.uint8))
        opened = party.open(tag + 1, planes[:6], np.bitwise_xor)
        beta = party.open(tag + 2, self.decide(party.number, m, opened, planes[L3], own), np.bitwise_xor)
        return m, unpack(beta)


def borrow(number: int, opened, masks, products):
    """A share of e3 (l2 ^ e2 (l1 ^ e1 l0)) from opened masked bits and shares of the masks and their products.

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
