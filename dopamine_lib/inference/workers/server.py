"""A worker that others connect to: one thread per connection, so that a rude client hurts nobody but itself.

A client that says nothing, sends garbage, stops halfway or is killed costs its own connection, which ends when its
time is up at the latest. Those who have yet to show who they are, and so may be anybody, are counted apart from those
let in: strangers can keep one another out, but nobody who is known. Of the known, one alone cannot take all places.
"""

import contextlib
import logging
import socket
import threading
import time
from collections import Counter

from dopamine_lib.encryption.certificates import Credentials, fingerprint
from dopamine_lib.inference.protocols.channel import Channel, ChannelError
from dopamine_lib.inference.workers.tls import Address, Listener

log = logging.getLogger("dopamine.inference")

#: Connections of known peers at once, and of one patient; more are closed unheard.
MAX_CONNECTIONS, MAX_OF_ONE = 64, 16
#: Handshakes at once. For one more, the oldest of the address that has most of them is broken off, but none before it
#: had ``GRACE`` seconds: a handshake takes a few round trips, and silence takes as long as it may.
MAX_HANDSHAKES, GRACE = 64, 0.25


class ThreadingServer:
    """The accepting side; a subclass says in ``talk`` what is done with a channel.

    role    its name in the log
    peers   PEM certificates of the workers let in, by the name that ``talk`` is given
    """

    role = "server"

    def __init__(self, address: Address, credentials: Credentials, peers: dict[str, str]):
        self._listener = Listener(address, credentials, peers)
        self.address = self._listener.address
        self.fingerprints = {name: bytes.fromhex(fingerprint(certificate)) for name, certificate in peers.items()}
        self._lock = threading.Lock()
        self._handshakes: dict[socket.socket, tuple[str, float]] = {}  # address, and when it began; oldest first
        self._open: Counter[str] = Counter()  # connections of each known peer
        self._channels, self._threads = set(), set()
        self._closed = False

    def talk(self, channel: Channel, name: str) -> None:
        """Serve one authenticated connection to its end; may raise ChannelError."""
        raise NotImplementedError

    def serve_forever(self) -> None:
        """Take connections until ``close``."""
        while True:
            try:
                raw = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                continue  # the client was gone before it was taken
            self._make_room()
            if self._closed:
                raw.close()
                return
            handle = raw.dup()  # TLS takes the socket over; this ends it from here
            thread = threading.Thread(target=self._connection, args=(raw, handle), daemon=True)
            with self._lock:
                self._handshakes[handle] = _host(raw), time.monotonic()
                self._threads.add(thread)
            thread.start()

    def _make_room(self) -> None:
        """Wait until one more handshake may begin, and break an old one off for it where there are too many."""
        while not self._closed:
            with self._lock:
                if len(self._handshakes) < MAX_HANDSHAKES:
                    return
                ((busiest, _),) = Counter(host for host, _ in self._handshakes.values()).most_common(1)
                oldest = next(handle for handle, (host, _) in self._handshakes.items() if host == busiest)
                left = self._handshakes[oldest][1] + GRACE - time.monotonic()
                if left <= 0:
                    del self._handshakes[oldest]
                    with contextlib.suppress(OSError):  # the client is gone already
                        oldest.shutdown(socket.SHUT_RDWR)  # its thread notices, and closes it
            if left > 0:
                time.sleep(min(left, GRACE / 10))

    def quota(self, name: str) -> int:
        """Connections that a known peer may have at once."""
        return MAX_OF_ONE

    def start(self) -> "ThreadingServer":
        """Serve from a thread of its own; returns itself."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def close(self, patience: float = 5.0) -> None:
        """Take no more connections, break those that are open, and wait for their threads."""
        self._closed = True
        self._listener.close()
        with self._lock:
            channels, threads = list(self._channels), list(self._threads)
            for handle in self._handshakes:
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)
        for channel in channels:
            channel.close()
        for thread in threads:
            thread.join(patience)

    def __enter__(self) -> "ThreadingServer":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _connection(self, raw: socket.socket, handle: socket.socket) -> None:
        name, channel, counted = "client", None, False
        try:
            try:
                channel, name = self._listener.welcome(raw)
            finally:
                with self._lock:
                    self._handshakes.pop(handle, None)
                    handle.close()
            with self._lock:
                counted = self._open[name] < self.quota(name) and self._open.total() < MAX_CONNECTIONS
                self._open[name] += counted
                self._channels.add(channel)
            if not counted:
                raise ChannelError(f"has {self.quota(name)} connections already, or all have {MAX_CONNECTIONS}")
            if not self._closed:
                self.talk(channel, name)
        except ChannelError as error:
            if not self._closed:
                log.warning("%s: %s: %s", self.role, name, error)
        except Exception as error:  # one connection's fault must not end the others'; its values stay out of the log
            log.error("%s: %s: %s in this connection", self.role, name, type(error).__name__)
        finally:
            if channel is not None:
                channel.close()
            with self._lock:
                self._channels.discard(channel)
                self._threads.discard(threading.current_thread())
                self._open[name] -= counted


def _host(raw: socket.socket) -> str:
    """The address at the other end; empty where it is gone already, which its handshake will find out."""
    try:
        return raw.getpeername()[0]
    except OSError:
        return ""
