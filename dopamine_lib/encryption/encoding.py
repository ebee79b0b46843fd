"""From numbers to plaintext polynomials: section 2.3's base-b expansion, and batching by interpolation.

Section 2.3 does not keep three numbers apart: the *base* b of the digits, the *plaintext modulus* t of the
coefficients, and the *coefficient modulus* q of the ciphertext. After some operations the digits of an expansion lie
far outside those of base b, which does no harm as long as they stay within t/2.
"""

import functools

import numpy as np
from numpy.typing import ArrayLike

from dopamine_lib.encryption.ring import MAX_PRIME, Ring, bit_reversal, centred, check_n, is_prime
from dopamine_lib.errors import InputError


def digits(b: int) -> range:
    """The digits of a balanced expansion: -(b-1)/2 … (b-1)/2 for odd b, -b/2 … b/2 - 1 for even b, 0 and 1 for b = 2.

    Section 2.3 gives (b-1)/2 as the upper end for even b, which is not an integer. In base two a positive number
    would never end in the balanced digits -1 and 0, hence the exception. Raises InputError for b < 2.
    """
    if not (isinstance(b, int) and b >= 2):
        raise InputError(f"base is {b}, but must be a whole number from 2 on")
    return range(2) if b == 2 else range(-(b // 2), b - b // 2)


def expand(u: int, b: int, n: int | None = None) -> np.ndarray:
    """The balanced base-b expansion of ``u``: int64 (k,), the coefficient of b^0 first; with ``n``, padded to (n,).

    >>> polynomial_text(expand(26, b=2)), polynomial_text(expand(26, b=3))  # section 2.3's example
    ('x^4 + x^3 + x', 'x^3 - 1')

    In base two a negative number has minus the expansion of its magnitude. Raises InputError if u is not whole,
    b < 2, or the expansion has more than ``n`` digits.
    """
    if not isinstance(u, int | np.integer):
        raise InputError(f"{u!r} is not a whole number: scale and round it first")
    rest, sign, low = abs(int(u)), (1 if u >= 0 else -1), digits(b).start
    if b > 2:
        rest, sign = int(u), 1
    found = []
    while rest:
        digit = (rest - low) % b + low
        found.append(sign * digit)
        rest = (rest - digit) // b
    if n is None:
        return np.array(found, dtype=np.int64)
    if len(found) > n:
        raise InputError(f"{u} has {len(found)} digits in base {b}, but there are only {n} coefficients: raise n or b")
    return np.array(found + [0] * (n - len(found)), dtype=np.int64)


def evaluate(polynomial: ArrayLike, b: int) -> int:
    """The polynomial (n,) at x = b, exactly: the decoding of ``expand``."""
    value = 0
    for coefficient in reversed(np.asarray(polynomial).tolist()):
        value = value * b + coefficient
    return value


def polynomial_text(polynomial: ArrayLike) -> str:
    """A polynomial (n,) in the usual notation, highest power first: "x^3 - 1"."""
    text = ""
    for power, coefficient in reversed(list(enumerate(np.asarray(polynomial).tolist()))):
        if coefficient:
            sign = " - " if coefficient < 0 else " + "
            number = "" if abs(coefficient) == 1 and power else str(abs(coefficient))
            text += sign + number + {0: "", 1: "x"}.get(power, f"x^{power}")
    if text.startswith(" - "):
        return "-" + text[3:]
    return text[3:] or "0"


class Batching:
    """n numbers in one polynomial: slot i is its value, modulo t, at the i-th of the n roots of x^n + 1.

    Polynomials add and multiply as their values do, so one operation on a ciphertext acts on every slot.

    >>> batching = Batching(n=8, t=97)
    >>> batching.decode(batching.encode([1, 2, 3]) + batching.encode([10, 20, -30])).tolist()
    [11, 22, -27, 0, 0, 0, 0, 0]

    The paper's "Lagrange interpolation" is the inverse of a number-theoretic transform. Slot i belongs to the root
    psi^(3^i), slot n/2 + i to psi^(-3^i), as in SEAL, where x -> x^3 rotates the slots by one place.

    Raises InputError unless n is a power of two and t is a prime below 2^31 that is 1 modulo 2n (else x^n + 1 does
    not have n roots modulo t).
    """

    def __init__(self, n: int, t: int):
        check_n(n)
        if not (isinstance(t, int) and t < MAX_PRIME and t % (2 * n) == 1 and is_prime(t)):
            raise InputError(
                f"t is {t}, but batching needs a prime below 2^31 that is 1 modulo {2 * n}: see ntt_primes"
            )
        self.n, self.t = n, t

    @functools.cached_property
    def _ring(self) -> Ring:
        return Ring(self.n, (self.t,))

    @functools.cached_property
    def _place(self) -> np.ndarray:
        """(n,): where the transform puts each slot's value: that at psi^(2 r + 1) at r with its bits reversed."""
        power, powers = 1, []
        for _ in range(self.n // 2):
            powers.append(power)
            power = power * 3 % (2 * self.n)
        exponents = np.array(powers + [2 * self.n - power for power in powers])
        return bit_reversal(self.n)[(exponents - 1) // 2]

    def encode(self, values: ArrayLike) -> np.ndarray:
        """The polynomial (..., n) with these integers (..., k <= n) in its slots, and 0 in the others.

        Raises InputError for a value that is not whole, or of a magnitude over (t - 1) / 2: it would come back as
        another number. A *sum* beyond that bound still wraps, silently.
        """
        values = check_whole(values, (self.t - 1) // 2, "slot")
        if values.shape[-1] > self.n:
            raise InputError(f"{values.shape[-1]} values for {self.n} slots: use several polynomials")
        slots = np.zeros((*values.shape[:-1], self.n), dtype=np.int64)
        slots[..., self._place[: values.shape[-1]]] = values % self.t
        return centred(self._ring.inverse(slots[..., None, :])[..., 0, :], self.t)

    def decode(self, polynomial: ArrayLike) -> np.ndarray:
        """The values (..., n) of all slots, in -(t - 1)/2 … (t - 1)/2."""
        values = self._ring.transform(self._ring.reduce(polynomial))[..., 0, :]
        return centred(values[..., self._place], self.t)


def check_whole(values: ArrayLike, largest: int, what: str) -> np.ndarray:
    """``values`` as int64. Raises InputError at the first that is not whole or lies outside -largest … largest."""
    values = np.asarray(values)
    if values.ndim == 0 or values.dtype.kind not in "iu":
        raise InputError(f"{what} values are {values.dtype}, but must be an array of integers: scale and round first")
    outside = (values > largest) | (values < -largest)
    if outside.any():
        first = tuple(np.argwhere(outside)[0].tolist())
        raise InputError(
            f"{what} {first[-1]} is {values[first]}, but must lie in [-{largest}, {largest}]: scale or raise t"
        )
    return values.astype(np.int64)
