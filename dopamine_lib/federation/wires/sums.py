"""The total of a round between processes: what a hospital and the server each do, for every kind of aggregation.

    plain   hospitals send, the server adds (or puts through a function of one's own) and sends the total back: it sees
            every message
    bfv     hospital 0 makes the group's keys and seals them for the other hospitals, the server gets the parameters.
            Hospitals encrypt, the server adds ciphertexts as they arrive, hospitals decrypt: it sees no total either
    masks   four exchanges (``encryption/masks.py``); the server learns the total and sends it back

A rank's side of it is an ``Aggregation``: ``total`` takes this rank's message, if it has one, and gives the total. The
server has no model and gets None.

One model for all: every hospital steps its own copy, from one state and by the totals that it is told. So a hash of
the experiment, that state and all totals stands for the model (``context``); hospitals bind their messages to it, and a
server that tells them different totals gets no other one from them. All invited hospitals must be in a total: who is
missing was left out by the server.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.encryption.messages import SERVER, MessageError, pack_numbers
from dopamine_lib.federation.aggregation import Aggregation, Message, in_the_clear
from dopamine_lib.federation.mpi.ranks import DOWN, KEYS, TOTAL, UP, Wire, who
from dopamine_lib.federation.plan import Plan


class _Side:
    """What all sides share: the wire, and the plan, which says how totals are decoded."""

    between_processes = True

    def __init__(self, wire: Wire, plan: Plan):
        self.wire, self.plan, self.context = wire, plan, b""

    def follow(self, content: bytes) -> None:
        """Take in what the model depends on from now on: the state it starts from, then every total."""
        self.context = hashlib.sha256(self.context + content).digest()

    def _check_all(self, hospitals: Sequence[int], invited: Sequence[int], round_number: int) -> None:
        """Raise MessageError unless exactly the invited hospitals are in a round's total."""
        if sorted(hospitals) != sorted(invited):
            raise MessageError(
                f"the total of round {round_number} is of hospitals {sorted(hospitals)}, but {sorted(invited)} are "
                "invited, and over MPI none vanishes: the server left some out; end the session"
            )

    def _tell(self, total: Tensor) -> None:
        """Send the total (d,) to all hospitals, whether they took part or not: all step the model."""
        body = total.numpy().astype("<f4").tobytes()
        for k in range(self.wire.hospitals):
            self.wire.send(k, TOTAL, body)

    def _told(self) -> Tensor:
        body = self.wire.receive(SERVER, TOTAL)
        self.follow(body)
        return torch.from_numpy(read_vector(body, "<f4", self.plan.d, SERVER))


def read_vector(body: bytes, dtype: str, d: int, sender: int) -> np.ndarray:
    """The d numbers of a message. Raises MessageError, naming the sender, for another length."""
    size = d * np.dtype(dtype).itemsize
    if len(body) != size:
        raise MessageError(f"{who(sender)} sends {len(body)} bytes where {size} are due: it is refused")
    return np.frombuffer(body, dtype).astype(dtype[1:])


class PlainHospitalSide(_Side):
    """A hospital whose message the server reads."""

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """The total (d,) of the round, with this hospital's message (d,) in it, if it is invited."""
        for message in messages.values():
            sent = "<f4" if self.plan.codec is None else "<i8"
            self.wire.send(SERVER, UP, np.asarray(message).astype(sent).tobytes())
        return self._told()


class PlainServerSide(_Side):
    """The server adds in the hospitals' order, whichever comes first: sums of floats depend on it."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        self.sum = in_the_clear(plan)

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> None:
        """Add the messages of a round, and send the total to all hospitals."""
        sent, bodies = "<f4" if self.plan.codec is None else "<i8", dict(self.wire.arrivals(invited, UP))
        arrived = {k: read_vector(bodies[k], sent, self.plan.d, k) for k in invited}
        if self.plan.codec is None:
            arrived = {k: torch.from_numpy(values) for k, values in arrived.items()}
        self._tell(self.sum.total(round_number, invited, arrived))


class BfvHospitalSide(_Side):
    """A hospital that encrypts. Hospital 0 makes the keys; from it they travel sealed, past the server."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.aggregation import BfvHospital  # tenseal takes a second to load
        from dopamine_lib.encryption.group import make_group, read_group
        from dopamine_lib.encryption.keys import channel

        if wire.number == 0:
            group = make_group(plan.layout, wire.hospitals, plan.d)
            for k in range(1, wire.hospitals):
                wire.send(k, KEYS, group.hospital_bytes())
            wire.send(SERVER, KEYS, group.server_bytes())
        else:
            group = read_group(wire.receive(0, KEYS))
        keys = channel(wire.identity, wire.publics[SERVER], group.session, wire.number)
        self.hospital = BfvHospital(wire.number, group, keys, least=plan.least_in_a_total, limit=plan.message_limit)

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """The total (d,) of the round, decrypted here."""
        context = self.context + pack_numbers(sorted(invited))
        for message in messages.values():
            self.wire.send(SERVER, UP, self.hospital.message(round_number, message, context))
        opened = self.hospital.open(round_number, self.wire.receive(SERVER, DOWN), context)
        self._check_all(opened.hospitals, invited, round_number)
        self.follow(opened.total.astype("<i8").tobytes())
        return self.plan.decoded(round_number, opened.total)


