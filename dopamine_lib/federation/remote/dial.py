"""A hospital's end of gRPC: it dials the server, and calls again when a connection was lost.

Each call may be repeated (``wires.relay``), so that a line that breaks within a round costs a moment and nothing else;
and a server that is started again finds its hospitals calling.
"""

import os
import time
from collections.abc import Callable

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

from dopamine_lib.encryption.certificates import Credentials
from dopamine_lib.encryption.messages import MessageError, unpack_numbers
from dopamine_lib.federation.remote.service import CALL, SENDER, SERVICE, options
from dopamine_lib.federation.wires.relay import Refused, Seat
from dopamine_lib.federation.wires.wire import SessionOver, Silence

#: What a call is repeated after: the line was lost, or the server is not there yet.
_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)
#: What gRPC says to a call beyond ``maximum_concurrent_rpcs``; its status is that of a message that is too long.
_BUSY = "Concurrent RPC limit exceeded!"
_PAUSE = 0.2  # seconds between two tries


class Dialled:
    """One life of a hospital: the relay's calls, made to a server elsewhere.

    address      the server's, HOST:PORT
    credentials  the hospital's key and certificate
    certificate  the server's, in PEM
    limit        bytes of the longest message
    patience     seconds for which a server that cannot be reached is called again
    say          is told, in a line, that it cannot be reached, and that it can be again
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        certificate: str,
        limit: int,
        patience: float,
        say: Callable[[str], object] = lambda line: None,
    ):
        self.instance, self._address, self._patience, self._say = os.urandom(16), address, patience, say
        trust = grpc.ssl_channel_credentials(certificate.encode(), credentials.key, credentials.certificate.encode())
        more = [
            ("grpc.ssl_target_name_override", "server"),  # the certificate is pinned; addresses may change
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = grpc.secure_channel(address, trust, [*options(limit), *more])
        self._calls = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in ("join", "put", "get")}
        self._unreachable = self._hung_up = False

    def join(self) -> Seat | None:
        """As ``hospital_end.Calls.join``."""
        answer = self._call("join", bytes(16), 0, 0)
        return Seat(answer[:16], unpack_numbers(answer[16:])) if answer else None

    def put(self, session: bytes, count: int, peer: int, message: bytes) -> None:
        """As ``hospital_end.Calls.put``."""
        self._call("put", session, count, peer, message)

    def get(self, session: bytes, count: int) -> tuple[int, bytes] | None:
        """As ``hospital_end.Calls.get``."""
        answer = self._call("get", session, count, 0)
        return (SENDER.unpack_from(answer)[0], answer[SENDER.size :]) if answer else None

    def close(self) -> None:
        """Hang up."""
        self._hung_up = True
        self._channel.close()

    def _call(self, name: str, session: bytes, count: int, peer: int, message: bytes = b"") -> bytes:
        request, end = CALL.pack(self.instance, session, count, peer) + message, time.monotonic() + self._patience
        while True:
            try:
                answer = self._calls[name](request, timeout=self._patience)
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
                if self._hung_up or isinstance(error, ValueError):
                    raise SessionOver("this hospital has hung up") from None
                code, said = error.code(), (error.details() or "").partition("\n")[0]
                if code == grpc.StatusCode.ABORTED:
                    raise SessionOver(said) from None
                if code == grpc.StatusCode.FAILED_PRECONDITION:
                    raise Refused(said) from None
                if code not in _AGAIN and said != _BUSY:
                    raise MessageError(f"the server at {self._address} refuses a call: {said}") from None
            else:
                if self._unreachable:
                    self._unreachable = False
                    self._say(f"the server at {self._address} answers again")
                return answer
            if time.monotonic() > end:
                raise Silence(f"the server at {self._address} was not reached for {self._patience:g} s: {said}")
            if not self._unreachable:
                self._unreachable = True
                patience = f"calling it for {self._patience:g} s"
                self._say(f"the server at {self._address} cannot be reached ({said[:100]}); {patience}")
            time.sleep(_PAUSE)
