"""Channels: how two workers swap bytes in a fixed order, in one process or over a network.

A message is an 8-byte header (tag, length) and its payload. Both ends know from the public plan which tag comes
next and how long it is, so anything else is an error, never a guess. Nothing is unpickled or parsed.

After any error the channel is closed: the other side sees the end of the stream and stops as well. Neither side
goes on with half a message, so masks that were used by then are never used again.
"""

import contextlib
import selectors
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

HEADER = struct.Struct("<II")
CHUNK = 128 * 1024  # bytes handed to the socket at once
TURN = 64  # calls of the socket in one direction, of at most 16 KB each where it reads TLS, before the other's turn
BUFFER = 4 * 2**20  # bytes of kernel buffer we ask for, per direction
FIRST = 16 * 1024  # a header and the payload's beginning share one packet and one TLS record of this size
TIMEOUT = 60.0  # seconds a whole message may take
#: Not epoll, which a socket leaves without a word when another thread closes it.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
#: Bytes, a bytearray, or a C-contiguous array of any shape.
Buffer = Any


class ChannelError(Exception):
    """The conversation with another worker cannot go on: one sentence that says why. Names no payload."""


class Channel(Protocol):
    """What the protocols need of a connection to one other worker.

    sent, received  payload bytes so far
    rounds          times this side had to wait for the other
    """

    sent: int
    received: int
    rounds: int

    def send(self, tag: int, data: Buffer) -> None:
        """Send ``data``."""

    def receive(self, tag: int, out: Buffer) -> None:
        """Fill ``out``, which must be writable, with the next message, which must have this tag and size."""

    def exchange(self, tag: int, outgoing: Buffer, incoming: Buffer) -> None:
        """Send one message and receive one with the same tag, both at once: one round."""

    def close(self) -> None:
        """End the conversation; may be called twice."""


class SocketChannel(Channel):
    """A Channel over a connected stream socket: TCP, TLS or a socket pair.

    sock     owned by the channel from now on, closed by ``close`` and by any error
    peer     the other side's name in errors, such as ``provider``
    timeout  seconds a whole message may take, or None to wait for ever

    ``exchange`` sends what the socket takes and reads what it has, neither waiting for the other: two sides that both
    send first do not block each other, whatever the kernel buffers, and a long line is full in both directions.
    Raises ChannelError where the other side is gone, is late, or sends something unexpected.
    """

    def __init__(self, sock: socket.socket, peer: str = "other side", timeout: float | None = TIMEOUT):
        self._sock, self.peer = sock, peer
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.sent = self.received = self.rounds = 0
        self._received_last = False
        self._first = bytearray(FIRST)
        self._header = bytearray(HEADER.size)
        self.timeout = timeout

    def send(self, tag: int, data: Buffer) -> None:
        self._swap(tag, _bytes_of(data), None)

    def receive(self, tag: int, out: Buffer) -> None:
        self._swap(tag, None, _bytes_of(out))

    def exchange(self, tag: int, outgoing: Buffer, incoming: Buffer) -> None:
        self._swap(tag, _bytes_of(outgoing), _bytes_of(incoming))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before, or by the other side
            # wakes a thread that waits here; TLS's own shutdown would first fall back to an open socket
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        self._sock.close()

    def _swap(self, tag, outgoing, incoming) -> None:
        """Send and receive at once; either may be None. Every error ends here, as a ChannelError."""
        if incoming is not None and (outgoing is not None or not self._received_last):
            self.rounds += 1
        self._received_last = outgoing is None
        patience = self.timeout
        # of the whole message, not of one read: a sender of single bytes would never be late
        end = None if patience is None else time.monotonic() + patience
        try:
            ahead = [] if outgoing is None else self._packets(tag, outgoing)
            awaited = [] if incoming is None else [memoryview(self._header), incoming]
            while ahead or awaited:
                sent, wait_to_send = self._move(self._sock.send, ahead)
                got, wait_to_read = self._move(self._sock.recv_into, awaited)
                _advance(ahead, sent)
                before = len(awaited)
                if _advance(awaited, got) < 2 == before:
                    self._check_header(tag, len(incoming))
                if not sent and not got:
                    self._wait(wait_to_send | wait_to_read, end)
                if end is not None and time.monotonic() > end:
                    raise TimeoutError
        except ChannelError:
            self.close()
            raise
        except TimeoutError:
            self.close()
            late = f"the {self.peer} did not go on within {patience:g} s; is it still running?"
            raise ChannelError(late) from None
        except ConnectionError:  # a reset is what an end looks like where something of ours was still unread
            self.close()
            raise ChannelError(f"the {self.peer} closed the connection before it was done") from None
        except (OSError, ValueError) as error:  # ValueError: the channel was closed by another thread
            self.close()
            raise ChannelError(f"the connection to the {self.peer} broke ({_reason(error)})") from None
        self.sent += len(outgoing or b"")
        self.received += len(incoming or b"")

    def _packets(self, tag: int, outgoing: memoryview) -> list[memoryview]:
        """The header with as much of the payload as fits into one packet, and the rest."""
        head = min(len(outgoing), FIRST - HEADER.size)
        HEADER.pack_into(self._first, 0, tag, len(outgoing))
        self._first[HEADER.size : HEADER.size + head] = outgoing[:head]
        rest = [outgoing[head:]] if head < len(outgoing) else []
        return [memoryview(self._first)[: HEADER.size + head], *rest]

    def _move(self, call: Callable[[memoryview], int], views: list[memoryview]) -> tuple[int, int]:
        """How many bytes of the first view went through, and for what the socket waits: TLS may have to read to send.

        Raises ConnectionError at the stream's end.
        """
        moved, view = 0, views[0] if views else b""
        try:
            for _ in range(TURN):
                if moved == len(view):
                    break
                if not (count := call(view[moved : moved + CHUNK])):
                    raise ConnectionError
                moved += count
        except ssl.SSLWantReadError:
            return moved, selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            return moved, selectors.EVENT_WRITE
        except BlockingIOError:
            return moved, selectors.EVENT_WRITE if call == self._sock.send else selectors.EVENT_READ
        return moved, 0

    def _wait(self, events: int, end: float | None) -> None:
        with _Selector() as selector:
            selector.register(self._sock, events)
            selector.select(None if end is None else max(0.0, end - time.monotonic()))

    def _check_header(self, tag: int, size: int) -> None:
        got_tag, got_size = HEADER.unpack(self._header)
        if got_tag != tag:
            raise ChannelError(f"the {self.peer} sent message {got_tag} where message {tag} is due: out of order")
        if got_size != size:
            raise ChannelError(f"the {self.peer} sent message {tag} with {got_size} bytes where {size} are due")


