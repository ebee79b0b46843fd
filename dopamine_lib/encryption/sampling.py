"""Randomness for the textbook BFV: the secret, the errors and uniform ring elements, from the operating system.

NumPy's own generators are made for simulation: enough of their output tells the rest of it. A secret key drawn from
one is no secret.
"""

import hashlib
import itertools
import os

import numpy as np

#: An error is the difference of two counts of ERROR_BITS coin flips: standard deviation sqrt(21 / 2) = 3.24.
ERROR_BITS = 21
ERROR_STD = (ERROR_BITS / 2) ** 0.5


class Source:
    """Bytes from the operating system, and the three distributions of section 3.2 made from them.

    seed  None for the operating system; a number for draws that repeat and hide nothing from anyone who knows the
          number: for teaching only
    """

    def __init__(self, seed: int | None = None):
        self.seeded = seed is not None
        self._name = f"dopamine textbook {seed}".encode()
        self._calls = itertools.count()

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if not self.seeded:
            return os.urandom(count)
        return hashlib.shake_256(self._name + next(self._calls).to_bytes(8, "big")).digest(count)

    def uniform(self, modulus: int, shape: tuple[int, ...]) -> np.ndarray:
        """Independent integers, uniform on 0 … modulus - 1 (modulus <= 2^31).

        By rejection, because remainders modulo ``modulus`` would be biased.
        """
        wanted, mask = int(np.prod(shape)), (1 << (modulus - 1).bit_length()) - 1
        drawn = np.empty(0, dtype=np.int64)
        while len(drawn) < wanted:
            words = np.frombuffer(self.bytes(8 * (wanted - len(drawn))), dtype="<u4") & mask
            drawn = np.concatenate([drawn, words[words < modulus].astype(np.int64)])
        return drawn[:wanted].reshape(shape)

    def ternary(self, shape: tuple[int, ...]) -> np.ndarray:
        """Independent values, uniform on -1, 0, 1: the secret s, and u of Eq. 5."""
        return self.uniform(3, shape) - 1

    def error(self, shape: tuple[int, ...]) -> np.ndarray:
        """Independent errors from the centred binomial distribution on -21 … 21, which is nearly Gaussian."""
        words = np.frombuffer(self.bytes(16 * int(np.prod(shape))), dtype="<u8") & ((1 << ERROR_BITS) - 1)
        heads = np.bitwise_count(words).astype(np.int64).reshape(*shape, 2)
        return heads[..., 0] - heads[..., 1]
