"""Mailboxes at the server, for hospitals that call it and are never called: in threads here, over gRPC in ``remote``.

A hospital makes three calls, each of which may be repeated when its answer was lost:

    join   wait for the next session, and be told who else is in it
    put    leave a message for the server or, sealed for it, another hospital
    get    fetch the next message, however long that takes

The server opens sessions, and reads and fills the boxes as its own ``Carrier``, ``ServerEnd``; a hospital's is
``HospitalEnd`` in ``hospital_end``. An *instance* is one life of a hospital's program: a hospital that is started again
is another instance, and what the one before had left to do is over.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError
from dopamine_lib.federation.wires.wire import SessionOver

#: Undelivered messages for one party from a hospital: no protocol has more under way, so whoever sends more, or more
#: bytes than ``most_bytes``, is up to no good, and its messages would fill the memory of the server or of the other.
MOST_UNDELIVERED = 32
MOST_BYTES = 2**30
#: Seconds that a call waits before it answers that there is nothing yet.
CALL_SECONDS = 10.0


class Seat(NamedTuple):
    """A hospital's place in a session: the session's 16 bytes, and its members."""

    session: bytes
    members: tuple[int, ...]


class Refused(InputError):
    """The server wants nothing more to do with this hospital, and says why."""


class Relay:
    """The boxes of all K hospitals and the server.

    most_bytes  of undelivered messages for one party from a hospital
    """

    def __init__(self, hospitals: int, most_bytes: int = MOST_BYTES):
        self.hospitals, self.most_bytes = hospitals, most_bytes
        self.changed = threading.Condition()
        self.seat, self.over = Seat(b"", ()), "no session has begun"
        self.lost: dict[int, str] = {}
        self._instances: dict[int, bytes] = {}  # of the members
        self._waiting: dict[int, bytes] = {}  # for the next session
        self._unseated: set[int] = set()  # members that have not heard of their session
        self._refused: dict[int, str] = {}
        self._boxes: dict[int, deque[tuple[int, bytes]]] = {}
        self._taken: dict[int, int] = {}
        self._put: dict[int, int] = {}

    def join(self, number: int, instance: bytes, seconds: float = CALL_SECONDS) -> Seat | None:
        """As ``hospital_end.Calls.join``, for hospital ``number``."""

        def ready() -> bool:
            seated = not self.over and self._instances.get(number) == instance and number not in self.lost
            return seated or number in self._refused

        with self.changed:
            if self._instances.get(number, instance) != instance and not self.over:
                self._lose(number, "was started again")
            if not ready():
                self._waiting[number] = instance
                self.changed.notify_all()
            self.changed.wait_for(ready, seconds)
            if number in self._refused:
                raise Refused(f"the server refuses hospital {number}: it {self._refused[number]}")
            if not ready():
                return None
            self._unseated.discard(number)
            return self.seat

    def put(self, number: int, instance: bytes, session: bytes, count: int, peer: int, message: bytes) -> None:
        """As ``hospital_end.Calls.put``, for hospital ``number``."""
        with self.changed:
            self._check(number, instance, session)
            if count < self._put[number]:  # it came already, and the answer was lost
                return
            if count > self._put[number] or peer == number or peer not in self._boxes:
                raise SessionOver(f"hospital {number} sends message {count} for {peer}, which is not due")
            box = self._boxes[peer]
            if not fits([own for sender, own in box if sender == number], message, self.most_bytes):
                most = f"{MOST_UNDELIVERED} messages or {self.most_bytes:,} bytes"
                self._lose(number, f"has more than {most} for one party under way, which no protocol has")
                raise SessionOver(f"hospital {number} {self.lost[number]}")
            box.append((number, message))
            self._put[number] += 1
            self.changed.notify_all()

    def get(
        self, number: int, instance: bytes, session: bytes, count: int, seconds: float = CALL_SECONDS
    ) -> tuple[int, bytes] | None:
        """As ``hospital_end.Calls.get``, for hospital ``number``; what came before ``count`` has arrived: forget it."""

        def ready() -> bool:
            self._check(number, instance, session)
            if self.over and not self._boxes[number]:
                raise SessionOver(self.over)
            return bool(self._boxes[number])

        with self.changed:
            self._check(number, instance, session)
            if count not in (self._taken[number], self._taken[number] + bool(self._boxes[number])):
                raise SessionOver(f"hospital {number} asks for message {count}, which is not due")
            if count > self._taken[number]:
                self._boxes[number].popleft()
                self._taken[number] = count
                self.changed.notify_all()
            return self._boxes[number][0] if self.changed.wait_for(ready, seconds) else None

    def gone(self, number: int, instance: bytes, why: str) -> None:
        """A hospital's program has ended, or cannot be reached: without it, if it is this one."""
        with self.changed:
            if self._waiting.get(number) == instance:
                del self._waiting[number]
            if self._instances.get(number) == instance and not self.over:
                self._lose(number, why)

    def open(self, needed: int, gather: float, patience: float, say: Callable[[str], object]) -> "ServerEnd":
        """A session of all hospitals that wait, once all of them do, or ``needed`` of them after ``gather`` seconds.

        Raises InputError where fewer come within ``patience``.
        """
        with self.changed:
            begin = time.monotonic()
            said = False
            while len(self._waiting) < self.hospitals:
                passed, here = time.monotonic() - begin, len(self._waiting)
                if here >= needed and passed >= gather:
                    break
                if passed >= patience:
                    raise InputError(
                        f"{here} of the {needed} hospitals that are needed came within {patience:g} s: start the "
                        "others, or take a larger --patience"
                    )
                if passed >= 1 and not said:
                    missing = [k for k in range(self.hospitals) if k not in self._waiting]
                    say(f"waiting for {' and '.join(f'hospital {k}' for k in missing)}")
                    said = True
                self.changed.wait(0.25)
            self._instances, self._waiting = self._waiting, {}
            members = tuple(sorted(self._instances))
            self._unseated = set(members)
            self.seat, self.over, self.lost = Seat(os.urandom(16), members), "", {}
            self._boxes = {number: deque() for number in [*members, SERVER]}
            self._taken, self._put = dict.fromkeys(members, 0), dict.fromkeys(members, 0)
            self.changed.notify_all()
        return ServerEnd(self, patience)

    def close(self, why: str) -> None:
        """End the session: whoever calls is told why, once it has fetched what is there for it."""
        with self.changed:
            self.over = self.over or why
            for number in self._unseated - set(self.lost):  # they wait still, now for the next session
                self._waiting.setdefault(number, self._instances[number])
            self._unseated.clear()
            self.changed.notify_all()

    def refuse(self, number: int, why: str, for_good: bool) -> None:
        """Have nothing more to do with a hospital, in this session or ever."""
        with self.changed:
            if for_good:
                self._refused[number] = why
                self._waiting.pop(number, None)
            self._lose(number, why)

    def deliver(self, number: int, message: bytes) -> None:
        """Put a message of the server's into a hospital's box, if that is still there."""
        with self.changed:
            if number in self._boxes and number not in self.lost:
                self._boxes[number].append((SERVER, message))
                self.changed.notify_all()

    def arrived(self) -> deque[tuple[int, bytes]]:
        """The server's own box; hold ``changed`` while you use it."""
        return self._boxes.get(SERVER, deque())

    def waiting(self) -> list[int]:
        """The hospitals that wait for the next session."""
        return sorted(self._waiting)

    def drain(self, seconds: float) -> None:
        """Wait until hospitals have fetched all messages, but no longer than this."""
        with self.changed:
            present = [k for k in self.seat.members if k not in self.lost]
            self.changed.wait_for(lambda: not any(self._boxes.get(k) for k in present), seconds)

    def _check(self, number: int, instance: bytes, session: bytes) -> None:
        """Raise SessionOver unless this is the latest session, with this instance in it."""
        if number in self.lost and session == self.seat.session:
            raise SessionOver(f"the server went on without hospital {number}: it {self.lost[number]}")
        if session != self.seat.session or self._instances.get(number) != instance:
            raise SessionOver("the server has begun another session")

    def _lose(self, number: int, why: str) -> None:
        if number in self.seat.members:
            self.lost.setdefault(number, why)
        if number in self._boxes:
            self._boxes[number].clear()
        self.changed.notify_all()


