"""Sums between processes: what a hospital and the server each do in a round, for every kind of aggregation.

    plain   hospitals send, the server adds and sends the total back: it sees every message
    bfv     hospital 0 makes the group's keys and seals them for the other hospitals, the server gets the parameters.
            Hospitals encrypt, the server adds ciphertexts as they arrive, hospitals decrypt: it sees no total either
    masks   four exchanges (``encryption/masks.py``); the server learns the total and sends it back

Both ends have one method, ``total``: at a hospital with its message, at the server without.
"""

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.encryption.codec import Codec
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation.aggregation import IntegerAggregation, PlainAggregation, PlainSum, layout_of
from dopamine_lib.federation.mpi.wire import DOWN, KEYS, TOTAL, UP, Wire
from dopamine_lib.federation.settings import Choice
from dopamine_lib.privacy.integer_noise import IntegerNoise


class _End:
    """What all ends share.

    codec  makes floats integers and totals floats; None for floats in the clear
    """

    def __init__(self, wire: Wire, codec: Codec | IntegerNoise | None):
        self.wire, self.codec = wire, codec

    def _integers(self, message) -> np.ndarray:
        return message if isinstance(message, np.ndarray) else self.codec.encode(message.numpy())

    def _decoded(self, total: np.ndarray) -> Tensor:
        return torch.from_numpy(self.codec.decode(total)).float()

    def _tell(self, total: Tensor) -> None:
        """Send the total (d,) to all hospitals, whether they took part or not: all step the model."""
        body = total.numpy().astype("<f4").tobytes()
        for k in range(self.wire.hospitals):
            self.wire.send(k, TOTAL, body)

    def _told(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.wire.receive(SERVER, TOTAL), "<f4").astype(np.float32))


class PlainHospitalEnd(_End):
    """A hospital whose message the server reads."""

    def total(self, round_number: int, invited: list[int], message) -> Tensor:
        """The total (d,) of the round, this hospital's message (d,) in it; None where it is not invited."""
        if message is not None:
            values = message.numpy().astype("<f4") if self.codec is None else self._integers(message).astype("<i8")
            self.wire.send(SERVER, UP, values.tobytes())
        return self._told()


class PlainServerEnd(_End):
    """The server adds in the hospitals' order, whoever comes first: sums of floats depend on it."""

    def __init__(self, wire: Wire, codec):
        super().__init__(wire, codec)
        self._sum = PlainAggregation() if codec is None else IntegerAggregation(PlainSum(), codec)

    def total(self, round_number: int, invited: list[int]) -> None:
        """Add the messages of a round, and send the total to all hospitals."""
        bodies = dict(self.wire.arrivals(invited, UP))
        if self.codec is None:
            messages = {k: torch.from_numpy(np.frombuffer(bodies[k], "<f4").astype(np.float32)) for k in invited}
        else:
            messages = {k: np.frombuffer(bodies[k], "<i8").astype(np.int64) for k in invited}
        self._tell(self._sum.total(round_number, invited, messages))


class BfvHospitalEnd(_End):
    """A hospital that encrypts. Hospital 0 makes the keys; from it they travel sealed, past the server."""

    def __init__(self, wire: Wire, codec, layout: str, d: int, least: int):
        super().__init__(wire, codec)
        from dopamine_lib.encryption.aggregation import BfvHospital  # tenseal takes a second to load
        from dopamine_lib.encryption.group import make_group, read_group
        from dopamine_lib.encryption.keys import channel

        if wire.number == 0:
            group = make_group(layout, wire.hospitals, d)
            for k in range(1, wire.hospitals):
                wire.send(k, KEYS, group.hospital_bytes())
            wire.send(SERVER, KEYS, group.server_bytes())
        else:
            group = read_group(wire.receive(0, KEYS))
        keys = channel(wire.identity, wire.publics[SERVER], group.session, wire.number)
        # noise in the integers may take one hospital past its share of the range, as in make_aggregation
        limit = codec.total_range if isinstance(codec, IntegerNoise) else None
        self.hospital = BfvHospital(wire.number, group, keys, least=least, limit=limit)

    def total(self, round_number: int, invited: list[int], message) -> Tensor:
        """The total (d,) of the round, decrypted here."""
        if message is not None:
            self.wire.send(SERVER, UP, self.hospital.message(round_number, self._integers(message)))
        opened = self.hospital.open(round_number, self.wire.receive(SERVER, DOWN))
        return self._decoded(opened.total)


