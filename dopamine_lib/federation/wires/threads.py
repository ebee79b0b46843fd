"""A run in one process: a thread for each party, with the relay's mailboxes between them and the same messages.

For tests, for the notebook, and to try what a hospital that vanishes does to a round, without MPI or a network. All
threads share the processor's cores and Python's lock, so it says nothing about speed on several machines.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation.wires.hospital_end import HospitalEnd
from dopamine_lib.federation.wires.relay import Relay, Seat, who
from dopamine_lib.federation.wires.wire import SessionOver, Wire

T = TypeVar("T")


class Vanished(BaseException):
    """Raised inside a hospital's thread: its program has been killed. Nothing in it catches this."""


class LocalCalls:
    """One life of a hospital in this process: the relay's calls, made directly."""

    def __init__(self, threads: "Threads", number: int):
        self._threads, self._number, self.instance = threads, number, os.urandom(16)

    def join(self) -> Seat | None:
        """As ``hospital_end.Calls.join``."""
        return self._threads.relay.join(self._number, self.instance, 1.0)  # a server that was killed says nothing

    def put(self, session: bytes, count: int, peer: int, message: bytes) -> None:
        """As ``hospital_end.Calls.put``."""
        self._threads.relay.put(self._number, self.instance, session, count, peer, message)

    def get(self, session: bytes, count: int) -> tuple[int, bytes] | None:
        """As ``hospital_end.Calls.get``."""
        return self._threads.relay.get(self._number, self.instance, session, count)


class Threads:
    """The parties of one run, and their keys.

    hospitals  K
    needed     how many of them a session needs
    gather     seconds that a session waits for more than those
    patience   seconds without an answer after which a party is taken for silent
    say        is told, in a line, of hospitals that are left out

    >>> def greet(wire):
    ...     if wire.number == SERVER:
    ...         return sorted(body for _, body in wire.arrivals([0, 1], 3))
    ...     wire.send(SERVER, 3, b"from %d" % wire.number)
    >>> Threads(2).run(greet)[SERVER]
    [b'from 0', b'from 1']
    """

    def __init__(
        self,
        hospitals: int,
        *,
        needed: int | None = None,
        gather: float = 0.0,
        patience: float = 60.0,
        say: Callable[[str], object] = lambda line: None,
    ):
        self.hospitals, self.needed, self.gather, self.patience = hospitals, needed or hospitals, gather, patience
        self.say, self.relay = say, Relay(hospitals)
        self.identities = {number: Identity() for number in [*range(hospitals), SERVER]}
        self.publics = {number: identity.public for number, identity in self.identities.items()}

    def connect(self, number: int, calls: LocalCalls | None = None) -> Wire:
        """A party's end of the next session; waits for it.

        calls  the life of a hospital to go on with; by default a new one
        """
        if number == SERVER:
            carrier = self.relay.open(self.needed, self.gather, self.patience, self.say)
        else:
            calls = calls or LocalCalls(self, number)
            carrier = HospitalEnd(number, self.hospitals, calls, self.patience)
        say = self.say if number == SERVER else lambda line: None
        return Wire(carrier, self.identities[number], self.publics, say)

    def vanish(self, number: int, instance: bytes = b"") -> None:
        """Have it known that a party's program was killed: a hospital's life, or the server, which begins anew."""
        if number != SERVER:
            self.relay.gone(number, instance, "was killed")
        else:
            killed, self.relay = self.relay, Relay(self.hospitals)
            killed.close("the server was killed")

    def run(self, do: Callable[[Wire], T], numbers: Iterable[int] | None = None) -> dict[int, T | Exception]:
        """``do(wire)`` at every party at once, in one session: what it returned, or the exception that ended it.

        numbers  who does it; the rest only greet. A party that fails ends the session for the others
        """

        def one(number: int) -> T | Exception:
            calls = None if number == SERVER else LocalCalls(self, number)
            try:
                wire = self.connect(number, calls)
                return do(wire) if number in numbers else None
            except Exception as error:
                if not isinstance(error, SessionOver):
                    self.relay.close(f"{who(number)} gave up: {error}")
                return error
            except Vanished:
                self.vanish(number, calls.instance)
                return None

        everybody = [*range(self.hospitals), SERVER]
        numbers = everybody if numbers is None else list(numbers)
        with ThreadPoolExecutor(len(everybody)) as pool:
            found = dict(zip(everybody, pool.map(one, everybody), strict=True))
        self.relay.close("the run is over")
        return {number: found[number] for number in numbers}
