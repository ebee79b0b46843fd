"""Key pairs of the parties, and the keys on which two of them agree.

Public keys must be known beforehand: a party that relays them could replace them with its own.
"""

import os
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dopamine_lib.encryption.messages import MessageError


def exchange(own: X25519PrivateKey, other: bytes) -> bytes:
    """The secret, 32 bytes, of a private and a public key. Raises MessageError for a public key that hides nothing."""
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:  # cryptography refuses a secret of zeros, and another length
        raise MessageError("a public key is of low order, so that it hides nothing: get it from its owner") from None


class Identity:
    """One party's X25519 key pair, fresh from the operating system or from the 32 bytes of its private key.

    (For TLS there are certificates: ``certificates``.)
    """

    def __init__(self, private: bytes | None = None):
        self._private = X25519PrivateKey.from_private_bytes(private or os.urandom(32))
        self.public = self._private.public_key().public_bytes_raw()

    def agree(self, other: bytes, purpose: bytes) -> bytes:
        """32 bytes for one purpose that only this party and the holder of the public key ``other`` can compute.

        Raises MessageError for a point of low order, with which anybody could compute them.

        >>> one, two = Identity(), Identity()
        >>> one.agree(two.public, b"example") == two.agree(one.public, b"example")
        True
        """
        secret = exchange(self._private, other)
        return HKDF(SHA256(), length=32, salt=None, info=b"dopamine " + purpose).derive(secret)

    def seal(self, other: bytes, secret: bytes, fresh: bytes) -> bytes:
        """``secret``, encrypted so that only the holder of ``other`` can open it, and can tell who sent it.

        fresh  bytes that the receiver drew for this session and showed: an earlier session's keys, delivered again,
               would have it use up their nonces and pads once more
        """
        nonce = os.urandom(12)
        return nonce + AESGCM(self.agree(other, b"seal")).encrypt(nonce, secret, self.public + other + fresh)

    def unseal(self, other: bytes, sealed: bytes, fresh: bytes) -> bytes:
        """The secret that the holder of ``other`` sealed for this party. Raises MessageError for anything else."""
        try:
            return AESGCM(self.agree(other, b"seal")).decrypt(sealed[:12], sealed[12:], other + self.public + fresh)
        except (InvalidTag, ValueError):
            raise MessageError(
                "a sealed key does not open: it was changed, or is meant for another party or session"
            ) from None


@dataclass(frozen=True)
class Channel:
    """The keys between one hospital and the server: ``up`` seals updates, ``down`` makes the aggregate's tags."""

    up: bytes = field(repr=False)
    down: bytes = field(repr=False)


def channel(own: Identity, other: bytes, session: bytes, number: int) -> Channel:
    """The channel of hospital ``number`` in this session; the hospital and the server compute the same one."""
    where = session + struct.pack("<H", number)
    return Channel(own.agree(other, b"up " + where), own.agree(other, b"down " + where))
