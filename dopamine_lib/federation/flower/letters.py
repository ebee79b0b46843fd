"""What travels in Flower's messages: a request brings a hospital what there is for it, the reply what it has put.

Flower's server asks and its nodes answer, so a hospital cannot call as it does over gRPC. A request is answered once
the hospital's program can do nothing more without another message: in a round that is one exchange. Either letter may
be repeated where the other was lost: messages are numbered, and what came already is known.
"""

import json
import struct
from typing import NamedTuple

from dopamine_lib.encryption.messages import MessageError
from dopamine_lib.files import parse_json

_LENGTH = struct.Struct("<I")
#: The session of a party that is in none.
NONE = bytes(16)


class Letter(NamedTuple):
    """A request of the server's to a hospital, or the reply.

    instance  the life of the hospital's program that replies, 16 bytes
    session   that of the messages, 16 bytes, or NONE
    parties   of a request: the session's hospitals; of a reply: those without whose next message the program waits
    taken     messages of the other's that have arrived in this session
    first     number of the first of ``messages``
    messages  (party, sealed bytes): whom it is from, in a request, or for
    joining   of a reply: whether the program waits for the next session
    over      of a request: why the session has ended; of a reply: why the program has
    refused   of a request that says why in ``over``: whether the server wants nothing more to do with this hospital
    """

    instance: bytes = NONE
    session: bytes = NONE
    parties: tuple[int, ...] = ()
    taken: int = 0
    first: int = 0
    messages: tuple[tuple[int, bytes], ...] = ()
    joining: bool = False
    over: str = ""
    refused: bool = False


def pack(letter: Letter) -> bytes:
    """A letter as bytes: its fields as JSON, then the messages."""
    fields = letter._asdict() | {"messages": [[party, len(message)] for party, message in letter.messages]}
    named = {key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()}
    text = json.dumps(named).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(message for _, message in letter.messages)])


def unpack(body: bytes) -> Letter:
    """The inverse of ``pack``. Raises MessageError for bytes that are no letter.

    >>> unpack(pack(Letter(parties=(0, 2), messages=((2, b"sealed"),)))).messages
    ((2, b'sealed'),)
    """
    try:
        (size,) = _LENGTH.unpack_from(body)
        at = _LENGTH.size + size
        fields, found = parse_json(body[_LENGTH.size : at]), {}
        for name, default in Letter()._asdict().items():
            value = fields[name]
            if name == "messages":
                value = []
                for party, length in fields[name]:
                    if type(party) is not int or type(length) is not int or not 0 <= length <= len(body) - at:
                        raise ValueError(length)
                    value.append((party, body[at : at + length]))
                    at += length
                value = tuple(value)
            elif isinstance(default, bytes):
                value = bytes.fromhex(value)
                if len(value) != len(NONE):
                    raise ValueError(value)
            elif isinstance(default, tuple):
                value = tuple(value)
                if not all(type(number) is int for number in value):
                    raise TypeError(value)
            elif type(value) is not type(default):
                raise TypeError(value)
            found[name] = value
        if at != len(body):
            raise ValueError(at)
    except (struct.error, ValueError, KeyError, TypeError):
        raise MessageError(f"{len(body)} bytes are no letter of this version: they are refused") from None
    return Letter(**found)
