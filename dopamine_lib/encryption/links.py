"""Sealed messages between any two parties of a session, for protocols in which everybody talks to everybody.

A Link is AES-256-GCM under a key that two parties alone can compute. Its nonce is the message's kind, sender and
round, and both ends only go forward, so that no nonce is used twice and a repeated message is refused. The key is
new in every session even if the parties' identities are not: both throw in 32 fresh bytes, their ``hello``.
Whoever later steals an identity's private key opens the sessions it was used in: take new identities for each
session where that matters.
"""

import os
import struct
from collections.abc import Iterable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.messages import MessageError

_HEADER = struct.Struct("<BHQ")  # kind, sender, round: with one zero byte it is the nonce
_HELLO = struct.Struct("<H32s")
HEADER_BYTES, TAG_BYTES = _HEADER.size, 16


class Link:
    """One end of what two parties share: seals for ``peer``, opens what ``peer`` sealed.

    Kinds are small numbers in the order in which a round sends them.
    """

    def __init__(self, key: bytes, own: int, peer: int):
        self._cipher, self._own, self._peer = AESGCM(key), own, peer
        self._sent = self._received = (-1, 0)  # round and kind of the latest message

    def seal(self, kind: int, round_number: int, body: bytes, bound: bytes = b"") -> bytes:
        """A message of 27 bytes more than its body; the peer can open it only with the same ``bound`` bytes.

        Raises MessageError where this kind or a later one was sent in this round or after it: never the same nonce.
        """
        if (round_number, kind) <= self._sent:
            raise MessageError(
                f"message {kind} of round {round_number} would follow {self._sent[1]} of round {self._sent[0]}: "
                "what was sent is never sent again; take a new round"
            )
        self._sent = (round_number, kind)
        header = _HEADER.pack(kind, self._own, round_number)
        return header + self._cipher.encrypt(header + b"\0", body, header + bound)

    def open(self, kind: int, round_number: int, message: bytes, bound: bytes = b"") -> bytes:
        """The body of the peer's message of this kind and round.

        Raises MessageError for anything else: changed, cut off, replayed, of another round, kind, sender or key.
        """
        header = _HEADER.pack(kind, self._peer, round_number)
        if message[:HEADER_BYTES] != header:
            raise MessageError(
                f"a message is not number {kind} of round {round_number} from {self._peer}: it is refused"
            )
        if (round_number, kind) <= self._received:
            raise MessageError(f"message {kind} of round {round_number} from {self._peer} has been read: a replay")
        try:
            body = self._cipher.decrypt(header + b"\0", memoryview(message)[HEADER_BYTES:], header + bound)
        except InvalidTag:
            raise MessageError(
                f"message {kind} of round {round_number} from {self._peer} is not authentic: it was changed on the "
                "way, sealed with another key, or meant for another list of hospitals"
            ) from None
        self._received = (round_number, kind)
        return body


class Greeting:
    """How one party comes to its links: it says hello, gets everybody's, and computes a key with each.

    number    its own
    identity  its key pair
    publics   number to public key of all parties, known beforehand: who relays messages could swap unknown ones
    """

    def __init__(self, number: int, identity: Identity, publics: dict[int, bytes]):
        self._number, self._identity, self._publics = number, identity, publics
        self._fresh = os.urandom(32)

    def hello(self) -> bytes:
        """34 bytes for everybody; no secret."""
        return _HELLO.pack(self._number, self._fresh)

    def links(self, hellos: Iterable[bytes]) -> dict[int, Link]:
        """A link to each party that said hello. MessageError for a stranger or one who speaks twice."""
        said = {}
        for hello in hellos:
            if len(hello) != _HELLO.size or _HELLO.unpack(hello)[0] not in self._publics.keys() - said.keys():
                raise MessageError("a hello is damaged, a second one, or of a party without a known public key")
            number, said[number] = _HELLO.unpack(hello)
        if said.pop(self._number, None) != self._fresh:
            raise MessageError(f"party {self._number}'s own hello is missing or was changed: begin a new session")
        return {peer: self._link(peer, fresh) for peer, fresh in said.items()}

    def _link(self, peer: int, fresh: bytes) -> Link:
        ends = sorted([(self._number, self._fresh), (peer, fresh)])
        purpose = b"link " + b"".join(_HELLO.pack(*end) for end in ends)
        return Link(self._identity.agree(self._publics[peer], purpose), self._number, peer)


def sender_of(message: bytes) -> int:
    """Who a message says it is from; only opening it proves that."""
    if len(message) < HEADER_BYTES + TAG_BYTES:
        raise MessageError(f"a message of {len(message)} bytes is shorter than an empty one: it was cut off")
    return _HEADER.unpack_from(message)[1]