class BfvServerSide(_Side):
    """The server adds what it cannot read, and learns no total."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.aggregation import BfvServer
        from dopamine_lib.encryption.group import read_group
        from dopamine_lib.encryption.keys import channel

        group = read_group(wire.receive(0, KEYS))
        channels = {k: channel(wire.identity, wire.publics[k], group.session, k) for k in range(wire.hospitals)}
        self.server = BfvServer(group, channels, least=plan.least_in_a_total)

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> None:
        """Add ciphertexts as they arrive, and send their sum to all hospitals."""
        self.server.begin(round_number)
        for _, message in self.wire.arrivals(invited, UP):
            self.server.add(message)
        aggregate = self.server.aggregate()
        for k in range(self.wire.hospitals):
            self.wire.send(k, DOWN, aggregate)


class MaskHospitalSide(_Side):
    """A hospital that masks."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.masks import MaskHospital

        self.hospital = MaskHospital(wire.number, wire.identity, wire.publics, plan.d, least=plan.least_in_a_total)
        wire.send(SERVER, KEYS, self.hospital.hello())
        hellos = wire.receive(SERVER, KEYS)
        size = len(self.hospital.hello())
        self.hospital.join(hellos[i : i + size] for i in range(0, len(hellos), size))

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> Tensor:
        """The total (d,) of the round, as the server found it."""
        for message in messages.values():
            own, wire = self.hospital, self.wire
            wire.send(SERVER, UP, own.share(round_number, invited, self.context))
            wire.send(SERVER, UP, own.mask(wire.receive(SERVER, DOWN), message))
            vouched = own.confirm(wire.receive(SERVER, DOWN))
            self._check_all(own.survivors, invited, round_number)
            wire.send(SERVER, UP, vouched)
            wire.send(SERVER, UP, own.reveal(wire.receive(SERVER, DOWN)))
        return self._told()


class MaskServerSide(_Side):
    """The server relays shares and unmasks the sum."""

    def __init__(self, wire: Wire, plan: Plan):
        super().__init__(wire, plan)
        from dopamine_lib.encryption.masks import MaskServer

        self.server = MaskServer(wire.identity, wire.publics, plan.d, least=plan.least_in_a_total)
        hellos = [self.server.hello(), *(hello for _, hello in wire.arrivals(range(wire.hospitals), KEYS))]
        self.server.join(hellos)
        for k in range(wire.hospitals):
            wire.send(k, KEYS, b"".join(hellos))

    def total(self, round_number: int, invited: Sequence[int], messages: dict[int, Message]) -> None:
        """Collect four times what hospitals send, answer three times, then send the total to all."""
        server = self.server
        server.begin(round_number, invited)
        self._collect(invited)
        for answers in (server.deliveries, server.survivors, server.confirmations):
            replies = answers()
            for k, message in replies.items():
                self.wire.send(k, DOWN, message)
            self._collect(replies)
        self._tell(self.plan.decoded(round_number, server.total()))

    def _collect(self, hospitals: Iterable[int]) -> None:
        for _, message in self.wire.arrivals(hospitals, UP):
            self.server.receive(message)


def make_wire_aggregation(plan: Plan, wire: Wire) -> Aggregation:
    """This rank's side of a plan's aggregation, keys exchanged; all ranks call it at once."""
    hospital, server = {
        "plain": (PlainHospitalSide, PlainServerSide),
        "bfv": (BfvHospitalSide, BfvServerSide),
        "masks": (MaskHospitalSide, MaskServerSide),
    }[plan.aggregation if plan.hidden else "plain"]
    return (server if wire.number == SERVER else hospital)(wire, plan)
