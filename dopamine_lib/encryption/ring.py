"""The ring R_q = Z_q[x] / (x^n + 1) of section 2.3, where q is a product of small primes.

A polynomial is the array of its n coefficients, the constant one first. Modulo q it is kept as its *residues*: one
row for each prime, shape (L, n), so that every number fits in 64 bits (Chinese remainder theorem). Multiplication
is value by value between number-theoretic transforms, in n log n steps instead of n^2. Leading axes are allowed
everywhere.
"""

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike

from dopamine_lib.errors import InputError

#: A product of two residues must fit in a signed 64-bit integer.
MAX_PRIME, MAX_N = 2**31, 2**15


def centred(x: int | np.ndarray, modulus: int) -> int | np.ndarray:
    """The representative of ``x`` (integers, any shape) nearest to zero: in (-modulus/2, modulus/2].

    >>> [centred(x, 7) for x in range(7)]
    [0, 1, 2, 3, -3, -2, -1]
    """
    below = (modulus - 1) // 2
    return (x + below) % modulus - below


def is_prime(p: int) -> bool:
    """Whether p is prime, by trial division: quick enough for the small moduli here."""
    return p > 1 and all(p % divisor for divisor in range(2, math.isqrt(p) + 1))


def ntt_primes(n: int, bits: int, count: int = 1) -> tuple[int, ...]:
    """The ``count`` largest primes below 2^bits that are 1 modulo 2n, largest first.

    Modulo such a prime x^n + 1 has n different roots. Raises InputError if there are fewer.

    >>> ntt_primes(n=8, bits=8, count=2)
    (241, 193)
    """
    check_n(n)
    largest = ((1 << bits) - 2) // (2 * n) * (2 * n) + 1
    candidates = range(largest, 1 << (bits - 1), -2 * n)
    found = tuple(itertools.islice(filter(is_prime, candidates), count))
    if len(found) < count:
        raise InputError(f"{len(found)} primes of {bits} bits are 1 modulo {2 * n}, not {count}: ask for more bits")
    return found


def check_n(n: int) -> None:
    """Raise InputError unless n is a power of two from 2 to 32768."""
    if not (isinstance(n, int) and 2 <= n <= MAX_N and n & (n - 1) == 0):
        raise InputError(f"n is {n}, but must be a power of two from 2 to {MAX_N}")


def bit_reversal(n: int) -> np.ndarray:
    """(n,): each index with its binary digits reversed, [0, 2, 1, 3] for n = 4."""
    order = np.zeros(1, dtype=np.int64)
    while len(order) < n:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


def root_of_minus_one(n: int, p: int) -> int:
    """The least psi with psi^n = -1 modulo p: then psi, psi^3, psi^5 … are the n roots of x^n + 1."""
    candidates = (pow(g, (p - 1) // (2 * n), p) for g in range(2, p))
    psi = next(candidate for candidate in candidates if pow(candidate, n, p) == p - 1)
    square, power, least = psi * psi % p, psi, psi
    for _ in range(n - 1):
        power = power * square % p
        least = min(least, power)
    return least


class Ring:
    """R_q for q the product of ``primes``: addition and multiplication of arrays (..., L, n), residues in [0, prime).

    >>> ring = Ring(4, (17, 41))
    >>> ring.lift(ring.multiply(ring.reduce([0, 0, 0, 1]), ring.reduce([3, 5, 0, 0]))).tolist()  # x^4 is -1
    [-5, 0, 0, 3]

    Raises InputError unless n is a power of two and the primes are different, below 2^31 and 1 modulo 2n.
    """

    def __init__(self, n: int, primes: tuple[int, ...]):
        check_n(n)
        for p in primes:
            if not (isinstance(p, int) and p < MAX_PRIME and p % (2 * n) == 1 and is_prime(p)):
                raise InputError(f"modulus {p} is not a prime below 2^31 that is 1 modulo {2 * n}: see ntt_primes")
        if not primes or len(set(primes)) < len(primes):
            raise InputError(f"the moduli {primes} must be different primes, at least one")
        self.n, self.primes, self.q = n, tuple(primes), math.prod(primes)
        self._p = np.array(primes, dtype=np.int64)[:, None]  # (L, 1), to go with (..., L, n)
        roots = [root_of_minus_one(n, p) for p in primes]
        self._roots = np.stack([_powers(psi, n, p) for psi, p in zip(roots, primes, strict=True)])
        self._inverse_roots = np.stack([_powers(pow(psi, -1, p), n, p) for psi, p in zip(roots, primes, strict=True)])
        self._one_over_n = np.array([pow(n, -1, p) for p in primes])[:, None]

    def reduce(self, polynomial: ArrayLike) -> np.ndarray:
        """Residues (..., L, n) of integer coefficients (..., n), of any size in an array of Python's integers."""
        return np.stack([np.asarray(polynomial) % p for p in self.primes], axis=-2).astype(np.int64)

    def lift(self, residues: np.ndarray) -> np.ndarray:
        """The coefficients (..., n) in (-q/2, q/2] as Python's integers: the Chinese remainder theorem."""
        total = 0
        for i, p in enumerate(self.primes):
            others = self.q // p
            total = total + (residues[..., i, :] * pow(others, -1, p) % p).astype(object) * others
        return centred(total, self.q)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a + b modulo q."""
        return (a + b) % self._p

    def negate(self, a: np.ndarray) -> np.ndarray:
        """-a modulo q."""
        return -a % self._p

    def scale(self, a: np.ndarray, factor: int) -> np.ndarray:
        """``a`` times a whole number of any size, modulo q."""
        return a * self.reduce([factor]) % self._p

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The product modulo x^n + 1 and q."""
        return self.inverse(self.transform(a) * self.transform(b) % self._p)

    def transform(self, a: np.ndarray) -> np.ndarray:
        """The values of ``a`` at the n roots of x^n + 1, residue by residue: the number-theoretic transform.

        Place j holds the value at psi^(2 r + 1), where r is j with its bits reversed. Each of log2(n) steps splits
        every polynomial modulo x^2m - w^2 into its remainders modulo x^m - w and x^m + w (Longa and Naehrig 2016).
        """
        shape, p = a.shape, self._p[:, :, None]
        for blocks in _powers_of_two(self.n):
            a = a.reshape(*shape[:-1], blocks, 2, -1)
            turned = a[..., 1, :] * self._roots[:, blocks : 2 * blocks, None] % p
            a = np.stack([a[..., 0, :] + turned, a[..., 0, :] - turned], axis=-2) % p[..., None]
        return a.reshape(shape)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """The polynomial with these values: the steps of ``transform`` undone, the last one first."""
        shape, p = values.shape, self._p[:, :, None]
        for blocks in reversed(_powers_of_two(self.n)):
            a = values.reshape(*shape[:-1], blocks, 2, -1)
            back = (a[..., 0, :] - a[..., 1, :]) * self._inverse_roots[:, blocks : 2 * blocks, None] % p
            values = np.stack([(a[..., 0, :] + a[..., 1, :]) % p, back], axis=-2)
        return values.reshape(shape) * self._one_over_n % self._p


def _powers_of_two(n: int) -> list[int]:
    """1, 2, 4 … n/2."""
    return [1 << i for i in range(n.bit_length() - 1)]


def _powers(psi: int, n: int, p: int) -> np.ndarray:
    """(n,): the powers of psi modulo p in bit-reversed order, the order in which the transform takes them."""
    powers = [1]
    for _ in range(n - 1):
        powers.append(powers[-1] * psi % p)
    return np.array(powers, dtype=np.int64)[bit_reversal(n)]
