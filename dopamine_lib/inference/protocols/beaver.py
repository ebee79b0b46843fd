"""Multiplication of two shared numbers with a triple (Beaver 1991), in Z_2^32 or Z_2^64.

From the crypto-provider: shares of random a and b, and of c = a b.

    1. Open e = x - a and f = y - b.
    2. x y = (e + a)(f + b) = e f + e b + f a + c. Each party computes f a_i + e b_i + c_i from its shares; one of them
       adds e f.

Why this hides x and y: a and b are uniform and used once, so e and f are uniform whatever x and y are. A triple used
for x and again for x' gives away x - x'.

A network's products are leaner: where one factor belongs to one party alone, half the messages fall away
(``convolution``). This file is the general case, for reading and for the notebook.
"""

from dataclasses import dataclass

import numpy as np

from dopamine_lib.inference.protocols.sharing import random_ring, share


@dataclass(frozen=True)
class Triple:
    """One party's shares of a, b and c = a b."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def deal_triple(shape: tuple[int, ...], bits: int = 64) -> tuple[Triple, Triple]:
    """The crypto-provider's part: a fresh triple, one half for each party, each array of this shape."""
    a, b = random_ring(shape, bits), random_ring(shape, bits)
    halves = zip(share(a), share(b), share(a * b), strict=True)
    return tuple(Triple(*half) for half in halves)


def mask(x_i: np.ndarray, y_i: np.ndarray, triple: Triple) -> tuple[np.ndarray, np.ndarray]:
    """Step 1: this party's shares of e and f, to be opened."""
    return x_i - triple.a, y_i - triple.b


def multiply(number: int, e: np.ndarray, f: np.ndarray, triple: Triple) -> np.ndarray:
    """Step 2: this party's share of x y; party 0 adds e f.

    >>> x, y = np.array([6, 2], np.uint64), np.array([7, 5], np.uint64)
    >>> (x_0, x_1), (y_0, y_1), (one, other) = share(x), share(y), deal_triple((2,))
    >>> (e_0, f_0), (e_1, f_1) = mask(x_0, y_0, one), mask(x_1, y_1, other)
    >>> e, f = e_0 + e_1, f_0 + f_1                                # opened
    >>> multiply(0, e, f, one) + multiply(1, e, f, other)
    array([42, 10], dtype=uint64)
    """
    product = f * triple.a + e * triple.b + triple.c
    return product + e * f if number == 0 else product


def truncate(number: int, x_i: np.ndarray, bits: int) -> np.ndarray:
    """Shares of x / 2^bits, by each party on its own: it brings a product back to the scale of its factors.

    Off by one in the last place; and wrong by 2^(k - bits) with probability |x| / 2^k in a ring of k bits. That is good
    enough for a few numbers in Z_2^64 and useless in Z_2^32: ``truncation`` has one that is never wrong.
    """
    return x_i >> bits if number == 0 else -(-x_i >> bits)
