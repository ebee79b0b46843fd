"""The total of a round between processes: what a hospital and the server each do, for every kind of aggregation.

    plain   hospitals send, the server adds (or puts through a function of one's own) and sends the total back: it sees
            every message
    bfv     hospital 0 makes the group's keys and seals them for the other hospitals, the server gets the parameters.
            Hospitals encrypt, the server adds ciphertexts as they arrive, hospitals decrypt: it sees no total either
    masks   four exchanges (``encryption/masks.py``); the server learns the total and sends it back

A party's side of it is an ``Aggregation``: ``total`` takes this party's message, if it has one, and gives the total.
The server has no model and gets None.

One model for all: every hospital steps its own copy, from one state and by the totals that it is told. So a hash of
the experiment, that state and all totals stands for the model (``context``); hospitals bind their messages to it, and a
server that tells them different totals gets no other one from them. Who is in a total is part of it. Unless ``--least``
allows for hospitals that vanish, all that are invited must be in it: who is missing was left out by the server.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.encryption.links import check_hello, sender_of
from dopamine_lib.encryption.masking import threshold
from dopamine_lib.encryption.messages import (
    SERVER,
    AggregationAborted,
    MessageError,
    pack_numbers,
    unpack_numbers,
)
from dopamine_lib.federation.aggregation import Aggregation, Message, in_the_clear
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.wires.wire import DOWN, KEYS, TOTAL, UP, Wire


class _Side:
    """What all sides share: the wire, and the plan, which says how totals are decoded.

    members   the hospitals of this session; others are in no total of it
    included  the hospitals in the latest total
    """

    between_processes = True

    def __init__(self, wire: Wire, plan: Plan):
        self.wire, self.plan, self.context, self.members = wire, plan, b"", wire.members
        self.included: tuple[int, ...] = ()

    def follow(self, content: bytes) -> None:
        """Take in what the model depends on from now on: the state it starts from, then every total."""
        self.context = hashlib.sha256(self.context + content).digest()

    def _asked(self, invited: Iterable[int]) -> list[int]:
        """Those of the invited hospitals that are in this session."""
        return [k for k in invited if k in self.members]

    def _fewest(self, invited: Sequence[int]) -> int:
        """How many of the hospitals that a round asks must be in its total."""
        return len(invited) if self.plan.least is None else self.plan.least_in_a_total

    def _check(self, hospitals: Sequence[int], invited: Sequence[int], round_number: int) -> None:
        """Note who is in a round's total. Raises MessageError for a stranger, or where the server left out too many."""
        if not set(hospitals) <= set(invited) or len(hospitals) < self._fewest(invited):
            raise MessageError(
                f"the total of round {round_number} is of hospitals {sorted(hospitals)}, but {sorted(invited)} are "
                f"invited, and {self._fewest(invited)} must be in it: the server left some out; end the session"
            )
        self.included = tuple(hospitals)

    def _told(self, invited: Sequence[int], round_number: int) -> Tensor:
        body = self.wire.receive(SERVER, TOTAL)
        end = 2 * (1 + int.from_bytes(body[:2], "little"))
        self._check(unpack_numbers(body[2:end]), invited, round_number)
        self.follow(body)
        return torch.from_numpy(read_vector(body[end:], "<f4", self.plan.d, self.wire.names([SERVER])))


class _ServerSide(_Side):
    """What the server's sides share."""

    def _collect(self, hospitals: Iterable[int], use: Callable[[int, bytes], object]) -> list[int]:
        """``use(number, body)`` of one message of each of these hospitals; returns those that sent a genuine one."""
        used = []
        for k, body in self.wire.arrivals(hospitals, UP):
            try:
                use(k, body)
            except MessageError as error:
                self.wire.refuse(k, error)
            else:
                used.append(k)
        return sorted(used)

    def _enough(self, arrived: Sequence[int], invited: Sequence[int]) -> None:
        """End the session, with nothing opened, where too few of a round's hospitals arrived."""
        if len(arrived) < self._fewest(invited):
            self.wire.end(f"{len(arrived)} hospitals sent their message, but {self._fewest(invited)} must")

    def _tell(self, total: Tensor, included: Sequence[int]) -> None:
        """Send the total (d,) to all hospitals, whether they took part or not: all step the model."""
        body = len(included).to_bytes(2, "little") + pack_numbers(included) + total.numpy().astype("<f4").tobytes()
        for k in self.wire.present:
            self.wire.send(k, TOTAL, body)


