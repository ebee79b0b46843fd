"""A check sum that adds up like the updates: it shows that a total is the sum of exactly the hospitals it names.

Additively homomorphic encryption is malleable: the server could answer with one hospital's message alone, count
another twice, or shift the total. So each hospital k adds to its update x_k

    check_k = <r, x_k> + pad_k   mod 2^64

with secret weights r and pads that all hospitals derive, fresh for each round, from a key that the server does not
have (Agrawal and Boneh, Homomorphic MACs, 2009). The server adds the checks as it adds the ciphertexts. A total X
in the name of the hospitals S is accepted if the check is <r, X> + sum over S of pad_k. The pads hide <r, x_k>
perfectly, and are other ones where a hospital was given another model or list of the invited (``context``). A total
that differs from the true one by D passes with probability 2^-(64 - v), where 2^v is the largest power of two that
divides D: less than 2^-39 for values of at most 24 bits. A wrong S, or a wrong context, does not pass.
"""

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

MODULUS = 2**64
_BLOCK = 8192
_ZEROS = memoryview(bytes(8 * _BLOCK))


class SumCheck:
    """The hospitals' side.

    key      32 bytes that all hospitals share and the server does not have
    session  16 bytes

    >>> check = SumCheck(key=bytes(32), session=bytes(16))
    >>> one, two = np.array([1, 2]), np.array([10, -20])
    >>> total = (check.make(0, 0, one) + check.make(0, 1, two)) % MODULUS
    >>> check.holds(0, (0, 1), one + two, total), check.holds(0, (0, 1), 2 * one, total)
    (True, False)
    """

    def __init__(self, key: bytes, session: bytes):
        self._key, self._session = key, session

    def make(self, round_number: int, number: int, values: np.ndarray, context: bytes = b"") -> int:
        """The check of hospital ``number`` for its integers (d,), in a ``context`` that all must hold alike."""
        return (self._dot(round_number, values) + self._pad(round_number, number, context)) % MODULUS

    def holds(
        self, round_number: int, hospitals: tuple[int, ...], total: np.ndarray, check: int, context: bytes = b""
    ) -> bool:
        """Whether ``total`` (d,) is the sum of exactly these hospitals' values of this round, all in this context."""
        pads = sum(self._pad(round_number, number, context) for number in hospitals)
        return (self._dot(round_number, total) + pads) % MODULUS == check

    def _dot(self, round_number: int, values: np.ndarray) -> int:
        stream = Cipher(algorithms.AES(self._derive("weights", round_number)), modes.CTR(bytes(16))).encryptor()
        total = 0
        for start in range(0, len(values), _BLOCK):  # in blocks, so that the weights stay in the processor's cache
            block = values[start : start + _BLOCK]
            weights = np.frombuffer(stream.update(_ZEROS[: 8 * len(block)]), np.int64)
            total += int(np.dot(weights, block))  # int64 wraps around: arithmetic mod 2^64
        return total % MODULUS

    def _pad(self, round_number: int, number: int, context: bytes) -> int:
        return int.from_bytes(self._derive("pad", round_number, number, context)[:8], "little")

    def _derive(self, *purpose: str | int | bytes) -> bytes:
        # repr keeps the parts apart: ("pad", 1, 23) and ("pad", 12, 3) are different purposes
        return hashlib.blake2b(repr((self._session, *purpose)).encode(), key=self._key, digest_size=32).digest()
