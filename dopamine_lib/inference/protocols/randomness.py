"""Randomness of the protocols: AES-128 in counter mode, expanded from seeds of 16 bytes.

A session has one seed for the patient and one for the provider; the crypto-provider knows both. Every query has a
key of its own, derived from the seed and the query's number, and every operation of the query reads a part of that
key's counter that no other operation reaches. The same bytes come out twice only if a query's number is used twice in
one session, which ``network.crypto_provider`` rules out; a new session, after a break or a restart, has new
seeds.
"""

import hashlib
import os
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SEED_BYTES = 16
#: Number of the key that a session's masks of the weights are drawn from; queries count from 0.
SESSION = 2**64 - 1
_ZEROS = bytes(2**18)
Buffer = Any  # a writable array or bytearray


def fresh_seed(seed: int | None = None, *purpose: str) -> bytes:
    """16 bytes from the operating system; from ``seed`` and ``purpose`` instead where a run must be repeated.

    A seeded run protects nothing from anyone who knows the number: for teaching and tests only.
    """
    if seed is None:
        return os.urandom(SEED_BYTES)
    return hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=SEED_BYTES).digest()


def query_key(seed: bytes, query: int) -> bytes:
    """The AES key of one query of a session."""
    return hashlib.blake2b(query.to_bytes(8, "big"), key=seed, digest_size=16).digest()


def fill(buffer: Buffer, key: bytes, operation: int) -> None:
    """Fill a writable buffer with the stream of one operation: the counter starts at operation * 2^64.

    >>> buffer = bytearray(4)
    >>> fill(buffer, bytes(16), operation=0)
    >>> buffer.hex()                                               # AES-128 of zeros under the key of zeros
    '66e94bd4'
    """
    counter = operation.to_bytes(8, "big") + bytes(8)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    if not len(buffer):
        return  # an empty array has no bytes to point at
    out, zeros = memoryview(buffer).cast("B"), memoryview(_ZEROS)
    for at in range(0, len(out), len(zeros)):
        part = out[at : at + len(zeros)]
        encryptor.update_into(zeros[: len(part)], part)
