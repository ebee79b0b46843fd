"""A hospital's end of a relay's session: it calls the relay, directly or from elsewhere, and is never called."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation.wires.relay import MOST_BYTES, Seat, fits, who
from dopamine_lib.federation.wires.wire import SessionOver


class Calls(Protocol):
    """The three calls of one hospital, made to the relay directly or from elsewhere."""

    def join(self) -> Seat | None:
        """A place in the next session; None where there is none yet. Raises Refused."""

    def put(self, session: bytes, count: int, peer: int, message: bytes) -> None:
        """Leave message number ``count`` of this session. Raises SessionOver."""

    def get(self, session: bytes, count: int) -> tuple[int, bytes] | None:
        """Message number ``count`` of this session and its sender; None where there is none yet. Raises SessionOver."""


class HospitalEnd:
    """A hospital's end of a relay's session: a ``Carrier``. What it fetches is sorted by sender.

    Made once the server has opened a session for this hospital. Raises Refused, or what ``calls`` raises.

    most_bytes  as the relay's
    """

    reopens = True

    def __init__(self, number: int, hospitals: int, calls: Calls, patience: float, most_bytes: int = MOST_BYTES):
        self.number, self.hospitals, self._calls, self._most_bytes = number, hospitals, calls, most_bytes
        self.patience = 3 * patience  # the server may be patient with others first
        seat = None
        while seat is None:
            seat = calls.join()
        self._session, self.members = seat
        self._inbox = {peer: deque() for peer in [*self.members, SERVER] if peer != number}
        self._changed, self._over, self._sent = threading.Condition(), None, 0
        threading.Thread(target=self._fetch, name=f"hospital {number} fetches", daemon=True).start()

    def who(self, number: int) -> str:
        """A party in an error message."""
        return who(number)

    def send(self, peer: int, message: bytes) -> None:
        """Leave a message with the server. Raises SessionOver."""
        self._calls.put(self._session, self._sent, peer, message)
        self._sent += 1

    def here(self, peers: Sequence[int]) -> list[int]:
        """Those whose next message has arrived."""
        return [peer for peer in peers if self._inbox[peer]]

    def take(self, peer: int) -> bytes:
        """The next message of a peer that is ``here``."""
        return self._inbox[peer].popleft()

    def lost(self, peers: Sequence[int]) -> dict[int, str]:
        """Nobody: the server tells who is present."""
        return {}

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """Sleep until ``done()`` is true, or the time is over; returns which. Raises what ended the session."""
        with self._changed:
            self._changed.wait_for(lambda: done() or self._over, seconds)
            if done():
                return True
            if self._over:
                raise self._over
            return False

    def leave_out(self, peer: int, why: str, for_good: bool) -> None:
        """The server's business."""

    def newcomers(self) -> list[int]:
        """The server's business."""
        return []

    def close(self, why: str) -> None:
        """This hospital has done its part in the session."""
        with self._changed:
            self._over = SessionOver(why)
            self._changed.notify_all()

    def _fetch(self) -> None:
        """In a thread: fetch until the session is over. So the server sees that this hospital is there."""
        count = 0
        while self._over is None:
            try:
                found = self._calls.get(self._session, count)
                if found is not None and found[0] not in self._inbox:
                    raise SessionOver(f"the server relays a message of {found[0]}, who is not in this session")
            except Exception as error:  # whatever it is, who waits must hear of it
                with self._changed:
                    self._over = self._over or error
                    self._changed.notify_all()
                return
            if found is not None:
                count += 1
                sender, message = found
                with self._changed:
                    # of one that floods the rest is dropped: its next message that is awaited is refused, and named
                    if sender == SERVER or fits(self._inbox[sender], message, self._most_bytes):
                        self._inbox[sender].append(message)
                    self._changed.notify_all()
