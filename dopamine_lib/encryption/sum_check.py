"""A check sum that adds up like the updates: hospitals see that a total is the sum of exactly who it names.

An encryption that can be added to can be tampered with by whoever adds: the server could answer with one
hospital's message alone, count another twice, or shift the total. So each hospital k adds to its update x_k

    check_k = <r, x_k> + pad_k   mod 2^64

with secret weights r and pads that all hospitals derive, fresh for each round, from a key the server does not
have (Agrawal and Boneh, Homomorphic MACs, 2009). The server adds the checks as it adds the ciphertexts. A total X
said to be of the hospitals S is accepted if the check is <r, X> + sum over S of pad_k. The pads hide <r, x_k>
perfectly. A total that differs from the true one by D passes with probability 2^-(64 - v), where 2^v is the largest
power of two that divides D: less than 2^-39 for values of at most 24 bits, and S cannot be misstated.
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
    """

    def __init__(self, key: bytes, session: bytes):
        self._key, self._session = key, session

    def make(self, round_number: int, number: int, values: np.ndarray) -> int:
        """The check of hospital ``number`` for its integers (d,)."""
        return (self._dot(round_number, values) + self._pad(round_number, number)) % MODULUS

    def holds(self, round_number: int, hospitals: tuple[int, ...], total: np.ndarray, check: int) -> bool:
        """Is ``total`` (d,) the sum of what exactly these hospitals sent in this round?"""
        pads = sum(self._pad(round_number, number) for number in hospitals)
        return (self._dot(round_number, total) + pads) % MODULUS == check

    def _dot(self, round_number: int, values: np.ndarray) -> int:
        stream = Cipher(algorithms.AES(self._derive("weights", round_number)), modes.CTR(bytes(16))).encryptor()
        total = 0
        for start in range(0, len(values), _BLOCK):  # block by block: the weights never leave the processor's cache
            block = values[start : start + _BLOCK]
            weights = np.frombuffer(stream.update(_ZEROS[: 8 * len(block)]), np.int64)
            total += int(np.dot(weights, block))  # int64 wraps around, which is arithmetic mod 2^64
        return total % MODULUS

    def _pad(self, round_number: int, number: int) -> int:
        return int.from_bytes(self._derive("pad", round_number, number)[:8], "little")

    def _derive(self, *purpose) -> bytes:
        # repr keeps the parts apart: ("pad", 1, 23) and ("pad", 12, 3) are two purposes
        return hashlib.blake2b(repr((self._session, *purpose)).encode(), key=self._key, digest_size=32).digest()
