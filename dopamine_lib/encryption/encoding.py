"""From numbers to plaintext polynomials: section 2.3's base-b expansion, and batching by interpolation.

Two moduli and a base, which section 2.3 runs together: the *base* b is what digits are counted in; the *plaintext
modulus* t is what coefficients are computed in; the coefficient modulus q belongs to the ciphertext. After some
operations the digits of an expansion lie far outside those of b, which is no harm as long as they stay within t/2.
"""

import functools

import numpy as np

from dopamine_lib.encryption.ring import MOST_PRIME, Ring, bit_reversal, centred, check_n, is_prime
from dopamine_lib.errors import InputError


def digits(b: int) -> range:
    """The digits of a balanced expansion: -(b-1)/2 … (b-1)/2 for odd b, -b/2 … b/2 - 1 for even b, 0 and 1 for two.

    Section 2.3 writes (b-1)/2 as the upper end for even b, which is no integer. With two, the balanced digits -1 and
    0 would never end for a positive number: hence the exception. Raises InputError for b < 2.
    """
    if not (isinstance(b, int) and b >= 2):
        raise InputError(f"base is {b}, but must be a whole number from 2 on")
    return range(2) if b == 2 else range(-(b // 2), b - b // 2)


def expand(u: int, b: int, n: int | None = None) -> np.ndarray:
    """The balanced base-b expansion of ``u``: int64 (k,), the coefficient of b^0 first; with ``n``, filled up to (n,).

    ``expand(26, 2)`` is [0, 1, 0, 1, 1] and ``expand(26, 3)`` is [-1, 0, 0, 1]: x^4 + x^3 + x and x^3 - 1. With base
    two a negative number is minus the expansion of its magnitude. Raises InputError if u is not whole, b < 2, or the
    expansion has more than ``n`` digits.
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
        raise InputError(f"{u} has {len(found)} digits in base {b}, but only {n} coefficients are there: raise n or b")
    return np.array(found + [0] * (n - len(found)), dtype=np.int64)


def evaluate(polynomial, b: int) -> int:
    """The polynomial at x = b, exactly: the decoding of ``expand``."""
    value = 0
    for coefficient in reversed(np.asarray(polynomial).tolist()):
        value = value * b + coefficient
    return value


def polynomial_text(polynomial) -> str:
    """A polynomial as one writes it, highest power first: "x^3 - 1"."""
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

    Polynomials add and multiply as their values do, so one operation on a ciphertext is one on every slot.

    The paper's "Lagrange interpolation" is the inverse of a number-theoretic transform. Slot i belongs to the root
    psi^(3^i), slot n/2 + i to psi^(-3^i), as in SEAL, where x -> x^3 turns the slots by one place.

    Raises InputError unless n is a power of two and t is a prime below 2^31 that is 1 modulo 2n (else x^n + 1 does
    not have n roots modulo t).
    """

    def __init__(self, n: int, t: int):
        check_n(n)
        if not (isinstance(t, int) and t < MOST_PRIME and t % (2 * n) == 1 and is_prime(t)):
            raise InputError(
                f"t is {t}, but batching needs a prime below 2^31 that is 1 modulo {2 * n}, as of ntt_primes"
            )
        self.n, self.t = n, t

    @functools.cached_property
    def _ring(self) -> Ring:
        return Ring(self.n, (self.t,))

    @functools.cached_property
    def _place(self) -> np.ndarray:
        """(n,): where the transform has each slot's value (the value at psi^(2 r + 1) is at r's bits reversed)."""
        power, powers = 1, []
        for _ in range(self.n // 2):
            powers.append(power)
            power = power * 3 % (2 * self.n)
        exponents = np.array(powers + [2 * self.n - power for power in powers])
        return bit_reversal(self.n)[(exponents - 1) // 2]

    def encode(self, values) -> np.ndarray:
        """The polynomial (..., n) with these values (..., k <= n) in its slots, the other slots 0.

        Raises InputError for a value that is not whole or whose magnitude is beyond (t - 1) / 2: it would come back
        as another number. A *sum* beyond that bound wraps all the same, and nobody notices.
        """
        values = check_whole(values, (self.t - 1) // 2, "slot")
        if values.shape[-1] > self.n:
            raise InputError(f"{values.shape[-1]} values for {self.n} slots: use several polynomials")
        slots = np.zeros((*values.shape[:-1], self.n), dtype=np.int64)
        slots[..., self._place[: values.shape[-1]]] = values % self.t
        return centred(self._ring.inverse(slots[..., None, :])[..., 0, :], self.t)

    def decode(self, polynomial) -> np.ndarray:
        """The values (..., n) of all slots, in -(t - 1)/2 … (t - 1)/2."""
        values = self._ring.transform(self._ring.reduce(polynomial))[..., 0, :]
        return centred(values[..., self._place], self.t)


def check_whole(values, most: int, what: str) -> np.ndarray:
    """``values`` as int64. Raises InputError at the first that is not whole or lies outside -most … most."""
    values = np.asarray(values)
    if values.ndim == 0 or values.dtype.kind not in "iu":
        raise InputError(f"{what} values are {values.dtype}, but must be an array of integers: scale and round first")
    outside = (values > most) | (values < -most)
    if outside.any():
        first = tuple(np.argwhere(outside)[0].tolist())
        raise InputError(f"{what} {first[-1]} is {values[first]}, but must lie in [-{most}, {most}]: scale, or raise t")
    return values.astype(np.int64)
