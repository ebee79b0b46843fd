"""Secure aggregation with BFV (the paper's section 3.2): the server adds what it cannot read.

A round, in bytes between parties that may live in different processes:

    hospital k   message(round, x_k)     packs, encrypts, adds its check sum, seals for the server
    server       begin(round); add(message) as each arrives; aggregate()
    hospital k   open(round, aggregate)  verifies, decrypts the total, holds it against the check sum

What holds: the server has no key and sees ciphertexts, d and who takes part. A message that is damaged, replayed,
cut, or of another round, layout, key or sender raises MessageError. A hospital decrypts one aggregate a round, of at
least ``least`` hospitals that it names, and refuses one that is not the sum of exactly these hospitals' messages.
What does not: a hospital together with the server reads everything (they share one secret key; masks.py). A server
may leave hospitals out, openly, or send different hospitals different aggregates; they would have to compare. A
hospital may send any numbers in range. Noise (dpsgd.py, integer_noise.py) protects the total itself.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dopamine_lib.encryption.codec import SLOTS, check_limit, find_layout, limit_of
from dopamine_lib.encryption.group import Group, make_group, read_group
from dopamine_lib.encryption.keys import Channel, Identity, channel
from dopamine_lib.encryption.messages import (
    AGGREGATE,
    SERVER,
    TAG,
    UPDATE,
    AggregationAborted,
    MessageError,
    check_tag,
    join,
    read_header,
    seal,
    split,
    tag,
    unseal,
)
from dopamine_lib.encryption.sum_check import MODULUS, SumCheck
from dopamine_lib.errors import InputError, check_within


class Opened(NamedTuple):
    """What a hospital reads in a round: the exact total int64 (d,) and whose messages are in it."""

    total: np.ndarray
    hospitals: tuple[int, ...]


class BfvHospital:
    """One hospital: encrypts its integers, decrypts totals.

    number   k, from 0
    group    with the secret key
    channel  its keys with the server
    least    hospitals that must be in an aggregate before this one decrypts it
    limit    largest |integer| it may send: by default R // K, so that no total can leave the range R. Whoever has
             computed how seldom totals do (IntegerNoise) may allow more
    """

    def __init__(self, number: int, group: Group, channel: Channel, *, least: int = 2, limit: int | None = None):
        if group.check_key is None:
            raise InputError(
                f"hospital {number} was given the server's keys, which decrypt nothing: take hospital_bytes"
            )
        check_within("number", number, 0, group.hospitals - 1, "hospitals count from 0", low_open=False)
        check_within(
            "least", least, 2, group.hospitals, "no more can arrive, and a sum of one hides nothing", low_open=False
        )
        self.number, self.group, self.least = number, group, least
        self.limit = limit or limit_of(group.layout, group.hospitals)
        self._channel, self._check = channel, SumCheck(group.check_key, group.session)
        self._sent = self._opened = -1

    def message(self, round_number: int, values: np.ndarray) -> bytes:
        """This round's integers int64 (d,), encrypted and sealed.

        Once a round, in rising order: a second message under the same pads and nonces would give them away.
        """
        group = self.group
        if values.dtype != np.int64 or values.shape != (group.d,):
            raise InputError(f"values are {values.dtype} {values.shape}, but this session adds int64 ({group.d},)")
        check_limit(values, self.limit)
        self._sent = _next(round_number, self._sent, f"hospital {self.number} sent its message")
        check = self._check.make(round_number, self.number, values)
        header = group.header(UPDATE, self.number, round_number, check)
        return seal(self._channel.up, header, map(group.encrypt, _chunks(group.layout.pack(values))))

    def open(self, round_number: int, aggregate: bytes) -> Opened:
        """The total of a round. AggregationAborted where too few are in it; MessageError where it is not genuine."""
        group = self.group
        header, _ = read_header(aggregate, **_expected(group, AGGREGATE, round_number), sender=SERVER)
        end = len(aggregate) - TAG * group.hospitals
        content, tags = memoryview(aggregate)[:end], memoryview(aggregate)[end:]
        check_tag(self._channel.down, round_number, content, tags[TAG * self.number : TAG * (self.number + 1)])
        hospitals, body = _read_names(read_header(content)[1], group.hospitals)
        if len(hospitals) < self.least:
            raise AggregationAborted(
                f"round {round_number} has {len(hospitals)} hospitals, but needs {self.least}: nothing is decrypted"
            )
        self._opened = _next(round_number, self._opened, f"hospital {self.number} opened an aggregate")
        slots = np.empty(group.layout.slots(group.d), np.int64)
        for own, part in zip(_chunks(slots), split(body, group.layout.ciphertexts(group.d)), strict=True):
            own[:] = np.fromiter(group.ciphertext(bytes(part), len(own)).decrypt(), np.int64, len(own))
        total = group.layout.unpack(slots, group.d)
        if not self._check.holds(round_number, hospitals, total, header.check):
            raise MessageError(
                f"the aggregate of round {round_number} is not the sum of what hospitals {list(hospitals)} sent: the "
                "server added something else, or the ciphertexts are under another key; end the session"
            )
        return Opened(total, hospitals)


class BfvServer:
    """The server: adds ciphertexts as they arrive, and never holds more than two models' worth of them.

    group       without the secret key
    channels    its keys with each hospital, by number
    least       hospitals that must arrive
    transcript  an object with ``record(name, bytes)`` that is shown all the server receives and holds
    """

    def __init__(self, group: Group, channels: dict[int, Channel], *, least: int = 2, transcript=None):
        if group.check_key is not None:
            raise InputError("the server was given the hospitals' secret key: take server_bytes")
        self.group, self.least, self._channels, self._transcript = group, least, channels, transcript
        self._round, self._arrived, self._total, self._checks, self._open = -1, [], [], 0, False
        self._record("keys", group.server_bytes())

    def begin(self, round_number: int) -> None:
        """Start a round; what an unfinished one had collected is dropped."""
        self._round = _next(round_number, self._round, "the server began")
        self._arrived, self._total, self._checks, self._open = [], [], 0, True

    def add(self, message: bytes) -> int:
        """Add one hospital's message; returns its number. A message that is not authentic changes nothing."""
        self._record("message", message)
        if not self._open:
            raise MessageError(f"a message came late: round {self._round} is closed, and what is in it stays masked")
        header, body = read_header(message, **_expected(self.group, UPDATE, self._round))
        if header.sender not in self._channels:
            raise MessageError(f"a message names hospital {header.sender}, but there are {self.group.hospitals}")
        if header.sender in self._arrived:
            raise MessageError(f"hospital {header.sender} is already in round {self._round}: a message came twice")
        key, layout = self._channels[header.sender].up, self.group.layout
        parts = split(body, layout.ciphertexts(self.group.d))
        for part in unseal(key, header, parts):  # all is verified before any of it is added, opened piece by piece
            self._record("ciphertext", part)
        vectors = (  # one at a time: two models' worth of memory, however many hospitals there are
            self.group.ciphertext(part, len(slots))
            for part, slots in zip(unseal(key, header, parts), _chunks(range(layout.slots(self.group.d))), strict=True)
        )
        if self._total:
            for total, vector in zip(self._total, vectors, strict=True):
                total.add_(vector)
        else:
            self._total = list(vectors)
        self._checks = (self._checks + header.check) % MODULUS
        self._arrived.append(header.sender)
        return header.sender

    def aggregate(self) -> bytearray:
        """Close the round: the encrypted total for all hospitals.

        Raises AggregationAborted where too few arrived, MessageError where no round is open.
        """
        if not self._open:  # a second answer would be tagged under a nonce that was used
            raise MessageError(f"round {self._round} is not open: an aggregate is made once; begin the next round")
        self._open = False
        if len(self._arrived) < self.least:
            arrived, self._total = len(self._arrived), []
            raise AggregationAborted(
                f"in round {self._round} {arrived} hospitals arrived, but {self.least} are needed: nothing is opened "
                "and the round is spent; go on with the next"
            )
        # one growing buffer, and each vector goes as it is written: never a third copy
        answer = bytearray(self.group.header(AGGREGATE, SERVER, self._round, self._checks).to_bytes())
        answer += _names(self._arrived)
        while self._total:
            answer += join([self._total.pop(0).serialize()])
        # a tag for each hospital of the group, whether it arrived or not: all of them need the new model
        answer += b"".join([tag(self._channels[k].down, self._round, answer) for k in range(self.group.hospitals)])
        self._record("aggregate", answer)
        return answer

    def _record(self, name: str, data: bytes) -> None:
        if self._transcript is not None:
            self._transcript.record(name, data)