def read_vector(body: bytes, dtype: str, d: int, sender: str) -> np.ndarray:
    """The d numbers of a message. Raises MessageError, naming the sender, for another length."""
    size = d * np.dtype(dtype).itemsize
    if len(body) != size:
        raise MessageError(f"{sender} sends {len(body)} bytes where {size} are due: it is refused")
    return np.frombuffer(body, dtype).astype(dtype[1:])


class PlainHospitalSide(_Side):
    """A hospital whose message the server reads."""

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """The total (d,) of the round, with this hospital's message (d,) in it, if it is invited."""
        for message in messages.values():
            sent = "<f4" if self.plan.codec is None else "<i8"
            self.wire.send(SERVER, UP, np.asarray(message).astype(sent).tobytes())
        return self._told(self._asked(invited), round_number)


class PlainServerSide(_ServerSide):
    """The server adds in the hospitals' order, whichever comes first: sums of floats depend on it."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        self.sum = in_the_clear(plan)

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> None:
        """Add the messages of a round, and send the total to all hospitals."""
        sent, asked, arrived = "<f4" if self.plan.codec is None else "<i8", self._asked(invited), {}

        def read(k: int, body: bytes) -> None:
            values = read_vector(body, sent, self.plan.d, self.wire.names([k]))
            arrived[k] = torch.from_numpy(values) if self.plan.codec is None else values

        included = self._collect(asked, read)
        self._enough(included, asked)
        self._tell(self.sum.total(round_number, included, {k: arrived[k] for k in included}), included)


class BfvHospitalSide(_Side):
    """A hospital that encrypts. The first one makes the keys; from it they travel sealed, past the server."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.aggregation import BfvHospital  # tenseal takes a second to load
        from dopamine_lib.encryption.group import make_group, read_group
        from dopamine_lib.encryption.keys import channel

        first, *others = wire.members
        if wire.number == first:
            group = make_group(plan.layout, wire.hospitals, plan.d)
            for k in others:
                wire.send(k, KEYS, group.hospital_bytes())
            wire.send(SERVER, KEYS, group.server_bytes())
        else:
            group = read_group(wire.receive(first, KEYS))
        keys = channel(wire.identity, wire.publics[SERVER], group.session, wire.number)
        self.hospital = BfvHospital(wire.number, group, keys, least=plan.least_in_a_total, limit=plan.message_limit)

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """The total (d,) of the round, decrypted here."""
        asked = self._asked(invited)
        context = self.context + pack_numbers(sorted(asked))
        for message in messages.values():
            self.wire.send(SERVER, UP, self.hospital.message(round_number, message, context))
        opened = self.hospital.open(round_number, self.wire.receive(SERVER, DOWN), context)
        self._check(opened.hospitals, asked, round_number)
        self.follow(pack_numbers(opened.hospitals) + opened.total.astype("<i8").tobytes())
        return self.plan.decoded(round_number, opened.total)


