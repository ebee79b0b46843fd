"""What the workers say to each other around the protocol itself: who asks for what, and in which order.

Patient and provider (P: patient, S: service provider, H: hospital):

    P -> S  connect            S -> P  STATUS, SESSION, CARD       or a STATUS that says why not
    P -> H  JOIN               H -> P  SEED: 16 bytes, once
    P <> S  the protocol's set-up: the masked model
    P -> S  COMMAND prepare    S -> P  GRANTED: 1, or 0 where too many lie ready; then READY when it is done
    P -> S  COMMAND infer      P <> S  the protocol's online part
    P -> S  COMMAND end

Provider and hospital, one connection a session:

    S -> H  OPEN, PLAN         H -> S  SESSION, SEED
    S -> H  NEXT               H -> S  the corrections of one query

Sizes are fixed; a text goes as its length and then itself, with a bound that the reader sets.
"""

import enum
import struct

from dopamine_lib.inference.protocols.channel import Channel, ChannelError

#: Tags from here on are the workers'; the protocols' own stay below.
CONTROL = 0xC000
SESSION_BYTES, SEED_BYTES, FINGERPRINT_BYTES, DIGEST_BYTES = 16, 16, 32, 32
MAX_TEXT = 16 * 2**20


class Tag(enum.IntEnum):
    """Control messages."""

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


class Status(enum.IntEnum):
    """How the provider greets a patient."""

    WELCOME = 0
    BUSY = 1
    NO_HOSPITAL = 2


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
    """Send a text of any length: its length first."""
    data = text.encode()
    send_number(channel, tag, len(data))
    channel.send(tag, data)


def receive_text(channel: Channel, tag: int, limit: int = MAX_TEXT) -> str:
    """Receive a text. Raises ChannelError above ``limit`` bytes and for what is no UTF-8."""
    size = receive_number(channel, tag)
    if size > limit:
        channel.close()
        raise ChannelError(f"the other side announced a text of {size} bytes; at most {limit} are taken")
    try:
        return receive_bytes(channel, tag, size).decode()
    except UnicodeDecodeError:
        channel.close()
        raise ChannelError("the other side sent a text that is not UTF-8") from None