class BfvSum:
    """All hospitals and the server in one process, every message as bytes: exact totals round by round.

    total_range  the largest |total| of one value that comes back
    transcript   is shown all the server sees
    """

    def __init__(
        self,
        hospitals: int,
        d: int,
        layout: str = "packed",
        *,
        least: int = 2,
        limit: int | None = None,
        transcript=None,
    ):
        self.hospitals, self.server = set_up(hospitals, d, layout, least=least, limit=limit, transcript=transcript)
        self.total_range = find_layout(layout).total_range

    def sum(self, round_number: int, invited: list[int], values: dict[int, np.ndarray]) -> np.ndarray:
        """The total int64 (d,) of the invited hospitals that have ``values``; the others vanished mid-round.

        Raises AggregationAborted, with nothing decrypted and the round spent, where fewer than ``least`` arrive.
        """
        if not set(values) <= set(invited):
            raise InputError(f"hospitals {sorted(set(values) - set(invited))} send values, but were not invited")
        self.server.begin(round_number)
        for number, own in values.items():
            self.server.add(self.hospitals[number].message(round_number, own))
        aggregate = self.server.aggregate()
        for number in values:
            total, _ = self.hospitals[number].open(round_number, aggregate)
        return total


def set_up(
    hospitals: int, d: int, layout: str = "packed", *, least: int = 2, limit: int | None = None, transcript=None
):
    """A session's ``([BfvHospital], BfvServer)``, with the steps and bytes that several machines would exchange.

    1. Every party has an Identity, and all public keys are known.
    2. Hospital 0 makes the group's keys and seals them for each other hospital; the server gets the context alone.
    3. Hospital and server derive their channel.
    """
    group = make_group(layout, hospitals, d)
    identities, server = [Identity() for _ in range(hospitals)], Identity()
    first, members = identities[0], []
    for number, own in enumerate(identities):
        sealed = first.seal(own.public, group.hospital_bytes())
        keys = read_group(own.unseal(first.public, sealed))
        members.append(
            BfvHospital(number, keys, channel(own, server.public, keys.session, number), least=least, limit=limit)
        )
    known = read_group(group.server_bytes())
    channels = {k: channel(server, own.public, known.session, k) for k, own in enumerate(identities)}
    return members, BfvServer(known, channels, least=least, transcript=transcript)


