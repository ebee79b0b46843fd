"""Sealed messages between any two parties of a session, for protocols in which all parties talk to each other.

A Link is AES-256-GCM under a key that only its two parties can compute. Its nonce is the message's kind, sender and
round, and both ends only go forward, so that no nonce is used twice and a repeated message is refused. The key is
that on which both the identities and two key pairs of this session alone agree, whose public halves are the parties'
``hello``. The first makes it authentic: whoever exchanges a hello cannot compute it. The second makes it forgotten:
its private keys are deleted once the links are made, and an identity that is stolen later opens no earlier session.
(A relay that exchanged a hello and steals the identity later opens what was sealed under that hello; but nobody could
open it in its time, so no round went on from it.)
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.messages import MessageError
from dopamine_lib.errors import InputError

_HEADER = struct.Struct("<BHQ")  # kind, sender, round: with one zero byte it is the nonce
_HELLO = struct.Struct("<H32s")
HEADER_BYTES, TAG_BYTES = _HEADER.size, 16


class Link:
    """One party's end of a link: seals messages for ``peer`` and opens those from it.

    Kinds of messages are small numbers in the order in which a round sends them.

    >>> one, two = Link(bytes(32), own=0, peer=1), Link(bytes(32), own=1, peer=0)
    >>> two.open(1, 0, one.seal(kind=1, round_number=0, body=b"hello"))
    b'hello'
    """

    def __init__(self, key: bytes, own: int, peer: int):
        self._cipher, self._own, self._peer = AESGCM(key), own, peer
        self._sent = self._received = (-1, 0)  # round and kind of the latest message

    def seal(self, kind: int, round_number: int, body: bytes, bound: bytes = b"") -> bytes:
        """A message 27 bytes longer than its body, which the peer can open only with the same ``bound`` bytes.

        Raises MessageError if this kind or a later one has been sent in this round, or anything in a later round:
        no nonce is used twice.
        """
        if (round_number, kind) <= self._sent:
            raise MessageError(
                f"message {kind} of round {round_number} would follow {self._sent[1]} of round {self._sent[0]}: "
                "messages are never sent again; take a new round"
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
            raise MessageError(f"message {kind} of round {round_number} from {self._peer} was read before: a replay")
        try:
            body = self._cipher.decrypt(header + b"\0", memoryview(message)[HEADER_BYTES:], header + bound)
        except InvalidTag:
            raise MessageError(
                f"message {kind} of round {round_number} from {self._peer} is not authentic: it was changed on the "
                "way, sealed with another key, or meant for another list of hospitals or another model"
            ) from None
        self._received = (round_number, kind)
        return body


class Handshake:
    """One party's way to its links: it sends its hello, gets those of all parties, and computes a key with each.

    number    the party's own
    identity  its key pair
    publics   the public keys of all parties by number, known beforehand: a relay could replace unknown ones
    """

    def __init__(self, number: int, identity: Identity, publics: dict[int, bytes]):
        check_different(publics)
        self._number, self._identity, self._publics = number, identity, publics
        self._own = Identity()  # of this session
        self._fresh = self._own.public

    def hello(self) -> bytes:
        """34 public bytes for all parties."""
        return _HELLO.pack(self._number, self._fresh)

    def links(self, hellos: Iterable[bytes]) -> dict[int, Link]:
        """A link to each party whose hello is here, once.

        Raises MessageError for a stranger, a second hello or one of low order, naming its party.
        """
        said = {}
        for hello in hellos:
            if len(hello) != _HELLO.size or _HELLO.unpack(hello)[0] not in self._publics.keys() - said.keys():
                raise MessageError("a hello is damaged, repeated, or from a party without a known public key")
            number, said[number] = _HELLO.unpack(hello)
        if said.pop(self._number, None) != self._fresh:
            raise MessageError(f"party {self._number}'s own hello is missing or was changed: begin a new session")
        if self._own is None:
            raise MessageError(f"party {self._number} has its links already: begin a new session")
        links = {peer: self._link(peer, fresh) for peer, fresh in said.items()}
        self._own = None  # forgotten, so that nobody can compute the keys again
        return links

    def _link(self, peer: int, fresh: bytes) -> Link:
        ends = sorted([(self._number, self._fresh), (peer, fresh)])
        purpose = b"link " + b"".join(_HELLO.pack(*end) for end in ends)
        try:
            forgotten, lasting = self._own.agree(fresh, purpose), self._identity.agree(self._publics[peer], purpose)
        except MessageError as error:
            raise MessageError(f"party {peer}: {error}") from None
        key = hashlib.blake2b(lasting, key=forgotten, digest_size=32).digest()
        return Link(key, self._number, peer)


def check_hello(number: int, hello: bytes) -> None:
    """Raise MessageError, naming the party, where this is no hello of it, or one of low order."""
    if len(hello) != _HELLO.size or _HELLO.unpack(hello)[0] != number:
        raise MessageError(f"party {number}: a hello is damaged or another party's")
    try:
        Identity().agree(_HELLO.unpack(hello)[1], b"usable")
    except MessageError as error:
        raise MessageError(f"party {number}: {error}") from None


def check_different(publics: Mapping[int, bytes]) -> None:
    """Raise InputError where two parties have one public key: its holder would speak for both."""
    holders = {}
    for number, public in sorted(publics.items()):
        if holders.setdefault(public, number) != number:
            raise InputError(
                f"parties {holders[public]} and {number} have the same public key, so that one could speak for both: "
                "get each from its owner"
            )


def sender_of(message: bytes) -> int:
    """The sender that a message names; only opening the message proves it."""
    if len(message) < HEADER_BYTES + TAG_BYTES:
        raise MessageError(f"a message of {len(message)} bytes is shorter than an empty one: it was cut off")
    return _HEADER.unpack_from(message)[1]
