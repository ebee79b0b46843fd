"""Parties of an MPI run in threads of one process, with queues in the place of a ``Wire``'s sealed messages."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.messages import SERVER

HOSPITALS = 3
NUMBERS = (*range(HOSPITALS), SERVER)


class Ended(Exception):
    """Another party gave up, and this one would wait for ever."""


class Lines:
    """All queues, and the parties' keys."""

    def __init__(self):
        self.queues = {(a, b): queue.Queue() for a in NUMBERS for b in NUMBERS}
        self.identities = {number: Identity() for number in NUMBERS}
        self.ended = threading.Event()

    def all(self, do, numbers=NUMBERS):
        """``do(end)`` at every party at once: what it returned, or the text of its refusal."""

        def one(number):
            try:
                return do(End(self, number))
            except Ended:
                return "ended"
            except Exception as error:
                self.ended.set()
                return f"{type(error).__name__}: {error}"

        with ThreadPoolExecutor(len(numbers)) as threads:
            return dict(zip(numbers, threads.map(one, numbers), strict=True))


class End:
    """One party's end, with a ``Wire``'s names."""

    hospitals = HOSPITALS

    def __init__(self, lines: Lines, number: int):
        self.lines, self.number, self.identity = lines, number, lines.identities[number]
        self.publics = {number: identity.public for number, identity in lines.identities.items()}

    def send(self, peer, kind, body):
        self.lines.queues[self.number, peer].put((kind, bytes(body)))

    def receive(self, peer, kind):
        while True:
            try:
                found, body = self.lines.queues[peer, self.number].get(timeout=0.05)
            except queue.Empty:
                if self.lines.ended.is_set() and self.lines.queues[peer, self.number].empty():
                    raise Ended from None
                continue
            assert found == kind
            return body

    def arrivals(self, peers, kind):
        return [(peer, self.receive(peer, kind)) for peer in peers]

    def barrier(self):
        pass
