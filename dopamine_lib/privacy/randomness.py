"""Randomness for sampling and noise: AES-256 in counter mode, keyed by the operating system.

A bound on epsilon assumes that nobody can predict the noise. Generators made for simulation (Mersenne
Twister, PCG) can be: their state follows from their output. AES-CTR is a cryptographic generator, as fast,
and a stream is named by what it is for, so a resumed run needs no saved generator state.
"""

import hashlib
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

#: Bits of a uniform float64 value.
WORD = 53
#: What is encrypted, a piece at a time, to fill pinned memory.
_ZEROS = bytes(2**20)


class Randomness:
    """A root key and the independent streams derived from it.

    seed  None for a fresh key from the operating system; a number or a name for a run that can be repeated, which
          hides nothing from anybody who knows it: for teaching only

    >>> first, again = (Randomness(seed=0).stream("noise", 7).uniform(3) for _ in range(2))
    >>> bool((first == again).all()), bool((first == Randomness().stream("noise", 7).uniform(3)).any())
    (True, False)
    """

    def __init__(self, seed: int | str | None = None):
        self.seeded = seed is not None
        self._key = hashlib.sha256(f"dopamine seed {seed}".encode()).digest() if self.seeded else os.urandom(32)

    def stream(self, *purpose: str | int) -> "Stream":
        """The stream for one purpose, e.g. ``stream("FSCDP", run, hospital, step)``: same purpose, same bytes."""
        return Stream(hashlib.blake2b(repr(purpose).encode(), key=self._key, digest_size=32).digest())


class Stream:
    """A keystream, read from its beginning: each call takes what comes next."""

    def __init__(self, key: bytes):
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, n: int) -> torch.Tensor:
        """n independent float64 values, uniform on the multiples of 2^-53 in [0, 1)."""
        return unit(self.words(n))

    def words(self, n: int, pinned: bool = False) -> torch.Tensor:
        """n independent int64 (n,) of 64 random bits each; n may be 0, where nobody was sampled.

        pinned  in memory from which a GPU copies by itself
        """
        if n == 0:
            return torch.empty(0, dtype=torch.int64)
        if pinned:  # the library asks for a block's room more
            words = torch.empty(n + 2, dtype=torch.int64, pin_memory=True)
            room = memoryview(words.numpy()).cast("B")
            for at in range(0, 8 * n, len(_ZEROS)):  # encrypting holds no lock of Python's, making zeros would
                self._encryptor.update_into(_ZEROS[: 8 * n - at], room[at:])
            return words[:n]
        stream = bytearray(8 * n + 15)
        self._encryptor.update_into(bytes(8 * n), stream)
        return torch.frombuffer(stream, dtype=torch.int64, count=n)


def unit(words: torch.Tensor) -> torch.Tensor:
    """The low ``WORD`` bits of int64 words as float64 in [0, 1)."""
    return (words & ((1 << WORD) - 1)).double().mul_(2.0**-WORD)