class ServerEnd:
    """The server's end of a relay's session: a ``Carrier``."""

    reopens = True

    def __init__(self, relay: Relay, patience: float):
        self.number, self.hospitals, self.members = SERVER, relay.hospitals, relay.seat.members
        self.patience, self._relay = patience, relay

    def who(self, number: int) -> str:
        """A party in an error message."""
        return who(number)

    def send(self, peer: int, message: bytes) -> None:
        """Put a message into a hospital's box."""
        self._relay.deliver(peer, message)

    def here(self, peers: Sequence[int]) -> list[int]:
        """Those whose next message has arrived."""
        with self._relay.changed:
            senders = {sender for sender, _ in self._relay.arrived()}
        return [peer for peer in peers if peer in senders]

    def take(self, peer: int) -> bytes:
        """The next message of a peer that is ``here``."""
        with self._relay.changed:  # until it is taken it counts as undelivered
            arrived = self._relay.arrived()
            place = next(i for i, (sender, _) in enumerate(arrived) if sender == peer)
            _, message = arrived[place]
            del arrived[place]
            return message

    def lost(self, peers: Sequence[int]) -> dict[int, str]:
        """Those that are gone, and why."""
        return {peer: self._relay.lost[peer] for peer in peers if peer in self._relay.lost}

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """Sleep until ``done()`` is true, or the time is over; returns which. Raises SessionOver."""
        with self._relay.changed:
            self._relay.changed.wait_for(lambda: done() or self._relay.over, seconds)
            if done():
                return True
            if self._relay.over:
                raise SessionOver(self._relay.over)
            return False

    def leave_out(self, peer: int, why: str, for_good: bool) -> None:
        """Have nothing more to do with a hospital in this session, or ever."""
        self._relay.refuse(peer, why, for_good)

    def newcomers(self) -> list[int]:
        """The hospitals that wait for another session."""
        return self._relay.waiting()

    def close(self, why: str) -> None:
        """End the session for all hospitals."""
        self._relay.close(why)


def fits(under_way: Collection[bytes], message: bytes, most_bytes: int) -> bool:
    """Whether one more message may be under way from a sender to a receiver.

    >>> fits([b"one"], b"more", most_bytes=7), fits([b"one"], b"more", most_bytes=6)
    (True, False)
    """
    return len(under_way) < MOST_UNDELIVERED and sum(map(len, under_way)) + len(message) <= most_bytes


def who(number: int) -> str:
    """A party in an error message.

    >>> who(3), who(SERVER)
    ('hospital 3', 'the server')
    """
    return "the server" if number == SERVER else f"hospital {number}"
