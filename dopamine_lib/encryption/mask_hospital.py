"""A hospital's part in a secure sum by masks: steps 1 to 4 of the protocol in ``masks``."""

import os
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dopamine_lib.encryption.codec import LAYOUTS, check_limit
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
from dopamine_lib.encryption.messages import (
    SERVER,
    AggregationAborted,
    MessageError,
    check_enough,
    cut,
    pack_numbers,
    unpack_numbers,
)
from dopamine_lib.encryption.shamir import SHARE_BYTES, share
from dopamine_lib.errors import InputError

TOTAL_RANGE = LAYOUTS["ring32"].total_range


class MaskHospital:
    """One hospital: its values leave it masked, and it hands over one kind of share of each hospital.

    number    from 0
    identity  its key pair
    publics   the public keys of all parties by number, the server's under ``SERVER``
    d         number of values in a message
    least     the number of survivors that a round needs

    A round is the methods ``share``, ``mask``, ``confirm`` and ``reveal``, each once and in this order; one that
    raises ends the round. Randomness is the operating system's, even in a seeded run: masks cancel in the sum, so
    nothing depends on them.
    """

    def __init__(self, number: int, identity: Identity, publics: dict[int, bytes], d: int, *, least: int = 2):
        self.number, self.d, self.least = number, d, least
        self._handshake, self._links = Handshake(number, identity, publics), {}
        self._round, self._due = -1, None

    def __repr__(self) -> str:
        return f"<MaskHospital {self.number}, d = {self.d}>"

    def hello(self) -> bytes:
        """The first message of a session, for all parties."""
        return self._handshake.hello()

    def join(self, hellos: Iterable[bytes]) -> None:
        """Take in the hellos of all parties, this hospital's own and the server's among them."""
        self._links = self._handshake.links(hellos)

    def share(self, round_number: int, invited: Iterable[int], context: bytes = b"") -> bytes:
        """Step 1, among the hospitals ``invited``.

        context  what all hospitals must hold alike, e.g. a hash of the model at which they computed: they refuse each
                 other's shares otherwise, before anything is masked
        Raises MessageError for a round that was begun before, even if it was aborted: its masks, sample and noise
        are spent. Raises InputError for hospitals without a link, AggregationAborted for too few.
        """
        if round_number <= self._round:
            raise MessageError(
                f"round {round_number} is not past {self._round}, the last one begun: its masks, sample and noise "
                "are spent, even if it was aborted; take a new round"
            )
        self._round, self._due, self._context = round_number, None, context
        self._invited = tuple(sorted(set(invited)))
        if self.number not in self._invited or not set(self._others(self._invited)) <= self._links.keys() - {SERVER}:
            raise InputError(f"hospital {self.number} invites {self._invited}: add itself, leave out strangers")
        self._needed = threshold(len(self._invited), self.least)
        check_enough(len(self._invited), self._needed, round_number)
        self._key, self._seed = X25519PrivateKey.generate(), os.urandom(32)
        keys = share(self._key.private_bytes_raw(), self._invited, self._needed)
        seeds = share(self._seed, self._invited, self._needed)
        self._held = {self.number: (keys[self.number], seeds[self.number])}
        card = CARD.pack(self.number, self._key.public_key().public_bytes_raw(), seed_hash(self._seed))
        bound = card + pack_numbers(self._invited) + context
        boxes = [self._links[j].seal(SHARES, round_number, keys[j] + seeds[j], bound) for j in self._others(keys)]
        self._due = "mask"
        return self._links[SERVER].seal(SHARES, round_number, card + b"".join(boxes))

    def mask(self, delivery: bytes, values: np.ndarray) -> bytes:
        """Step 2: this hospital's values int64 (d,), masked.

        Raises InputError for another type or shape, RangeError beyond +-(2^31 - 1), MessageError for a delivery
        that is not genuine.
        """
        self._enter("mask")
        if values.dtype != np.int64 or values.shape != (self.d,):
            raise InputError(f"values are {values.dtype} {values.shape}, but this session adds int64 ({self.d},)")
        check_limit(values, TOTAL_RANGE)
        publics = self._read(self._links[SERVER].open(DELIVERY, self._round, delivery))
        seeds = [(self._seed, True)]
        for j, public in publics.items():
            seeds.append((pair_seed(self._key, public, self._round, (self.number, j)), self.number < j))
        masked = values.astype("<u4")
        add_masks(masked, seeds)
        self._key = self._seed = None  # from here on they exist only as shares
        self._due = "confirm"
        return self._links[SERVER].seal(MASKED, self._round, masked.tobytes())

    def confirm(self, message: bytes) -> bytes:
        """Step 3. Raises AggregationAborted where too few survive, or this hospital was declared a dropout."""
        self._enter("confirm")
        survivors = unpack_numbers(self._links[SERVER].open(SURVIVORS, self._round, message))
        if not set(survivors) <= self._held.keys():
            raise MessageError(f"survivors are {survivors}, but not all of them shared: the list is refused")
        check_enough(len(survivors), self._needed, self._round)
        if self.number not in survivors:
            raise AggregationAborted(
                f"hospital {self.number} was declared a dropout in round {self._round}: wait for the next"
            )
        self._survivors, self._due = survivors, "reveal"
        bound = pack_numbers(survivors) + self._context
        boxes = [self._links[j].seal(VOUCH, self._round, b"", bound) for j in self._others(survivors)]
        return self._links[SERVER].seal(VOUCH, self._round, b"".join(boxes))

    @property
    def survivors(self) -> tuple[int, ...]:
        """The hospitals whose total this one has vouched for, once it has."""
        return self._survivors

    def reveal(self, message: bytes) -> bytes:
        """Step 4, if enough others vouch for the same list: a share of each hospital, of its seed or of its key."""
        self._enter("reveal")
        bound, others = pack_numbers(self._survivors) + self._context, self._others(self._survivors)
        boxes = cut(self._links[SERVER].open(VOUCHED, self._round, message), VOUCH_BYTES)
        for box in boxes:
            if sender_of(box) not in others:
                raise MessageError(f"hospital {sender_of(box)} vouches without being a survivor: the list is refused")
            self._links[sender_of(box)].open(VOUCH, self._round, box, bound)
        check_enough(1 + len(boxes), self._needed, self._round)
        held, self._held = self._held, None  # handed over once, then deleted
        shares = [seed if i in self._survivors else key for i, (key, seed) in sorted(held.items())]
        return self._links[SERVER].seal(REVEAL, self._round, b"".join(shares))

    def _enter(self, step: str) -> None:
        """Begin a step: only the one that is due, and only once, whatever its outcome."""
        due, self._due = self._due, None
        if due != step:
            raise MessageError(f"step '{step}' of round {self._round} is not due: each comes once, and in order")

    def _others(self, numbers: Iterable[int]) -> list[int]:
        return [j for j in numbers if j != self.number]

    def _read(self, delivery: bytes) -> dict[int, bytes]:
        """Keep the shares that the others sealed for this hospital; returns the others' public keys by number."""
        publics = {}
        for entry in cut(delivery, CARD.size + BOX_BYTES):
            card, box = entry[: CARD.size], entry[CARD.size :]
            j, public, _ = CARD.unpack(card)
            if j not in self._others(self._invited):
                raise MessageError(f"hospital {j} shared in round {self._round} without being invited: it is refused")
            pair = self._links[j].open(SHARES, self._round, box, card + pack_numbers(self._invited) + self._context)
            publics[j], self._held[j] = public, (pair[:SHARE_BYTES], pair[SHARE_BYTES:])
        check_enough(len(self._held), self._needed, self._round)
        return publics