def _expected(group: Group, kind: int, round_number: int) -> dict:
    wanted = group.header(kind, SERVER, round_number)._asdict()
    del wanted["check"], wanted["sender"]
    return wanted


def _next(round_number: int, last: int, what: str) -> int:
    if round_number <= last:
        raise MessageError(f"{what} for round {last} already: round {round_number} is refused, rounds only go up")
    return round_number


def _names(numbers: list[int]) -> bytes:
    return struct.pack(f"<{len(numbers) + 1}H", len(numbers), *sorted(numbers))


def _read_names(body: memoryview, hospitals: int) -> tuple[tuple[int, ...], memoryview]:
    (count,) = struct.unpack_from("<H", body)
    end = 2 * (count + 1)
    numbers = struct.unpack_from(f"<{count}H", body, 2) if end <= len(body) else ()
    # a hospital named twice would count twice, in the sum as among the least
    if not numbers or sorted(set(numbers)) != list(numbers) or numbers[-1] >= hospitals:
        raise MessageError(
            f"an aggregate names hospitals {list(numbers)}, each of {hospitals} once at most: it is refused"
        )
    return numbers, body[end:]


def _chunks(slots: Sequence[int]) -> list[Sequence[int]]:
    """An update's slots, ciphertext by ciphertext."""
    return [slots[i : i + SLOTS] for i in range(0, len(slots), SLOTS)]
