"""A network between two processes of this machine: what goes through is delayed and throttled, each way by itself."""

import contextlib
import queue
import socket
import threading
import time
from typing import Any

from dopamine_lib.errors import check_within

CHUNK = 16 * 1024  # bytes that pass at once: about a millisecond of 100 Mbit/s


class Link:
    """An ``address`` of this machine behind which ``target`` lies. Use as a context manager, or call ``close``.

    round_trip  seconds from here to there and back
    rate        bits a second, each way
    Raises InputError for a rate that is not positive or a negative time.

    >>> with socket.create_server(("127.0.0.1", 0)) as there, Link(there.getsockname(), 0.02, 1e6) as link:
    ...     with socket.create_connection(link.address) as here, there.accept()[0] as end:
    ...         begin = time.perf_counter()
    ...         here.sendall(b"a question")
    ...         end.recv(10), time.perf_counter() - begin > 0.01
    (b'a question', True)
    """

    def __init__(self, target: tuple[str, int], round_trip: float, rate: float):
        check_within("round_trip", round_trip, 0, 60, "it is in seconds", low_open=False)
        check_within("rate", rate, 0, 1e12, "it is in bits a second")
        self._target, self._delay, self._rate = target, round_trip / 2, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.address: tuple[str, int] = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed, or the target is
            while True:
                ends = self._listener.accept()[0], socket.create_connection(self._target)
                self._ends += ends
                for source, sink in (ends, ends[::-1]):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    under_way: queue.SimpleQueue[Any] = queue.SimpleQueue()
                    threading.Thread(target=self._take, args=(source, under_way), daemon=True).start()
                    threading.Thread(target=self._hand_over, args=(under_way, sink), daemon=True).start()

    def _take(self, source: socket.socket, under_way: queue.SimpleQueue) -> None:
        free = 0.0  # when the line has sent all that came before
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                free = max(free, time.monotonic()) + 8 * len(data) / self._rate
                under_way.put((free + self._delay, data))
        under_way.put(None)

    @staticmethod
    def _hand_over(under_way: queue.SimpleQueue, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for due, data in iter(under_way.get, None):
                time.sleep(max(0.0, due - time.monotonic()))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End all connections; may be called twice."""
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
