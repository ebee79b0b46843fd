"""The server's part in a secure sum by masks: it relays, adds and unmasks as in ``masks``."""

import itertools
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.links import Handshake, sender_of
from dopamine_lib.encryption.masking import (
    BOX_BYTES,
    CARD,
    DELIVERY,
    MASKED,
    REVEAL,
    SHARES,
    SURVIVORS,
    VOUCH,
    VOUCH_BYTES,
    VOUCHED,
    add_masks,
    pair_seed,
    seed_hash,
    threshold,
)
from dopamine_lib.encryption.messages import SERVER, MessageError, check_enough, cut, pack_numbers
from dopamine_lib.encryption.shamir import SHARE_BYTES, reconstruct
from dopamine_lib.encryption.transcript import Transcript
from dopamine_lib.errors import InputError

#: Choices of shares that are tried before a round in which some are wrong is given up.
MOST_TRIED = 1000


class MaskServer:
    """The server: relays shares that it cannot open, adds masked values, and unmasks the sum of the survivors.

    Arguments as for MaskHospital; ``transcript`` records everything that the server receives, opened, and everything
    that it rebuilds. A round is

        begin; receive each step-1 message; deliveries; receive each masked one; survivors; receive each
        confirmation; confirmations; receive each step-4 message; total

    where ``receive`` takes any hospital's message of the current step, and what is sent out is one message for each
    hospital, by number. It needs the memory of one vector whatever K is, since values are added as they arrive.
    """

    def __init__(
        self,
        identity: Identity,
        publics: dict[int, bytes],
        d: int,
        *,
        least: int = 2,
        transcript: Transcript | None = None,
    ):
        self.d, self.least, self._transcript = d, least, transcript
        self._handshake, self._links = Handshake(SERVER, identity, publics), {}
        self._round, self._kind, self._sharers, self.liars = -1, None, [], set()

    def hello(self) -> bytes:
        """The server's first message of a session, for all parties."""
        return self._handshake.hello()

    def join(self, hellos: Iterable[bytes]) -> None:
        """Take in the hellos of all parties, the server's own among them."""
        self._links = self._handshake.links(hellos)

    def begin(self, round_number: int, invited: Iterable[int]) -> None:
        """Start a round; an unfinished one is dropped and cannot be taken up again.

        Raises MessageError for a round that was begun before, AggregationAborted for too few hospitals.
        """
        if round_number <= self._round:
            raise MessageError(f"round {round_number} is not past {self._round}, the last one begun: take a new round")
        self._round, self._kind, self._from = round_number, None, {}
        self._invited = sorted(set(invited))
        self._needed = threshold(len(self._invited), self.least)
        check_enough(len(self._invited), self._needed, round_number)
        self._sum, self._expected, self._kind = np.zeros(self.d, np.uint32), self._invited, SHARES

    def receive(self, message: bytes) -> int:
        """Take in one hospital's message of the current step, and return the hospital's number.

        Raises MessageError for any other message, changed, repeated or late, and uses nothing of it.
        """
        number = sender_of(message)
        if self._kind is None or number not in self._expected or number in self._from:
            raise MessageError(f"a message of {number} is late, repeated or not asked for in round {self._round}")
        body = self._links[number].open(self._kind, self._round, message)
        self._record(f"message {self._kind} of hospital {number}", body)
        due = self._due()
        if len(body) != due:
            raise MessageError(f"hospital {number} sent {len(body)} bytes in step {self._kind}, not {due}: refused")
        if self._kind == SHARES and CARD.unpack(body[: CARD.size])[0] != number:
            raise MessageError(f"hospital {number} calls itself {CARD.unpack(body[: CARD.size])[0]}: refused")
        if self._kind == MASKED:
            self._sum += np.frombuffer(body, "<u4")
            body = b""
        self._from[number] = body
        return number

    def _due(self) -> int:
        """The bytes of a hospital's message in this step."""
        return {
            SHARES: CARD.size + BOX_BYTES * (len(self._invited) - 1),
            MASKED: 4 * self.d,
            VOUCH: VOUCH_BYTES * (len(self._expected) - 1),
            REVEAL: SHARE_BYTES * len(self._sharers),
        }[self._kind]

    def deliveries(self) -> dict[int, bytes]:
        """After step 1: to each hospital that shared, the others' cards and the shares sealed for it."""
        sent = self._close(SHARES)
        self._sharers, self._cards, boxes = sorted(sent), {}, {}
        for i, body in sent.items():
            holders = [j for j in self._invited if j != i]
            _, *self._cards[i] = CARD.unpack(body[: CARD.size])
            own = cut(body[CARD.size :], BOX_BYTES)
            boxes |= {(i, j): body[: CARD.size] + box for j, box in zip(holders, own, strict=True)}
        bodies = {j: b"".join(boxes[i, j] for i in self._sharers if i != j) for j in self._sharers}
        return self._send(DELIVERY, bodies, MASKED)

    def survivors(self) -> dict[int, bytes]:
        """After step 2: the list of the hospitals whose values came. Later values stay masked and are not added."""
        self._survivors = sorted(self._close(MASKED))
        return self._send(SURVIVORS, dict.fromkeys(self._survivors, pack_numbers(self._survivors)), VOUCH)

    def confirmations(self) -> dict[int, bytes]:
        """After step 3: to each hospital, the messages with which the others vouch for the list."""
        sent = self._close(VOUCH)
        vouchers = {j: [] for j in sent}
        for i, body in sent.items():
            others = [j for j in self._survivors if j != i]
            for j, box in zip(others, cut(body, VOUCH_BYTES, len(others)), strict=True):
                if j in vouchers:
                    vouchers[j].append(box)
        return self._send(VOUCHED, {j: b"".join(boxes) for j, boxes in vouchers.items()}, REVEAL)

    def total(self) -> np.ndarray:
        """After step 4: the survivors' sum, int64 (d,), exact where it lies within +-(2^31 - 1).

        Hospitals that handed over a wrong share are in ``liars`` afterwards; while enough others are right the round
        goes on without them. Raises MessageError where no shares give the secret that was published a hash or key of.
        """
        revealed = {j: cut(body, SHARE_BYTES) for j, body in self._close(REVEAL).items()}
        seeds, self.liars = [], set()
        for at, i in enumerate(self._sharers):
            secret = self._rebuilt(i, {j: shares[at] for j, shares in revealed.items()})
            survived = i in self._survivors
            self._record(f"{'seed' if survived else 'key'} of hospital {i}", secret)
            if survived:
                seeds.append((secret, False))
            else:
                key = X25519PrivateKey.from_private_bytes(secret)
                for j in self._survivors:  # a survivor added this mask if its number is the smaller
                    seeds.append((pair_seed(key, self._cards[j][0], self._round, (i, j)), j > i))
        add_masks(self._sum, seeds)
        total = self._sum.view(np.int32).astype(np.int64)
        self._record("total", total.tobytes())
        return total

    def _rebuilt(self, i: int, shares: dict[int, bytes]) -> bytes:
        """The secret of hospital i, its seed or its key: the one that its card stands for."""
        public, hashed = self._cards[i]

        def genuine(holders: Iterable[int]) -> bytes | None:
            try:
                secret = reconstruct({j: shares[j] for j in holders}, self._needed)
            except InputError:  # beyond the prime, or no secret
                return None
            if i in self._survivors:
                return secret if seed_hash(secret) == hashed else None
            key = X25519PrivateKey.from_private_bytes(secret)
            return secret if key.public_key().public_bytes_raw() == public else None

        honest = [j for j in shares if j not in self.liars]
        for holders in itertools.islice(itertools.combinations(honest, self._needed), MOST_TRIED):
            secret = genuine(holders)
            if secret is not None:
                rest = set(honest) - set(holders)
                self.liars |= {j for j in rest if genuine([*holders[1:], j]) != secret}
                return secret
        raise MessageError(f"shares of hospital {i} give a wrong secret: the round is spent unopened")

    def _close(self, kind: int) -> dict[int, bytes]:
        """End a step: the bodies received, by number. Raises AggregationAborted, with nothing opened, for too few."""
        if self._kind != kind:
            raise MessageError(f"round {self._round} is not at step {kind}: steps come once, and in order")
        self._kind = None
        check_enough(len(self._from), self._needed, self._round)
        return self._from

    def _send(self, kind: int, bodies: dict[int, bytes], then: int) -> dict[int, bytes]:
        """Seal a body for each hospital, and expect messages of kind ``then`` from them."""
        self._from, self._expected, self._kind = {}, sorted(bodies), then
        return {j: self._links[j].seal(kind, self._round, body) for j, body in bodies.items()}

    def _record(self, name: str, content: bytes) -> None:
        if self._transcript is not None:
            self._transcript.record(f"round {self._round}: {name}", content)