class BfvServerEnd(_End):
    """The server adds what it cannot read, and learns no total.

    transcript  is shown all the server sees
    """

    def __init__(self, wire: Wire, codec, least: int, transcript=None):
        super().__init__(wire, codec)
        from dopamine_lib.encryption.aggregation import BfvServer
        from dopamine_lib.encryption.group import read_group
        from dopamine_lib.encryption.keys import channel

        group = read_group(wire.receive(0, KEYS))
        channels = {k: channel(wire.identity, wire.publics[k], group.session, k) for k in range(wire.hospitals)}
        self.server = BfvServer(group, channels, least=least, transcript=transcript)

    def total(self, round_number: int, invited: list[int]) -> None:
        """Add ciphertexts as they arrive, and send their sum to all hospitals."""
        self.server.begin(round_number)
        for _, message in self.wire.arrivals(invited, UP):
            self.server.add(message)
        aggregate = self.server.aggregate()
        for k in range(self.wire.hospitals):
            self.wire.send(k, DOWN, aggregate)


class MaskHospitalEnd(_End):
    """A hospital that masks."""

    def __init__(self, wire: Wire, codec, d: int, least: int):
        super().__init__(wire, codec)
        from dopamine_lib.encryption.masks import MaskHospital

        self.hospital = MaskHospital(wire.number, wire.identity, wire.publics, d, least=least)
        wire.send(SERVER, KEYS, self.hospital.hello())
        hellos = wire.receive(SERVER, KEYS)
        size = len(self.hospital.hello())
        self.hospital.join(hellos[i : i + size] for i in range(0, len(hellos), size))

    def total(self, round_number: int, invited: list[int], message) -> Tensor:
        """The total (d,) of the round, as the server found it."""
        if message is not None:
            own, wire, values = self.hospital, self.wire, self._integers(message)
            wire.send(SERVER, UP, own.share(round_number, invited))
            wire.send(SERVER, UP, own.mask(wire.receive(SERVER, DOWN), values))
            wire.send(SERVER, UP, own.confirm(wire.receive(SERVER, DOWN)))
            wire.send(SERVER, UP, own.reveal(wire.receive(SERVER, DOWN)))
        return self._told()


class MaskServerEnd(_End):
    """The server relays shares and unmasks the sum."""

    def __init__(self, wire: Wire, codec, d: int, least: int, transcript=None):
        super().__init__(wire, codec)
        from dopamine_lib.encryption.masks import MaskServer

        self.server = MaskServer(wire.identity, wire.publics, d, least=least, transcript=transcript)
        hellos = [self.server.hello(), *(hello for _, hello in wire.arrivals(range(wire.hospitals), KEYS))]
        self.server.join(hellos)
        for k in range(wire.hospitals):
            wire.send(k, KEYS, b"".join(hellos))

    def total(self, round_number: int, invited: list[int]) -> None:
        """Four times collect what hospitals send, three times answer; then send the total to all."""
        server = self.server
        server.begin(round_number, invited)
        self._collect(invited)
        for answers in (server.deliveries, server.survivors, server.confirmations):
            messages = answers()
            for k, message in messages.items():
                self.wire.send(k, DOWN, message)
            self._collect(messages)
        self._tell(self._decoded(server.total()))

    def _collect(self, hospitals) -> None:
        for _, message in self.wire.arrivals(hospitals, UP):
            self.server.receive(message)


def make_end(
    wire: Wire, kind: str, choice: Choice, d: int, *, least: int, integer: IntegerNoise | None = None, transcript=None
):
    """This rank's end of an aggregation of that kind (``aggregation.AGGREGATIONS``), keys exchanged.

    least  hospitals that must be in a total;  integer: noise that messages carry already as integers
    """
    at_server, least = wire.number == SERVER, max(2, least)  # a sum of one hides nothing
    layout = layout_of(kind, "float" if integer is None else "integer")
    if kind == "plain":
        return (PlainServerEnd if at_server else PlainHospitalEnd)(wire, integer)
    codec = integer or Codec(layout, hospitals=wire.hospitals, bound=choice.reach or 16 * choice.max_grad_norm)
    if kind == "masks":
        if at_server:
            return MaskServerEnd(wire, codec, d, least, transcript)
        return MaskHospitalEnd(wire, codec, d, least)
    if at_server:
        return BfvServerEnd(wire, codec, least, transcript)
    return BfvHospitalEnd(wire, codec, layout, d, least)
