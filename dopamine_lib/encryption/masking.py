"""What masks are made of: keystreams that cancel, keys two hospitals agree on, and what a message holds.

The protocol that uses these is in ``masks``.
"""

import hashlib
import struct
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dopamine_lib.encryption.links import HEADER_BYTES, TAG_BYTES
from dopamine_lib.encryption.messages import AggregationAborted, MessageError
from dopamine_lib.encryption.shamir import SHARE_BYTES

#: Kinds of messages, in a round's order.
SHARES, DELIVERY, MASKED, SURVIVORS, VOUCH, VOUCHED, REVEAL = range(1, 8)
#: Bytes of two sealed shares, and of the seal of nothing that vouches for a list.
BOX_BYTES, VOUCH_BYTES = HEADER_BYTES + 2 * SHARE_BYTES + TAG_BYTES, HEADER_BYTES + TAG_BYTES
#: What a hospital shows of itself in a round: number, public key, hash of its seed.
CARD = struct.Struct("<H32s32s")

_CHUNK = 1 << 16  # bytes of keystream made at a time: they are added while they are in the cache
_ZEROS = bytes(_CHUNK)


def add_masks(total: np.ndarray, seeds: Iterable[tuple[bytes, bool]]) -> None:
    """Add to ``total`` uint32 (d,), in place, the AES-256-CTR stream of each 32-byte seed; subtract where False."""
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
    """s_ij, 32 bytes: what the keys of two hospitals of this round agree on, one private and one public."""
    secret = own.exchange(X25519PublicKey.from_public_bytes(public))
    return hashlib.blake2b(struct.pack("<QHH", round_number, *sorted(pair)), key=secret, digest_size=32).digest()


def seed_hash(seed: bytes) -> bytes:
    """32 bytes by which a rebuilt seed is recognised; of a random seed they tell nothing."""
    return hashlib.blake2b(seed, person=b"mask seed", digest_size=32).digest()


def threshold(invited: int, least: int) -> int:
    """t: survivors without whom a round is aborted, and shares that rebuild a secret; more than half of all."""
    return max(least, invited // 2 + 1)


def check_enough(present: int, needed: int, round_number: int) -> None:
    """Raise AggregationAborted unless ``present`` hospitals are at least ``needed``."""
    if present < needed:
        raise AggregationAborted(
            f"round {round_number} has {present} hospitals, but needs {needed}: nothing is opened, and the round is "
            "spent; go on with a new one"
        )


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """Hospitals' numbers, two bytes each."""
    return np.array(list(numbers), "<u2").tobytes()


def unpack_numbers(data: bytes) -> tuple[int, ...]:
    """The inverse of ``pack_numbers``; MessageError unless they rise, so that each comes once."""
    numbers = tuple(int.from_bytes(number, "little") for number in cut(data, 2))
    if list(numbers) != sorted(set(numbers)):
        raise MessageError(f"a list of hospitals is {numbers}, but must rise: it is refused")
    return numbers


def cut(body: bytes, size: int, count: int | None = None) -> list[bytes]:
    """A body in pieces of ``size`` bytes; MessageError where one would be shorter, or ``count`` is another."""
    if len(body) % size or count not in (None, len(body) // size):
        raise MessageError(f"a body of {len(body)} bytes is not {count or 'a row of'} pieces of {size}: it is refused")
    return [body[at : at + size] for at in range(0, len(body), size)]
