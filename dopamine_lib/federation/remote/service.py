"""The server's port: the relay's three calls over gRPC, for the holders of certificates that it knows.

TLS is mutual, and certificates are pinned (``encryption.certificates``): a stranger's handshake fails, within ten
seconds, and nothing of what it sends is read. A caller's number is that of its certificate, whatever it says. Requests
are bytes: an instance, a session, a number, a peer, and a sealed message no longer than the plan's longest.
"""

import os
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes several lines for every stranger
import grpc

from dopamine_lib.encryption.certificates import Credentials, fingerprint
from dopamine_lib.encryption.messages import pack_numbers
from dopamine_lib.errors import InputError
from dopamine_lib.federation.wires.relay import Refused, Relay
from dopamine_lib.federation.wires.wire import SessionOver

SERVICE = "dopamine.Relay"
#: Instance, session, the message's number in it, and for whom it is.
CALL = struct.Struct("<16s16sQH")
SENDER = struct.Struct("<H")
#: Calls that one hospital may have under way: join or put, and get; twice, for those that were cut off.
MOST_CALLS = 4
KEEPALIVE_MS = 10_000


def longest_message(d: int) -> int:
    """Bytes of the longest call for a model of d parameters: a ciphertext of the widest layout, or a whole state."""
    return 64 * d + 2**20


def most_bytes(d: int) -> int:
    """Bytes that may be under way from a hospital to another party: keys or a state, and what is small."""
    return 2 * longest_message(d)


def options(limit: int) -> list[tuple[str, int]]:
    """What both ends of a channel need: the longest message, and pings that find a connection that is dead."""
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class Service(grpc.GenericRpcHandler):
    """A relay that is called from other machines.

    relay         the boxes
    address       host and port to listen on; port 0 takes a free one, which ``address`` then names
    credentials   the server's key and certificate
    certificates  the hospitals' PEM certificates, by number
    limit         bytes of the longest message
    lost_after    seconds without a connection after which a hospital is lost
    Raises InputError where the address is taken or is none.
    """

    def __init__(
        self,
        relay: Relay,
        address: str,
        credentials: Credentials,
        certificates: dict[int, str],
        limit: int,
        lost_after: float,
    ):
        self._relay, self._lost_after = relay, lost_after
        self._numbers = {fingerprint(pem): number for number, pem in certificates.items()}
        self._here: dict[tuple[int, bytes], list] = {}  # of each life of a hospital: calls under way, and the last time
        self._lock, self._closed = threading.Lock(), threading.Event()
        calls = {"join": self._join, "put": self._put, "get": self._get}
        self._handlers = {
            f"/{SERVICE}/{name}": grpc.unary_unary_rpc_method_handler(self._answered(call))
            for name, call in calls.items()
        }
        more = [
            ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_concurrent_streams", 2 * MOST_CALLS),
            ("grpc.so_reuseport", 0),
        ]
        most = 2 * MOST_CALLS * len(certificates) + 4
        pool, both = ThreadPoolExecutor(most, thread_name_prefix="call"), [*options(limit), *more]
        # calls beyond that are refused before they are read
        self._server = grpc.server(pool, handlers=[self], options=both, maximum_concurrent_rpcs=most)
        own = [(credentials.key, credentials.certificate.encode())]
        roots = "".join(certificates.values()).encode()
        try:
            port = self._server.add_secure_port(
                address, grpc.ssl_server_credentials(own, roots, require_client_auth=True)
            )
        except RuntimeError:
            port = 0
        if not port:
            raise InputError(f"cannot listen on {address}: it is taken, or no HOST:PORT of this machine; name another")
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._server.start()
        threading.Thread(target=self._watch, name="who is lost", daemon=True).start()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The method that is called, if there is one."""
        return self._handlers.get(handler_call_details.method)

    def close(self) -> None:
        """Answer no more calls."""
        self._closed.set()
        self._server.stop(1).wait()

    def _join(self, number: int, instance: bytes, session: bytes, count: int, peer: int, message: bytes) -> bytes:
        seat = self._relay.join(number, instance)
        return b"" if seat is None else seat.session + pack_numbers(seat.members)

    def _put(self, number: int, instance: bytes, session: bytes, count: int, peer: int, message: bytes) -> bytes:
        self._relay.put(number, instance, session, count, peer, message)
        return b""

    def _get(self, number: int, instance: bytes, session: bytes, count: int, peer: int, message: bytes) -> bytes:
        found = self._relay.get(number, instance, session, count)
        return b"" if found is None else SENDER.pack(found[0]) + found[1]

    def _answered(self, call):
        """``call`` for a request of bytes, with its refusals as gRPC's."""

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            (pem,) = context.auth_context()["x509_pem_cert"]
            number = self._numbers.get(fingerprint(pem.decode()))
            if number is None or len(request) < CALL.size:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "this certificate is no hospital's of this run")
            instance, session, count, peer = CALL.unpack_from(request)
            if not self._enters(number, instance, context):
                context.abort(grpc.StatusCode.UNAVAILABLE, f"hospital {number} makes too many calls at once")
            try:
                return call(number, instance, session, count, peer, request[CALL.size :])
            except SessionOver as over:
                code, said = grpc.StatusCode.ABORTED, str(over)
            except Refused as refused:
                code, said = grpc.StatusCode.FAILED_PRECONDITION, str(refused)
            context.abort(code, said)

        return answer

    def _enters(self, number: int, instance: bytes, context: grpc.ServicerContext) -> bool:
        """Note a call that is under way until it is answered or its connection is lost."""

        def leaves() -> None:
            with self._lock:
                if (number, instance) in self._here:
                    self._here[number, instance] = [self._here[number, instance][0] - 1, time.monotonic()]

        with self._lock:
            if sum(calls for (k, _), (calls, _) in self._here.items() if k == number) >= MOST_CALLS:
                return False
            calls, _ = self._here.get((number, instance), (0, 0.0))
            self._here[number, instance] = [calls + 1, time.monotonic()]
        if not context.add_callback(leaves):
            leaves()
        return True

    def _watch(self) -> None:
        """In a thread: tell the relay who cannot be reached any more."""
        while not self._closed.wait(0.1):
            now = time.monotonic()
            with self._lock:
                lost = [who for who, (calls, last) in self._here.items() if not calls and now - last > self._lost_after]
                for who in lost:
                    del self._here[who]
            for number, instance in lost:
                self._relay.gone(number, instance, f"has had no connection for {self._lost_after:g} s")


def check_address(address: str, what: str) -> str:
    """``address`` if it is HOST:PORT. Raises InputError for anything else; ``what`` names it."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"{what} is {address}, but must be HOST:PORT, as 127.0.0.1:50051")
    return address
