"""The server's end: letters to every hospital, and between them the relay's boxes, as when hospitals call themselves.

relay    what the run's server reads and fills (``wires.relay``)
Post     a thread for each hospital: it makes the hospital's calls on the relay by what letters say
carry    brings a letter to a hospital and comes back with the reply: Flower, or a test
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from dopamine_lib.encryption.messages import MessageError
from dopamine_lib.federation.flower.letters import NONE, Letter, pack, unpack
from dopamine_lib.federation.wires.relay import Refused, Relay
from dopamine_lib.federation.wires.wire import SessionOver

#: Seconds after which a hospital is written to though not all that it waits for is there: part of it may help.
HOLD = 5.0


class Lost(RuntimeError):
    """No reply came; says why."""


class Post:
    """Letters to and from K hospitals.

    relay  the boxes
    carry  called as ``carry(number, letter)``; gives the reply, or raises Lost. From several threads at once
    pause  seconds until a hospital is written to again that did not reply, or whose program has ended
    say    is told, in a line, of those
    """

    def __init__(
        self,
        relay: Relay,
        carry: Callable[[int, bytes], bytes],
        pause: float = 5.0,
        say: Callable[[str], object] = lambda line: None,
    ):
        self._relay, self._carry, self._pause, self._say = relay, carry, pause, say
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._write_to, args=(k,), name=f"letters to hospital {k}", daemon=True)
            for k in range(relay.hospitals)
        ]
        for thread in self._threads:
            thread.start()

    def close(self, seconds: float = 30.0) -> None:
        """Write no more letters, once hospitals that are in a session have heard how it ended."""
        self._closed.set()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _write_to(self, number: int) -> None:
        """In a thread: one letter after another, each by what the last reply said."""
        hospital, letter, said, lost = _Hospital(self._relay, number, self._closed), Letter(), "", 0
        while letter is not None:
            try:
                reply, lost = unpack(self._carry(number, pack(letter))), 0
                over = "".join(filter(str.isprintable, reply.over))[:200]  # a line, whatever a node replies
                why = reply.over and f"has ended: {over}"
                letter = Letter() if why else hospital.next(reply)
            except (Lost, MessageError) as error:
                why, lost = f"cannot be reached: {error}", lost + 1
            if why and lost != 1:  # what was lost once is written again
                seated = not self._relay.over and number in self._relay.seat.members  # then the server says it
                self._relay.gone(number, hospital.instance, why)
                if why != said and not seated:
                    self._say(f"hospital {number} {why}")
                said = why
            if why and self._closed.wait(self._pause):
                return


class _Hospital:
    """What is under way between the relay and one hospital."""

    def __init__(self, relay: Relay, number: int, closed: threading.Event):
        self._relay, self._number, self._closed = relay, number, closed
        self.instance = b""
        self._begin(NONE, ())

    def _begin(self, session: bytes, members: tuple[int, ...]) -> None:
        self._session, self._members, self._taken, self._first = session, members, 0, 0
        self._messages: deque[tuple[int, bytes]] = deque()

    def next(self, reply: Letter) -> Letter | None:
        """The letter after this reply, once there is something to write; None where there never will be."""
        if reply.instance != self.instance:
            self.instance = reply.instance
            self._begin(NONE, ())
        over = ""
        if reply.session == self._session != NONE:
            over = self._take_in(reply)
        if reply.joining:
            return self._seated()
        if self._session == NONE:  # the program is in a session that this server does not know
            return Letter()
        over = over or self._gathered(set(reply.parties))
        if over is None:
            return None
        return Letter(
            session=self._session,
            parties=self._members,
            taken=self._taken,
            first=self._first,
            messages=tuple(self._messages),
            over=over,
        )

    def _take_in(self, reply: Letter) -> str:
        """Put what has come into the relay; returns why the session is over, if it is."""
        while self._messages and self._first < reply.taken:
            self._messages.popleft()
            self._first += 1
        try:
            for count, (peer, message) in enumerate(reply.messages, start=reply.first):
                if count == self._taken:
                    self._relay.put(self._number, self.instance, self._session, count, peer, message)
                    self._taken += 1
        except SessionOver as over:
            return str(over)
        return ""

    def _seated(self) -> Letter | None:
        """The letter with a place in the next session."""
        while not self._closed.is_set():
            try:
                seat = self._relay.join(self._number, self.instance, 0.5)
            except Refused as refused:
                return Letter(over=str(refused), refused=True)
            if seat is not None:
                self._begin(*seat)
                return Letter(session=seat.session, parties=seat.members)
        return None

    def _gathered(self, awaited: set[int]) -> str | None:
        """Gather what the hospital waits for: "", or why the session is over; None where the post is closed."""
        since = None
        while True:
            try:
                count = self._first + len(self._messages)
                found = self._relay.get(self._number, self.instance, self._session, count, 0.2)
            except SessionOver as over:
                return str(over)
            if found is not None:
                self._messages.append(found)
                since = since or time.monotonic()
            elif self._closed.is_set():
                return None
            if since and (awaited <= {sender for sender, _ in self._messages} or time.monotonic() - since > HOLD):
                return ""
