"""A worker that others connect to: one thread per connection, so that a rude client hurts nobody but itself.

A client that says nothing, sends garbage, stops halfway or is killed costs its own connection, which ends when its
time is up at the latest. While ``MAX_CONNECTIONS`` are open, new ones are closed unheard.
"""

import logging
import threading

from dopamine_lib.inference.protocols.channel import Channel, ChannelError
from dopamine_lib.inference.workers.tls import Address, Credentials, Listener, fingerprint

log = logging.getLogger("dopamine.inference")

MAX_CONNECTIONS = 64


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
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
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
            if not self._slots.acquire(blocking=False):
                log.warning("%s: too many connections, one turned away", self.role)
                raw.close()
                continue
            thread = threading.Thread(target=self._connection, args=(raw,), daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()

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
        for channel in channels:
            channel.close()
        for thread in threads:
            thread.join(patience)

    def __enter__(self) -> "ThreadingServer":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _connection(self, raw) -> None:
        name, channel = "client", None
        try:
            channel, name = self._listener.welcome(raw)
            with self._lock:
                self._channels.add(channel)
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
            self._slots.release()
