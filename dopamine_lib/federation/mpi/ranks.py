"""Bytes between the ranks of an MPI run, and waiting that sleeps: the ``Carrier`` of ``wires.wire``.

MPI neither encrypts nor authenticates: anyone between two hosts can read and change its traffic, and the wire seals it.
A blocked MPI call would keep a core busy, so a rank that waits polls, and sleeps in between. A rank that is killed
takes the others with it (``mpiexec`` ends them all), so there is one session, and nobody is left out of it.
"""

import time
from collections.abc import Callable, Sequence

from mpi4py import MPI

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation.wires.wire import Silence

#: Seconds between two looks: short while an answer is near, then 2 ms, which leaves the core to others.
_FIRST_PAUSE, _LONGEST_PAUSE = 5e-5, 2e-3


class Ranks:
    """One rank's end of everything: rank 0 is the server, rank k + 1 hospital k.

    comm      an MPI communicator
    patience  seconds without an answer after which the run is given up
    """

    reopens = False

    def __init__(self, comm: MPI.Comm, patience: float):
        self.number, self.hospitals, self.patience = number_of(comm.rank), comm.size - 1, patience
        self.members = tuple(range(self.hospitals))
        self._comm = comm

    def who(self, number: int) -> str:
        """A party in an error message."""
        return "the server (rank 0)" if number == SERVER else f"hospital {number} (rank {number + 1})"

    def send(self, peer: int, message: bytes) -> None:
        """Hand a message to MPI. Raises Silence where the peer does not take it."""
        self._all_of(self._comm.Isend([message, MPI.BYTE], rank_of(peer)), f"{self.who(peer)} does not take a message")

    def here(self, peers: Sequence[int]) -> list[int]:
        """Those whose next message has arrived."""
        return [peer for peer in peers if self._comm.Iprobe(rank_of(peer))]

    def take(self, peer: int) -> bytes:
        """The next message of a peer that is ``here``."""
        status = MPI.Status()
        self._comm.Iprobe(rank_of(peer), status=status)
        message = bytearray(status.Get_count(MPI.BYTE))
        self._all_of(self._comm.Irecv([message, MPI.BYTE], rank_of(peer)), f"{self.who(peer)} stopped in a message")
        return bytes(message)

    def lost(self, peers: Sequence[int]) -> dict[int, str]:
        """Nobody: MPI does not say."""
        return {}

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """Sleep until ``done()`` is true, or the time is over; returns which."""
        return wait(done, seconds)

    def leave_out(self, peer: int, why: str, for_good: bool) -> None:
        """Has no use here: nobody is left out."""

    def newcomers(self) -> list[int]:
        """Nobody: all ranks start together."""
        return []

    def close(self, why: str) -> None:
        """Has no use here: what ends the session ends the run."""

    def _all_of(self, request: MPI.Request, what: str) -> None:
        if not wait(request.Test, self.patience):
            raise Silence(f"{what} for {self.patience:g} s: the run is given up; see whether that rank still runs")


def number_of(rank: int) -> int:
    """The party's number of a rank."""
    return rank - 1 if rank else SERVER


def rank_of(number: int) -> int:
    """The inverse of ``number_of``."""
    return 0 if number == SERVER else number + 1


def wait_for_all(comm: MPI.Comm, patience: float) -> None:
    """A barrier that sleeps. Raises Silence where a rank does not come."""
    if not wait(comm.Ibarrier().Test, patience):
        raise Silence(f"not all ranks have come this far for {patience:g} s: see whether all of them still run")


def wait(done: Callable[[], object], seconds: float) -> bool:
    """Sleep until ``done()`` is true, or ``seconds`` are over; returns which."""
    pause, end = _FIRST_PAUSE, time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True
