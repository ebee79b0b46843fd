"""Oblivious transfer: the sender has two words for each of many bits of the chooser's, who gets the one its bit names.

The sender does not learn the bit, the chooser nothing of the other word. Both follow the protocol (semi-honest).

Base, 128 of them, once a session (Even, Goldreich and Lempel 1985, with X25519):
    1. For choice c the chooser sends two public keys. Number c is its own; the other is a random point of the curve
       times a random scalar, so nobody knows its private key.
    2. The sender sends one public key; the two shared secrets, hashed, are its two seeds. The chooser can compute one.
Both keys are uniform in the group, to 2^-120, so the choice does not show; the other seed is a Diffie-Hellman secret of
two keys neither of which the chooser has made.

Extension, any number (Ishai, Kilian, Nissim and Petrank 2003), with the roles of the base turned round: the extension's
sender chose, by a secret s of 128 bits, between the seeds k[i][0] and k[i][1], i = 0 … 127.
    3. The chooser expands its seeds with AES and sends the columns u[i] = G(k[i][0]) ^ G(k[i][1]) ^ choices.
    4. The sender takes q[i] = G(k[i][s_i]) ^ s_i u[i], the chooser t[i] = G(k[i][0]). Of these 128 columns, row j is
       q_j = t_j ^ c_j s. So H(t_j) is H(q_j) or H(q_j ^ s), by the choice c_j: a *pad* that both have, beside one that
       the sender has alone.

Why this hides: each u[i] is masked by the seed that the sender does not have; for H(q_j ^ s) the chooser would have to
guess s. H(x) = AES(x) ^ x under a public key for each use is a correlation-robust hash in the ideal-cipher model (Guo,
Katz, Wang and Yu 2020). A chooser that sent inconsistent columns could learn bits of s: nobody checks.
"""

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dopamine_lib.inference.protocols.channel import Channel, ChannelError

#: Bits of s, and base transfers.
WIDTH = 128
#: Of Curve25519, y^2 = x^3 + A x^2 + x modulo P.
_P, _A = 2**255 - 19, 486662


def choose_base(channel: Channel, tag: int, choices: np.ndarray) -> list[bytes]:
    """The chooser's side of ``WIDTH`` base transfers: the seeds of 16 bytes that its ``choices`` (WIDTH,) name."""
    own = [X25519PrivateKey.generate() for _ in range(WIDTH)]
    keys = np.empty((WIDTH, 2, 32), np.uint8)
    for i, choice in enumerate(choices):
        keys[i, choice] = np.frombuffer(own[i].public_key().public_bytes_raw(), np.uint8)
        keys[i, 1 - choice] = np.frombuffer(keyless(), np.uint8)
    channel.send(tag, keys)
    theirs = bytearray(32)
    channel.receive(tag, theirs)
    return [_seed(key, bytes(theirs), i) for i, key in enumerate(own)]


def send_base(channel: Channel, tag: int) -> list[tuple[bytes, bytes]]:
    """The sender's side: both seeds of each of ``WIDTH`` base transfers."""
    keys, own = np.empty((WIDTH, 2, 32), np.uint8), X25519PrivateKey.generate()
    channel.receive(tag, keys)
    seeds = [tuple(_seed(own, key.tobytes(), i) for key in pair) for i, pair in enumerate(keys)]
    channel.send(tag, own.public_key().public_bytes_raw())
    return seeds


def keyless() -> bytes:
    """A uniform public key of X25519 whose private key nobody knows: a random scalar times a random point.

    Half of all 32 bytes are no point of the curve, as no honest key is: those would give the choice away.
    """
    while True:
        x = int.from_bytes(os.urandom(32), "little") % 2**255
        if on_curve(x):
            return X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(x.to_bytes(32, "little")))


