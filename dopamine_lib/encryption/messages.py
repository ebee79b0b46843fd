"""Messages between hospitals and server: bytes with a header, sealed, and refused when anything is wrong.

TenSEAL adds and decrypts whatever it is given: flipped bits, a message of another round, a ciphertext under
another key. So every message names its session, round, sender, layout and key, and is authenticated:

    hospital to server   AES-256-GCM under a key those two share: the other hospitals, which could decrypt it, cannot
                         open it
    server to hospitals  one answer for all with a GCM tag for each, so that no hospital can pose as the server

Nothing is pickled: a header is a struct, a body is ciphertexts with their lengths.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC = b"DOPA"
UPDATE, AGGREGATE = 1, 2
SERVER = 0xFFFF  # the server's number as a sender
TAG = 16
_HEADER = struct.Struct("<4sBBHQ16s16sIQ")
_LENGTH = struct.Struct("<I")


class AggregationAborted(RuntimeError):
    """A round that must not go on because too few hospitals arrived: nothing was opened, and it is spent."""


class MessageError(RuntimeError):
    """A message that is refused: damaged, replayed, or of another round, key, layout or sender."""


def check_enough(present: int, needed: int, round_number: int) -> None:
    """Raise AggregationAborted unless ``present`` hospitals are at least ``needed``."""
    if present < needed:
        raise AggregationAborted(
            f"round {round_number} has only {present} of the {needed} hospitals that it needs: nothing is opened and "
            "the round is spent; go on with the next"
        )


class Header(NamedTuple):
    """What a message is bound to.

    kind          UPDATE or AGGREGATE
    layout        the layout's number
    sender        the hospital's number, or SERVER
    round_number  from 0
    session       16 bytes, drawn when the keys are made
    key           16 bytes that name the BFV key
    d             number of values in an update
    check         the masked check sum (``sum_check``), an integer mod 2^64
    """

    kind: int
    layout: int
    sender: int
    round_number: int
    session: bytes
    key: bytes
    d: int
    check: int

    def to_bytes(self) -> bytes:
        """60 bytes."""
        return _HEADER.pack(MAGIC, *self)


def read_header(message: bytes, **expected: int | bytes) -> tuple[Header, memoryview]:
    """The header of a message, and the rest. Raises MessageError, naming the first field not as ``expected``."""
    if len(message) < _HEADER.size:
        raise MessageError(f"a message of {len(message)} bytes is shorter than a header: it was cut off; send it again")
    magic, *fields = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise MessageError(
            f"a message begins with {magic!r}, not {MAGIC!r}: it is damaged, or not a message of this kit"
        )
    header = Header(*fields)
    for name, wanted in expected.items():
        found = getattr(header, name)
        if found != wanted:
            shown = [value.hex()[:8] if isinstance(value, bytes) else value for value in (found, wanted)]
            raise MessageError(f"a message has {name} {shown[0]}, but must have {shown[1]} here: it is refused")
    return header, memoryview(message)[_HEADER.size :]


def seal(key: bytes, header: Header, parts: Iterable[bytes]) -> bytes:
    """An update: the header, then each part sealed by itself, so that the server never holds all of them open.

    The nonce is made of round and part, so a key must seal only one update per round; BfvHospital ensures it.
    """
    cipher, head = AESGCM(key), header.to_bytes()
    sealed = (cipher.encrypt(_nonce(header.round_number, i), part, head) for i, part in enumerate(parts))
    return head + join(sealed)


def unseal(key: bytes, header: Header, parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts of an update, opened one after another. Raises MessageError where a tag is wrong."""
    cipher, head = AESGCM(key), header.to_bytes()
    for i, part in enumerate(parts):
        try:
            yield cipher.decrypt(_nonce(header.round_number, i), part, head)
        except InvalidTag:
            raise MessageError(
                f"the message of hospital {header.sender} in round {header.round_number} is not authentic: it was "
                "changed on the way, or sealed with another key"
            ) from None


def tag(key: bytes, round_number: int, content: bytes) -> bytes:
    """16 bytes that only a holder of ``key`` can make for this content and round: GCM without a plaintext."""
    return AESGCM(key).encrypt(_nonce(round_number, 0), b"", content)


def check_tag(key: bytes, round_number: int, content: bytes, given: bytes) -> None:
    """Raise MessageError unless ``given`` is the content's tag."""
    try:
        AESGCM(key).decrypt(_nonce(round_number, 0), bytes(given), content)
    except InvalidTag:
        raise MessageError(
            f"the aggregate of round {round_number} is not authentic: it was changed on the way, or does not come "
            "from this session's server"
        ) from None


def join(parts: Iterable[bytes]) -> bytes:
    """Parts, each preceded by its length in four bytes."""
    return b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))


def split(body: memoryview, count: int) -> list[memoryview]:
    """The ``count`` parts of a body, not copied: the inverse of ``join``.

    Raises MessageError where a part is missing or something is left over.
    """
    parts, at = [], 0
    for i in range(count):
        end = at + _LENGTH.size
        length = _LENGTH.unpack_from(body, at)[0] if end <= len(body) else 0
        if end + length > len(body) or not length:
            raise MessageError(f"a message ends within part {i} of {count}: it was cut off; send it again")
        parts.append(body[end : end + length])
        at = end + length
    if at != len(body):
        raise MessageError(f"a message has {len(body) - at} bytes after its {count} parts: it is refused")
    return parts


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """Hospitals' numbers, two bytes each.

    >>> unpack_numbers(pack_numbers([0, 2, 258]))
    (0, 2, 258)
    """
    return np.array(list(numbers), "<u2").tobytes()


def unpack_numbers(data: bytes) -> tuple[int, ...]:
    """The inverse of ``pack_numbers``. Raises MessageError unless they increase, so that each comes once."""
    numbers = tuple(int.from_bytes(number, "little") for number in cut(data, 2))
    if list(numbers) != sorted(set(numbers)):
        raise MessageError(f"a list of hospitals is {list(numbers)}, but must increase: it is refused")
    return numbers


def cut(body: bytes, size: int, count: int | None = None) -> list[bytes]:
    """A body in pieces of ``size`` bytes. Raises MessageError where one is shorter, or they are not ``count``."""
    if len(body) % size or count not in (None, len(body) // size):
        pieces = f"{count} pieces" if count is not None else "pieces"
        raise MessageError(f"a body of {len(body)} bytes does not consist of {pieces} of {size}: it is refused")
    return [body[at : at + size] for at in range(0, len(body), size)]


def _nonce(round_number: int, part: int) -> bytes:
    return struct.pack("<QI", round_number, part)
