"""Sealed messages between the ranks of an MPI run, and waiting that sleeps.

MPI neither encrypts nor authenticates: anyone between two hosts can read and change its traffic. So each message
is sealed for its receiver (``encryption/links.py``) and counted: one that is changed, repeated, left out or moved
raises MessageError. What remains visible is who sends how many bytes to whom, and when.

Buffers, never pickles: a message is bytes. A blocked MPI call would keep a core busy, so a rank that waits polls, and
sleeps in between.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from mpi4py import MPI

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.links import Handshake
from dopamine_lib.encryption.messages import SERVER

#: Kinds of messages: keys and handshakes, a state to go on from, to and from the server in a round, a round's
#: total, the final model, that it is on disk, and what all must agree on beforehand.
KEYS, STATE, UP, DOWN, TOTAL, MODEL, DONE, TERMS = range(1, 9)

#: Seconds between two looks: short while an answer is near, then 2 ms, which leaves the core to others.
_FIRST_PAUSE, _LONGEST_PAUSE = 5e-5, 2e-3
_HELLO_BYTES = 34


class Silence(RuntimeError):
    """A rank has not answered within the patience of another."""


class Wire:
    """One rank's end of everything: rank 0 is the server, rank k + 1 hospital k.

    comm      an MPI communicator
    identity  this rank's key pair; ``publics`` holds everybody's public keys, the server's under ``SERVER``
    patience  seconds without an answer after which the run is given up
    sent, received  bytes so far, seals included
    All ranks make theirs at the same time: they greet each other.
    """

    def __init__(self, comm: MPI.Comm, identity: Identity, publics: dict[int, bytes], *, patience: float):
        self.number, self.hospitals, self.patience = number_of(comm.rank), comm.size - 1, patience
        self.identity, self.publics = identity, publics
        self.sent = self.received = 0
        self._comm, self._out, self._in = comm, Counter(), Counter()
        handshake = Handshake(self.number, identity, publics)
        own = np.frombuffer(handshake.hello(), np.uint8)
        everybody = np.empty((comm.size, _HELLO_BYTES), np.uint8)
        self._wait(comm.Iallgather(own, everybody).Test, "a rank has not greeted the others")
        self._links = handshake.links(hello.tobytes() for hello in everybody)

    def send(self, peer: int, kind: int, body: bytes) -> None:
        """Seal ``body`` for a hospital or ``SERVER`` and hand it to MPI; returns when it is on its way."""
        self._out[peer] += 1
        sealed = self._links[peer].seal(kind, self._out[peer], bytes(body))
        self._wait(self._comm.Isend([sealed, MPI.BYTE], _rank_of(peer)).Test, f"{who(peer)} does not take a message")
        self.sent += len(sealed)

    def receive(self, peer: int, kind: int) -> bytes:
        """The next message of ``peer``, which must be of this kind."""
        self._wait(lambda: self._comm.Iprobe(_rank_of(peer)), f"{who(peer)} does not answer")
        return self._take(peer, kind)

    def arrivals(self, peers: Iterable[int], kind: int) -> Iterator[tuple[int, bytes]]:
        """(number, body) of one message of each of ``peers``, as they arrive."""
        left = list(peers)
        while left:
            here = []

            def look(left=left, here=here):
                here[:] = [peer for peer in left if self._comm.Iprobe(_rank_of(peer))]
                return here

            self._wait(look, f"{' and '.join(map(who, left))} do not answer")
            for peer in here:
                left.remove(peer)
                yield peer, self._take(peer, kind)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        wait_for_all(self._comm, self.patience)

    def _take(self, peer: int, kind: int) -> bytes:
        status = MPI.Status()
        self._comm.Iprobe(_rank_of(peer), status=status)
        sealed = bytearray(status.Get_count(MPI.BYTE))
        request = self._comm.Irecv([sealed, MPI.BYTE], _rank_of(peer))
        self._wait(request.Test, f"{who(peer)} stopped in a message")
        self._in[peer] += 1
        self.received += len(sealed)
        return self._links[peer].open(kind, self._in[peer], bytes(sealed))

    def _wait(self, done, what: str) -> None:
        wait(done, self.patience, what)


def number_of(rank: int) -> int:
    """The party's number of a rank."""
    return rank - 1 if rank else SERVER


def wait_for_all(comm: MPI.Comm, patience: float) -> None:
    """A barrier that sleeps."""
    wait(comm.Ibarrier().Test, patience, "not all ranks have come this far")


def wait(done: Callable[[], object], patience: float, what: str) -> None:
    """Sleep until ``done()`` is true. Raises Silence after ``patience`` seconds."""
    pause, end = _FIRST_PAUSE, time.monotonic() + patience
    while not done():
        if time.monotonic() > end:
            raise Silence(f"{what} for {patience:g} s: the run is given up; see whether that rank still runs")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _rank_of(number: int) -> int:
    return 0 if number == SERVER else number + 1


def who(number: int) -> str:
    """A party in an error message.

    >>> who(3)
    'hospital 3 (rank 4)'
    """
    return "the server (rank 0)" if number == SERVER else f"hospital {number} (rank {number + 1})"