def _advance(views: list[memoryview], count: int) -> int:
    """Drop ``count`` bytes from the first of some views, and views that have none left; returns how many views are."""
    if views:
        views[0] = views[0][count:]
    while views and not len(views[0]):
        views.pop(0)
    return len(views)


def _bytes_of(data) -> memoryview:
    return memoryview(data).cast("B")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or type(error).__name__).lower().replace('_', ' ')}"
    return getattr(error, "strerror", None) or type(error).__name__


def local_pair(timeout: float | None = TIMEOUT) -> tuple[SocketChannel, SocketChannel]:
    """Two ends of a connection within this process, for two threads: the same code as over a network, no TLS."""
    one, other = socket.socketpair()
    return SocketChannel(one, timeout=timeout), SocketChannel(other, timeout=timeout)


class Recorded(Channel):
    """A Channel that keeps all messages of another: ``log`` is a list of (direction, tag, bytes), in order.

    direction  ``sent`` or ``received``
    wanted     says of (direction, tag) whether to keep that message; all by default
    For the notebook and for tests of privacy: one side's log holds what that side sees.
    """

    def __init__(self, channel: Channel, wanted: Callable[[str, int], bool] = lambda direction, tag: True):
        self._channel, self._wanted = channel, wanted
        self.log: list[tuple[str, int, bytes]] = []

    def send(self, tag: int, data: Buffer) -> None:
        self._channel.send(tag, data)
        self._keep("sent", tag, data)

    def receive(self, tag: int, out: Buffer) -> None:
        self._channel.receive(tag, out)
        self._keep("received", tag, out)

    def exchange(self, tag: int, outgoing: Buffer, incoming: Buffer) -> None:
        self._channel.exchange(tag, outgoing, incoming)
        self._keep("sent", tag, outgoing)
        self._keep("received", tag, incoming)

    def close(self) -> None:
        self._channel.close()

    def _keep(self, direction: str, tag: int, data) -> None:
        if self._wanted(direction, tag):
            self.log.append((direction, tag, bytes(_bytes_of(data))))

    sent = property(lambda self: self._channel.sent)
    received = property(lambda self: self._channel.received)
    rounds = property(lambda self: self._channel.rounds)
