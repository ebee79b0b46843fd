"""Channels: how two workers swap bytes in a fixed order, in one process or over a network.

A message is an 8-byte header (tag, length) and its payload. Both ends know from the public plan which tag comes
next and how long it is, so anything else is an error, never a guess. Nothing is unpickled or parsed.

After any error the channel is closed: the other side sees the end of the stream and stops as well. Neither side
goes on with half a message, so masks that were used by then are never used again.
"""

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

HEADER = struct.Struct("<II")
CHUNK = 128 * 1024  # bytes each side sends before it reads
BUFFER = 4 * 2**20  # bytes of kernel buffer we ask for, per direction
FIRST = 16 * 1024  # a header and the payload's beginning share one packet and one TLS record of this size
TIMEOUT = 60.0  # seconds a whole message may take
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

    ``exchange`` works in lock-step: send a chunk, read a chunk. At most four chunks are then sent by one side and not
    yet read by the other; with chunks of a sixteenth of the socket buffer (the kernel counts its overhead too) they
    fit, so two sides that both send first never block each other.
    Raises ChannelError where the other side is gone, is late, or sends something unexpected.
    """

    def __init__(self, sock: socket.socket, peer: str = "other side", timeout: float | None = TIMEOUT):
        self._sock, self.peer = sock, peer
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        granted = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)  # may be less than was asked for
        self._chunk = min(CHUNK, granted // 16)
        self.sent = self.received = self.rounds = 0
        self._received_last = False
        self._first = bytearray(min(FIRST, self._chunk))
        self._header = bytearray(HEADER.size)
        self.timeout = timeout

    @property
    def timeout(self) -> float | None:
        """Seconds a whole message may take; None waits for ever."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._timeout = seconds
        self._sock.settimeout(seconds)

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
        """Send and receive in lock-step; either may be None. Every error ends here, as a ChannelError."""
        if incoming is not None and (outgoing is not None or not self._received_last):
            self.rounds += 1
        self._received_last = outgoing is None
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            out_done = self._begin(tag, outgoing) if outgoing is not None else 0
            if incoming is not None:
                self._expect(tag, len(incoming))
            out_size, in_size, in_done = len(outgoing or b""), len(incoming or b""), 0
            while out_done < out_size or in_done < in_size:
                if out_done < out_size:
                    part = outgoing[out_done : out_done + self._chunk]
                    self._sock.sendall(part)
                    out_done += len(part)
                if in_done < in_size:
                    part = incoming[in_done : in_done + self._chunk]
                    self._fill(part)
                    in_done += len(part)
                self._check_time()
        except ChannelError:
            self.close()
            raise
        except TimeoutError:
            self.close()
            late = f"the {self.peer} did not go on within {self._timeout:g} s; is it still running?"
            raise ChannelError(late) from None
        except ConnectionError:  # a reset is what an end looks like where something of ours was still unread
            self.close()
            raise ChannelError(f"the {self.peer} closed the connection before it was done") from None
        except (OSError, ValueError) as error:  # ValueError: the channel was closed by another thread
            self.close()
            raise ChannelError(f"the connection to the {self.peer} broke ({_reason(error)})") from None
        self.sent += out_size
        self.received += in_size

    def _begin(self, tag: int, outgoing) -> int:
        """Send the header with as much of the payload as fits into one packet; returns how much that was."""
        head = min(len(outgoing), len(self._first) - HEADER.size)
        HEADER.pack_into(self._first, 0, tag, len(outgoing))
        self._first[HEADER.size : HEADER.size + head] = outgoing[:head]
        self._sock.sendall(memoryview(self._first)[: HEADER.size + head])
        return head

    def _expect(self, tag: int, size: int) -> None:
        self._fill(memoryview(self._header))
        got_tag, got_size = HEADER.unpack(self._header)
        if got_tag != tag:
            raise ChannelError(f"the {self.peer} sent message {got_tag} where message {tag} is due: out of order")
        if got_size != size:
            raise ChannelError(f"the {self.peer} sent message {tag} with {got_size} bytes where {size} are due")

    def _fill(self, out) -> None:
        done = 0
        while done < len(out):
            n = self._sock.recv_into(out[done:])
            if n == 0:
                raise ConnectionError
            done += n
            self._check_time()

    def _check_time(self) -> None:
        # the socket's own time-out is for one read: a sender of single bytes would never meet it
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeoutError


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