def on_curve(x: int) -> bool:
    """Whether x is the coordinate of a point of Curve25519 (and not of its twist), by Euler's criterion.

    >>> on_curve(9)
    True
    """
    return pow(x * (x * x + _A * x + 1) % _P, (_P - 1) // 2, _P) == 1


def _seed(own: X25519PrivateKey, public: bytes, number: int) -> bytes:
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order
        raise ChannelError("the other side sent a key that is no point of the curve") from None
    return hashlib.blake2b(number.to_bytes(2, "big") + shared, digest_size=16).digest()


class Pads:
    """A sender's two pads, or a chooser's one, for planes of transfers: ``rows`` uint8 (planes, n, 16).

    offset  the sender's s (16,), None for the chooser
    """

    def __init__(self, rows: np.ndarray, offset: np.ndarray | None = None):
        self._rows, self._offset = rows, offset

    def of(self, planes: slice | list[int], use: int, dtype: type) -> list[np.ndarray]:
        """The pads of some planes, (planes, n, 16 / itemsize) words: a list of one, or of two for the sender.

        use  another number gives independent pads; each may mask one message only
        """
        rows = self._rows[planes]
        both = [rows] if self._offset is None else [rows, rows ^ self._offset]
        return [_hash(one, use).view(dtype) for one in both]


class Sender:
    """The sender of one session's transfers; the base's choices are made here."""

    def __init__(self, channel: Channel, tag: int):
        self._channel, self._tag = channel, tag
        self._offset = np.frombuffer(os.urandom(WIDTH // 8), np.uint8)
        self._chosen = np.unpackbits(self._offset, bitorder="little")
        self._streams = [_stream(seed) for seed in choose_base(channel, tag, self._chosen)]

    def extend(self, planes: int, count: int) -> Pads:
        """Receive the chooser's columns for ``planes`` times ``count`` transfers, count a multiple of 8."""
        columns = np.empty((WIDTH, planes * count // 8), np.uint8)
        self._channel.receive(self._tag, columns)
        columns *= self._chosen[:, None]
        for column, stream in zip(columns, self._streams, strict=True):
            column ^= _next(stream, len(column))
        return Pads(transpose(columns).reshape(planes, count, 16), self._offset)


class Chooser:
    """The chooser of one session's transfers."""

    def __init__(self, channel: Channel, tag: int):
        self._channel, self._tag = channel, tag
        self._streams = [tuple(map(_stream, pair)) for pair in send_base(channel, tag)]

    def extend(self, choices: np.ndarray) -> Pads:
        """Send columns for packed choices uint8 (planes, n / 8)."""
        planes, size = choices.shape
        mine = np.empty((WIDTH, planes * size), np.uint8)
        sent = np.empty_like(mine)
        for i, (one, other) in enumerate(self._streams):
            mine[i] = _next(one, planes * size)
            sent[i] = mine[i] ^ _next(other, planes * size) ^ choices.reshape(-1)
        self._channel.send(self._tag, sent)
        return Pads(transpose(mine).reshape(planes, 8 * size, 16))


def _stream(seed: bytes):
    return Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()


def _next(stream, size: int) -> np.ndarray:
    return np.frombuffer(stream.update(bytes(size)), np.uint8)


def _hash(rows: np.ndarray, use: int) -> np.ndarray:
    """H of each row of 16 bytes."""
    rows = np.ascontiguousarray(rows)
    cipher = Cipher(algorithms.AES(use.to_bytes(16, "little")), modes.ECB()).encryptor()
    return np.frombuffer(cipher.update(rows.reshape(-1)), np.uint8).reshape(rows.shape) ^ rows


def transpose(columns: np.ndarray) -> np.ndarray:
    """Packed bits (128, m / 8) as rows (m, 16): bit j of column i becomes bit i of row j, lowest bits first.

    8 x 8 bits at a time, in a word of 64 (Warren, Hacker's Delight, section 7-3).
    """
    words = np.ascontiguousarray(columns.reshape(16, 8, -1).transpose(0, 2, 1)).view("<u8")[..., 0]
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        moved = (words ^ words >> np.uint64(shift)) & np.uint64(mask)
        words ^= moved ^ moved << np.uint64(shift)
    return np.ascontiguousarray(words.view(np.uint8).T)
