"""Secure aggregation with BFV (the paper's section 3.2): the server adds ciphertexts that it cannot read.

A round, in bytes between parties that may run in different processes:

    hospital k   message(round, x_k)     packs, encrypts, adds its check sum, seals for the server
    server       begin(round); add(message) as each arrives; aggregate()
    hospital k   open(round, aggregate)  verifies, decrypts the total, compares it with the check sum

Guaranteed: the server has no key and sees ciphertexts, d and the list of participants. A message that is damaged,
replayed, cut off, or of another round, layout, key or sender raises MessageError. A hospital decrypts one aggregate
per round, which names at least ``least`` hospitals, and refuses it unless it is the sum of exactly their messages, all
made in the ``context`` that it is in itself: at the same model, with the same hospitals invited. So a server that gives
hospitals different models, to single one of them out (Pasquini et al. 2022), gets no total opened; and one that sends
them different aggregates has given them different models, which shows in the next round.

Not guaranteed: one hospital and the server together read everything, since all hospitals share one secret key
(``masks`` does without). A server may openly leave hospitals out, down to ``least``; whoever opens a total reads who is
in it (over MPI nobody may be missing). A hospital may send any numbers in range. The total itself is protected
by its noise alone (``privacy``).
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dopamine_lib.encryption.codec import SLOTS, check_limit, limit_of
from dopamine_lib.encryption.group import BFVVector, Group
from dopamine_lib.encryption.keys import Channel
from dopamine_lib.encryption.messages import (
    AGGREGATE,
    SERVER,
    TAG,
    UPDATE,
    MessageError,
    check_enough,
    check_tag,
    join,
    pack_numbers,
    read_header,
    seal,
    split,
    tag,
    unpack_numbers,
    unseal,
)
from dopamine_lib.encryption.sum_check import MODULUS, SumCheck
from dopamine_lib.encryption.transcript import Transcript
from dopamine_lib.errors import InputError, check_within


class Opened(NamedTuple):
    """What a hospital learns in a round: the exact total int64 (d,), and which hospitals are in it."""

    total: np.ndarray
    hospitals: tuple[int, ...]


class BfvHospital:
    """One hospital: encrypts its integers and decrypts totals.

    number   k, from 0
    group    the session's keys, the secret key among them
    channel  its keys with the server
    least    the number of hospitals that an aggregate must have for this one to decrypt it
    limit    the largest |integer| it may send: by default R // K, so that no total can leave the range R. Where
             the noise keeps totals in the range, it may be larger
    """

    def __init__(self, number: int, group: Group, channel: Channel, *, least: int = 2, limit: int | None = None):
        if group.check_key is None:
            raise InputError(
                f"hospital {number} was given the server's keys, which decrypt nothing: take hospital_bytes"
            )
        check_within("number", number, 0, group.hospitals - 1, "hospitals count from 0", low_open=False)
        check_within(
            "least", least, 2, group.hospitals, "more cannot arrive, and a sum of one hides nothing", low_open=False
        )
        self.number, self.group, self.least = number, group, least
        self.limit = limit or limit_of(group.layout, group.hospitals)
        self._channel, self._check = channel, SumCheck(group.check_key, group.session)
        self._sent = self._opened = -1

    def message(self, round_number: int, values: np.ndarray, context: bytes = b"") -> bytes:
        """This round's integers int64 (d,), encrypted and sealed.

        context  what all hospitals must hold alike: the model at which they computed, who is invited. Their total
                 opens only for a hospital in the same one
        Once per round, in increasing order: a second message under the same pads and nonces would reveal them.
        Raises InputError for another type or shape, RangeError beyond ``limit``, MessageError for a past round.
        """
        group = self.group
        if values.dtype != np.int64 or values.shape != (group.d,):
            raise InputError(f"values are {values.dtype} {values.shape}, but this session adds int64 ({group.d},)")
        check_limit(values, self.limit)
        self._sent = _next(round_number, self._sent, f"hospital {self.number} sent its message")
        check = self._check.make(round_number, self.number, values, context)
        header = group.header(UPDATE, self.number, round_number, check)
        return seal(self._channel.up, header, map(group.encrypt, _chunks(group.layout.pack(values))))

    def open(self, round_number: int, aggregate: bytes, context: bytes = b"") -> Opened:
        """The total of a round. Raises AggregationAborted for too few hospitals, MessageError if it is not genuine.

        context  as for ``message``
        """
        group = self.group
        header, _ = read_header(aggregate, **_expected(group, AGGREGATE, round_number), sender=SERVER)
        end = len(aggregate) - TAG * group.hospitals
        content, tags = memoryview(aggregate)[:end], memoryview(aggregate)[end:]
        check_tag(self._channel.down, round_number, content, tags[TAG * self.number : TAG * (self.number + 1)])
        hospitals, body = _read_hospitals(read_header(content)[1], group.hospitals)
        check_enough(len(hospitals), self.least, round_number)
        self._opened = _next(round_number, self._opened, f"hospital {self.number} opened an aggregate")
        slots = np.empty(group.layout.slots(group.d), np.int64)
        for own, part in zip(_chunks(slots), split(body, group.layout.ciphertexts(group.d)), strict=True):
            own[:] = np.fromiter(group.ciphertext(bytes(part), len(own)).decrypt(), np.int64, len(own))
        total = group.layout.unpack(slots, group.d)
        if not self._check.holds(round_number, hospitals, total, header.check, context):
            raise MessageError(
                f"the aggregate of round {round_number} is not the sum of the messages of hospitals {list(hospitals)}: "
                "the server added something else, or gave hospitals different models or lists of the invited, or the "
                "ciphertexts are under another key; end the session"
            )
        return Opened(total, hospitals)


class BfvServer:
    """The server: adds ciphertexts as they arrive, and never holds more than two models' worth of them.

    group       the session's parameters, without the secret key
    channels    its keys with each hospital, by number
    least       the number of hospitals that must arrive
    transcript  records everything the server receives and holds
    """

    def __init__(
        self, group: Group, channels: dict[int, Channel], *, least: int = 2, transcript: Transcript | None = None
    ):
        if group.check_key is not None:
            raise InputError("the server was given the hospitals' secret key: take server_bytes")
        self.group, self.least, self._channels, self._transcript = group, least, channels, transcript
        self._round, self._arrived, self._total, self._checks, self._open = -1, [], [], 0, False
        self._record("keys", group.server_bytes())

    def begin(self, round_number: int) -> None:
        """Start a round; an unfinished one is dropped."""
        self._round = _next(round_number, self._round, "the server began")
        self._arrived, self._total, self._checks, self._open = [], [], 0, True

    def add(self, message: bytes) -> int:
        """Add one hospital's message; returns its number.

        Raises MessageError, and changes nothing, for a message that is late, repeated or not authentic.
        """
        self._record("message", message)
        if not self._open:
            raise MessageError(f"a message came late: round {self._round} is closed, and the message stays sealed")
        header, body = read_header(message, **_expected(self.group, UPDATE, self._round))
        if header.sender not in self._channels:
            raise MessageError(f"a message names hospital {header.sender}, but there are {self.group.hospitals}")
        if header.sender in self._arrived:
            raise MessageError(f"hospital {header.sender} is already in round {self._round}: a message came twice")
        key, layout = self._channels[header.sender].up, self.group.layout
        parts = split(body, layout.ciphertexts(self.group.d))
        for part in unseal(key, header, parts):  # every part is verified before any is added
            self._record("ciphertext", part)
        chunks = _chunks(range(layout.slots(self.group.d)))

        def vectors() -> Iterator[BFVVector]:  # one at a time: two models' worth of memory, however many the hospitals
            for part, slots in zip(unseal(key, header, parts), chunks, strict=True):
                yield self.group.ciphertext(part, len(slots))

        added = 0
        try:
            if self._total:
                for total, vector in zip(self._total, vectors(), strict=True):
                    total.add_(vector)
                    added += 1
            else:
                self._total = list(vectors())
        except MessageError as error:
            for _, total, vector in zip(range(added), self._total, vectors(), strict=False):
                total.sub_(vector)  # of a message that is refused nothing stays
            raise MessageError(f"hospital {header.sender}: {error}") from None
        self._checks = (self._checks + header.check) % MODULUS
        self._arrived.append(header.sender)
        return header.sender

    def aggregate(self) -> bytearray:
        """Close the round: the encrypted total for all hospitals.

        Raises AggregationAborted where too few arrived, MessageError where no round is open.
        """
        if not self._open:  # a second answer would be tagged under a used nonce
            raise MessageError(f"round {self._round} is not open: an aggregate is made once; begin the next round")
        self._open = False
        check_enough(len(self._arrived), self.least, self._round)
        # one growing buffer, and each vector is freed once written: never a third copy
        answer = bytearray(self.group.header(AGGREGATE, SERVER, self._round, self._checks).to_bytes())
        answer += struct.pack("<H", len(self._arrived)) + pack_numbers(sorted(self._arrived))
        while self._total:
            answer += join([self._total.pop(0).serialize()])
        # a tag for every hospital of the session, arrived or not: all of them need the new model
        channels = map(self._channels.get, range(self.group.hospitals))
        answer += b"".join([tag(own.down, self._round, answer) if own else bytes(TAG) for own in channels])
        self._record("aggregate", answer)
        return answer

    def _record(self, name: str, data: bytes) -> None:
        if self._transcript is not None:
            self._transcript.record(name, data)


def _expected(group: Group, kind: int, round_number: int) -> dict:
    wanted = group.header(kind, SERVER, round_number)._asdict()
    del wanted["check"], wanted["sender"]
    return wanted


def _next(round_number: int, last: int, what: str) -> int:
    if round_number <= last:
        raise MessageError(f"{what} for round {last} already: round {round_number} is refused, rounds only increase")
    return round_number


def _read_hospitals(body: memoryview, hospitals: int) -> tuple[tuple[int, ...], memoryview]:
    """The hospitals that an aggregate names, and its ciphertexts."""
    count = int.from_bytes(body[:2], "little")
    end = 2 * (count + 1)
    numbers = unpack_numbers(body[2:end])
    # unpack_numbers refuses a hospital named twice, which would count twice in the sum and towards ``least``
    if not numbers or len(numbers) != count or numbers[-1] >= hospitals:
        raise MessageError(
            f"an aggregate names hospitals {list(numbers)}, but must name some of {hospitals}: it is refused"
        )
    return numbers, body[end:]


def _chunks(slots: Sequence[int]) -> list[Sequence[int]]:
    """An update's slots, ciphertext by ciphertext."""
    return [slots[i : i + SLOTS] for i in range(0, len(slots), SLOTS)]
