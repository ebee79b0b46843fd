"""Randomness of the protocols: AES-128 in counter mode, expanded from seeds of 16 bytes.

A session has one seed for the patient and one for the provider; the crypto-provider knows both. Every query has a
key of its own, derived from the seed and the query's number, and every operation of the query reads a part of that
key's counter that no other operation reaches. The same bytes come out twice only if a query's number is used twice in
one session, which ``dealer`` and ``parties`` rule out; a new session, after a break or a restart, has new seeds.
"""

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SEED_BYTES = 16
#: Number of the key a session's model mask is drawn from; queries count from 0.
SESSION = 2**64 - 1
_ZEROS = bytes(2**18)


def fresh_seed(seed: int | None = None, *purpose) -> bytes:
    """16 bytes from the operating system; from ``seed`` and ``purpose`` instead where a run must be repeated.

    A seeded run protects nothing from whoever knows the number: for teaching and tests only.
    """
    if seed is None:
        return os.urandom(SEED_BYTES)
    return hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=SEED_BYTES).digest()


def query_key(seed: bytes, query: int) -> bytes:
    """The AES key of one query of a session."""
    return hashlib.blake2b(query.to_bytes(8, "big"), key=seed, digest_size=16).digest()


def fill(buffer, key: bytes, operation: int) -> None:
    """Fill a writable buffer with the stream of one operation: the counter starts at operation * 2^64."""
    counter = operation.to_bytes(8, "big") + bytes(8)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    if not len(buffer):
        return  # an empty array has no bytes to point at
    out, zeros = memoryview(buffer).cast("B"), memoryview(_ZEROS)
    for at in range(0, len(out), len(zeros)):
        part = out[at : at + len(zeros)]
        encryptor.update_into(zeros[: len(part)], part)


def draw(layout, key: bytes, operation: int, buffer=None):
    """The arrays of a Layout filled with one operation's stream; in ``buffer`` (nbytes,) where one is given."""
    buffer = np.empty(layout.nbytes, np.uint8) if buffer is None else buffer
    fill(buffer, key, operation)
    return layout.views(buffer)
