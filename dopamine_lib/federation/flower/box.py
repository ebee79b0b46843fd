"""A hospital's end: its program puts into a box and gets out of it, and whoever carries letters empties and fills it.

The program is the one that a hospital runs over gRPC, with its own patients, keys and ledger. It listens on a socket in
its own folder (``listening``), where Flower's client hands in what came for it and is handed what goes back. What is
carried is sealed: whoever can reach the socket can delay the run or end it, as the network can, and reads nothing.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from dopamine_lib.encryption.messages import MessageError
from dopamine_lib.errors import InputError
from dopamine_lib.federation.flower.letters import NONE, Letter, pack, unpack
from dopamine_lib.federation.wires.hospital_end import HospitalEnd
from dopamine_lib.federation.wires.relay import CALL_SECONDS, MOST_BYTES, Refused, Seat
from dopamine_lib.federation.wires.wire import SessionOver, Silence

#: The longest name of a socket on Linux and macOS alike.
_LONGEST_NAME = 100
#: Seconds within which whoever connects must say something.
SAY = 5.0
#: Why a program ends that has come to its end.
DONE = "it has done its part"


class Box:
    """One life of a hospital's program: the relay's calls, answered by what letters bring.

    patience  seconds without a letter after which the program gives up, if it waits for the next session
    """

    def __init__(self, patience: float):
        self.instance, self.answers, self._patience, self._last = os.urandom(16), False, patience, time.monotonic()
        self._changed, self._letters = threading.Condition(), threading.Lock()
        self._seat, self._fresh, self._joining = Seat(NONE, ()), False, False
        self._over, self._refused, self._ended = "", "", ""
        self._in: deque[tuple[int, bytes]] = deque()
        self._out: deque[tuple[int, bytes]] = deque()
        self._taken = self._got = self._put = 0  # messages that came, that the program has, and that it has put
        self._end: Boxed | None = None
        self._left: set[bytes] = set()  # sessions that the program has been in

    def join(self) -> Seat | None:
        """As ``Calls.join``."""
        with self._changed:
            self._joining, self._end = True, None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fresh or self._refused, CALL_SECONDS)
            if self._refused:
                raise Refused(self._refused)
            if not self._fresh:
                if time.monotonic() - self._last > self._patience:
                    raise Silence(f"no letter of the server's has come for {self._patience:g} s")
                return None
            self._joining = self._fresh = False
            return self._seat

    def put(self, session: bytes, count: int, peer: int, message: bytes) -> None:
        """As ``Calls.put``."""
        with self._changed:
            self._check(session)
            self._out.append((peer, message))
            self._put += 1

    def get(self, session: bytes, count: int) -> tuple[int, bytes] | None:
        """As ``Calls.get``."""

        def ready() -> bool:
            return session != self._seat.session or self._over or len(self._in) > 0

        with self._changed:
            if session == self._seat.session:
                while self._got < count:
                    self._in.popleft()
                    self._got += 1
            self._changed.notify_all()
            self._changed.wait_for(ready, CALL_SECONDS)
            if session != self._seat.session or not self._in:
                self._check(session)
                return None
            return self._in[0]

    def attach(self, end: "Boxed") -> None:
        """Take in the end that the program has in this session."""
        with self._changed:
            self._end = end

    def close(self, why: str) -> None:
        """The program has ended."""
        with self._changed:
            self._ended = why
            self._changed.notify_all()

    def answer(self, request: bytes) -> bytes:
        """The reply to a letter, once the program waits or has ended. Raises MessageError for what is no letter."""
        letter = unpack(request)
        with self._letters, self._changed:
            self._last = time.monotonic()
            self._take_in(letter)
            self._changed.notify_all()
            while not self._waits():
                self._changed.wait(0.02)
            awaited = () if self._end is None or self._ended else self._end.awaited
            return pack(
                Letter(
                    instance=self.instance,
                    session=self._seat.session,
                    parties=awaited,
                    taken=self._taken,
                    first=self._put - len(self._out),
                    messages=tuple(self._out),
                    joining=self._joining,
                    over=self._ended,
                )
            )

    def _take_in(self, letter: Letter) -> None:
        if letter.refused:
            self._refused = self._over = letter.over
        elif letter.session == self._seat.session:
            while self._out and self._put - len(self._out) < letter.taken:
                self._out.popleft()
            for number, message in enumerate(letter.messages, start=letter.first):
                if number == self._taken:
                    self._in.append(message)
                    self._taken += 1
            self._over = self._over or letter.over
        elif letter.session == NONE:  # a server that knows of no session: it was started again
            self._over = self._over or "the server has begun anew"
        elif self._joining and letter.session not in self._left:  # a letter that comes again, late, seats nobody
            self._left.add(letter.session)
            self._seat, self._fresh = Seat(letter.session, letter.parties), True
            self._over, self._taken, self._got, self._put = letter.over, 0, 0, 0
            self._in.clear()
            self._out.clear()

    def _waits(self) -> bool:
        """Whether the program can do nothing more until another letter comes."""
        if self._ended:
            return True
        if self._fresh or self._refused or (self._over and not self._joining):
            return False
        return self._joining or (not self._in and self._end is not None and self._end.waits())

    def _check(self, session: bytes) -> None:
        if session != self._seat.session or self._over:
            raise SessionOver(self._over or "the server has begun another session")


class Boxed(HospitalEnd):
    """A hospital's end of a session whose calls are a box's: it knows what its program waits for."""

    def __init__(self, number: int, hospitals: int, box: Box, patience: float):
        self._awaits: Callable[[], object] | None = None
        self.awaited: tuple[int, ...] = ()
        super().__init__(number, hospitals, box, patience)
        box.attach(self)

    def here(self, peers: Sequence[int]) -> list[int]:
        """Those whose next message has arrived."""
        self.awaited = tuple(peers)
        return super().here(peers)

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """As ``Carrier.wait``."""
        with self._changed:
            self._awaits = done
        try:
            return super().wait(done, seconds)
        finally:
            with self._changed:
                self._awaits = None

    def waits(self) -> bool:
        """Whether the program waits for a message that is not here."""
        with self._changed:
            return self._over is None and self._awaits is not None and not self._awaits()


@contextmanager
def listening(box: Box, path: Path) -> Iterator[None]:
    """Answer letters at the socket ``path``, which its owner's group may use, and no others.

    Raises InputError for a path that is too long.
    """
    if len(os.fsencode(path)) > _LONGEST_NAME:
        raise InputError(f"{path} is too long a name for a socket, {_LONGEST_NAME} bytes: choose a shorter --out")
    path.unlink(missing_ok=True)  # of a program that was killed; the folder is claimed
    replying: list[threading.Thread] = []
    closed = threading.Event()

    def reply_to(connection: Connection) -> None:
        with connection, suppress(EOFError, OSError, MessageError):  # whoever hung up, or sends none, comes again
            if connection.poll(SAY):
                connection.send_bytes(box.answer(connection.recv_bytes(MOST_BYTES)))

    def serve() -> None:
        while not closed.is_set():
            try:
                connection = listener.accept()
            except OSError:  # closed, or more connections than files may be open: these end
                closed.wait(0.1)
                continue
            replying[:] = [thread for thread in replying if thread.is_alive()]
            replying.append(threading.Thread(target=reply_to, args=(connection,), daemon=True))
            replying[-1].start()

    with Listener(str(path), "AF_UNIX", backlog=16) as listener:
        path.chmod(0o660)
        threading.Thread(target=serve, name="letters", daemon=True).start()
        yield
        closed.set()
        end = time.monotonic() + 5.0
        for thread in list(replying):  # the last letter says that the program has ended
            thread.join(max(0.0, end - time.monotonic()))


def hand_in(path: Path, letter: bytes) -> bytes:
    """The reply of the program that listens at ``path``. Raises OSError or EOFError where none does, or it dies."""
    with Client(str(path), "AF_UNIX") as connection:
        connection.send_bytes(letter)
        return connection.recv_bytes()