class BfvServerSide(_ServerSide):
    """The server adds what it cannot read, and learns no total."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.aggregation import BfvServer
        from dopamine_lib.encryption.group import read_group
        from dopamine_lib.encryption.keys import channel

        group = read_group(wire.receive(wire.members[0], KEYS))
        channels = {k: channel(wire.identity, wire.publics[k], group.session, k) for k in wire.members}
        self.server = BfvServer(group, channels, least=plan.least_in_a_total)

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> None:
        """Add ciphertexts as they arrive, and send their sum to all hospitals."""
        self.server.begin(round_number)
        asked = self._asked(invited)
        self._enough(self._collect(asked, lambda k, message: self.server.add(message)), asked)
        aggregate = self.server.aggregate()
        for k in self.wire.present:
            self.wire.send(k, DOWN, aggregate)


def fewest(plan: Plan) -> int:
    """The fewest hospitals that a total is opened of, however few of them the server says are in a session.

    Masks need more than half of those that a round invites: of ten hospitals whom a server calls three, they would else
    open a total of two.
    """
    return threshold(plan.invited, plan.least_in_a_total) if plan.aggregation == "masks" else plan.least_in_a_total


class MaskHospitalSide(_Side):
    """A hospital that masks."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.masks import MaskHospital

        self.hospital = MaskHospital(wire.number, wire.identity, wire.publics, plan.d, least=fewest(plan))
        wire.send(SERVER, KEYS, self.hospital.hello())
        hellos = wire.receive(SERVER, KEYS)
        size = len(self.hospital.hello())
        self.hospital.join(hellos[i : i + size] for i in range(0, len(hellos), size))

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """The total (d,) of the round, as the server found it."""
        asked = self._asked(invited)
        for message in messages.values():
            own, wire = self.hospital, self.wire
            wire.send(SERVER, UP, own.share(round_number, asked, self.context))
            wire.send(SERVER, UP, own.mask(wire.receive(SERVER, DOWN), message))
            vouched = own.confirm(wire.receive(SERVER, DOWN))
            self._check(own.survivors, asked, round_number)
            wire.send(SERVER, UP, vouched)
            wire.send(SERVER, UP, own.reveal(wire.receive(SERVER, DOWN)))
        total = self._told(asked, round_number)
        if messages and self.included != own.survivors:
            raise MessageError(
                f"the total of round {round_number} is said to be of hospitals {list(self.included)}, but "
                f"{list(own.survivors)} were vouched for: it is refused"
            )
        return total


class MaskServerSide(_ServerSide):
    """The server relays shares and unmasks the sum."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.masks import MaskServer

        self.server = MaskServer(wire.identity, wire.publics, plan.d, least=fewest(plan))
        hellos = [self.server.hello()]
        for k, hello in wire.arrivals(wire.members, KEYS):
            hellos.append(hello)
            try:
                check_hello(k, hello)
            except MessageError as error:
                wire.refuse(k, error)
        self.server.join(hellos)
        for k in wire.members:
            wire.send(k, KEYS, b"".join(hellos))

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> None:
        """Collect four times what hospitals send, answer three times, then send the total to all."""
        server, asked = self.server, self._asked(invited)
        try:
            server.begin(round_number, asked)
            self._collect(asked, self._receive)
            self._answer(server.deliveries())
            replies = server.survivors()
            included = sorted(replies)
            self._enough(included, asked)
            self._answer(replies)
            self._answer(server.confirmations())
            total = server.total()
        except AggregationAborted as error:
            self.wire.end(str(error))
        if server.liars:
            self.wire.say(f"{self.wire.names(sorted(server.liars))} handed over wrong shares, which were not needed")
        self._tell(self.plan.decoded(round_number, total), included)

    def _answer(self, replies: dict[int, bytes]) -> None:
        for k, message in replies.items():
            self.wire.send(k, DOWN, message)
        self._collect(replies, self._receive)

    def _receive(self, k: int, message: bytes) -> None:
        if sender_of(message) != k:
            raise MessageError(f"hospital {k} sends a message of {sender_of(message)}: it is refused")
        self.server.receive(message)


def make_wire_aggregation(plan: Plan, wire: Wire) -> Aggregation:
    """This party's side of a plan's aggregation, keys exchanged; all parties call it at once."""
    hospital, server = {
        "plain": (PlainHospitalSide, PlainServerSide),
        "bfv": (BfvHospitalSide, BfvServerSide),
        "masks": (MaskHospitalSide, MaskServerSide),
    }[plan.aggregation if plan.hidden else "plain"]
    return (server if wire.number == SERVER else hospital)(wire, plan)
