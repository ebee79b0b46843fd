"""The building blocks of masks: keystreams that cancel, seeds that two hospitals agree on, formats of messages.

The protocol that uses them is in ``masks``.
"""

import hashlib
import struct
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dopamine_lib.encryption.keys import exchange
from dopamine_lib.encryption.links import HEADER_BYTES, TAG_BYTES
from dopamine_lib.encryption.messages import MessageError
from dopamine_lib.encryption.shamir import SHARE_BYTES

#: Kinds of messages, in the order of a round.
SHARES, DELIVERY, MASKED, SURVIVORS, VOUCH, VOUCHED, REVEAL = range(1, 8)
#: Bytes of two sealed shares, and of the sealed empty message that vouches for a list.
BOX_BYTES, VOUCH_BYTES = HEADER_BYTES + 2 * SHARE_BYTES + TAG_BYTES, HEADER_BYTES + TAG_BYTES
#: A hospital's public data of a round: its number, its public key, and the hash of its seed.
CARD = struct.Struct("<H32s32s")

_CHUNK = 1 << 16  # bytes of keystream made at a time, few enough to be added while they are in the cache
_ZEROS = bytes(_CHUNK)


def add_masks(total: np.ndarray, seeds: Iterable[tuple[bytes, bool]]) -> None:
    """Add to ``total`` uint32 (d,), in place, the AES-256-CTR stream of each 32-byte seed; subtract it where False.

    >>> total = np.arange(3, dtype=np.uint32)
    >>> add_masks(total, [(bytes(32), True)])
    >>> add_masks(total, [(bytes(32), False)])
    >>> total.tolist()
    [0, 1, 2]
    """
    streams = [(Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor(), plus) for seed, plus in seeds]
    buffer = bytearray(_CHUNK + 15)
    words = np.frombuffer(buffer, "<u4", _CHUNK // 4)
    for at in range(0, len(total), _CHUNK // 4):
        part = total[at : at + _CHUNK // 4]
        zeros = _ZEROS[: 4 * len(part)]
        for stream, plus in streams:
            stream.update_into(zeros, buffer)
            (np.add if plus else np.subtract)(part, words[: len(part)], out=part)


def pair_seed(own: X25519PrivateKey, public: bytes, round_number: int, pair: tuple[int, int]) -> bytes:
    """s_ij, 32 bytes: the seed on which two hospitals' keys of this round agree, one private and one public.

    pair  their numbers, the one with the public key last. Raises MessageError, naming it, for a key of low order.
    """
    try:
        secret = exchange(own, public)
    except MessageError as error:
        raise MessageError(f"hospital {pair[1]} in round {round_number}: {error}") from None
    return hashlib.blake2b(struct.pack("<QHH", round_number, *sorted(pair)), key=secret, digest_size=32).digest()


def seed_hash(seed: bytes) -> bytes:
    """32 bytes by which a rebuilt seed is recognised; they reveal nothing of a random seed."""
    return hashlib.blake2b(seed, person=b"mask seed", digest_size=32).digest()


def threshold(invited: int, least: int) -> int:
    """t: the survivors that a round needs, and the shares that rebuild a secret; more than half of all.

    >>> threshold(invited=10, least=2), threshold(invited=10, least=8)
    (6, 8)
    """
    return max(least, invited // 2 + 1)
