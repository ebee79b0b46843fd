"""Control messages: what the workers say to each other around the protocol itself, and in which order.

Patient and provider (P: patient, S: service provider, C: crypto-provider):

    P -> S  connect            S -> P  STATUS, SESSION, CARD       or a STATUS that says why not
    P -> C  JOIN               C -> P  SEED: 16 bytes, once
    P <> S  the protocol's setup: the masked model
    P -> S  COMMAND prepare    S -> P  GRANTED: 1, or 0 where too many lie ready; then READY when it is done
                               without a crypto-provider, P <> S make the randomness in between; no SESSION, no JOIN
    P -> S  COMMAND infer, COUNT  P <> S  the protocol's online part, of COUNT queries at once
    P -> S  COMMAND end

Provider and crypto-provider, one connection per session:

    S -> C  OPEN, PLAN         C -> S  SESSION, SEED
    S -> C  NEXT               C -> S  the corrections of one query

Sizes are fixed; a text is preceded by its length, which the reader bounds.
"""

import enum
import struct

from dopamine_lib.inference.protocols.channel import Channel, ChannelError

#: Tags from here on are control messages'; the protocols' own stay below.
CONTROL = 0xC000
SESSION_BYTES, SEED_BYTES, FINGERPRINT_BYTES, DIGEST_BYTES = 16, 16, 32, 32
MAX_TEXT = 2 * 2**20


class Tag(enum.IntEnum):
    """Tags of the control messages."""

    STATUS = CONTROL
    SESSION = CONTROL + 1
    CARD = CONTROL + 2
    JOIN = CONTROL + 3
    SEED = CONTROL + 4
    COMMAND = CONTROL + 5
    GRANTED = CONTROL + 6
    READY = CONTROL + 7
    OPEN = CONTROL + 8
    PLAN = CONTROL + 9
    NEXT = CONTROL + 10
    COUNT = CONTROL + 11


class Status(enum.IntEnum):
    """How the provider greets a patient."""

    WELCOME = 0
    BUSY = 1
    NO_CRYPTO_PROVIDER = 2
    ALONE = 3  # welcome, to one that makes the randomness with the provider alone


class Command(enum.IntEnum):
    """What a patient may ask for within a session."""

    PREPARE = 1
    INFER = 2
    END = 3


def send_number(channel: Channel, tag: int, value: int) -> None:
    """Send one unsigned 32-bit number."""
    channel.send(tag, struct.pack("<I", value))


def receive_number(channel: Channel, tag: int) -> int:
    """Receive one unsigned 32-bit number."""
    return struct.unpack("<I", receive_bytes(channel, tag, 4))[0]


def receive_bytes(channel: Channel, tag: int, size: int) -> bytes:
    """Receive a message of ``size`` bytes."""
    out = bytearray(size)
    channel.receive(tag, out)
    return bytes(out)


def send_text(channel: Channel, tag: int, text: str) -> None:
    """Send a text of any length: its length first.

    >>> from dopamine_lib.inference.protocols.channel import local_pair
    >>> provider, patient = local_pair()
    >>> send_text(provider, Tag.CARD, "five grades")
    >>> receive_text(patient, Tag.CARD)
    'five grades'
    """
    data = text.encode()
    send_number(channel, tag, len(data))
    channel.send(tag, data)


def receive_text(channel: Channel, tag: int, limit: int = MAX_TEXT) -> str:
    """Receive a text. Raises ChannelError for more than ``limit`` bytes and for anything but UTF-8."""
    size = receive_number(channel, tag)
    if size > limit:
        channel.close()
        raise ChannelError(f"the other side announced a text of {size} bytes; at most {limit} are taken")
    try:
        return receive_bytes(channel, tag, size).decode()
    except UnicodeDecodeError:
        channel.close()
        raise ChannelError("the other side sent a text that is not UTF-8") from None
