"""Mutual TLS 1.3 between workers that know each other's certificates beforehand.

Each worker makes a key pair and a certificate signed by itself. The certificates, which are public, reach the
others by a way that people trust (a file from colleague to colleague, its fingerprint read out on the phone).
From then on a worker talks only to holders of the keys of the certificates it was given: no authority, no name
and no password is involved, and a stranger is turned away before a byte of the protocol is sent.
"""

import contextlib
import hashlib
import os
import socket
import ssl
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from dopamine_lib.encryption.certificates import Credentials, fingerprint
from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.channel import TIMEOUT, ChannelError, SocketChannel

CONNECT_TIMEOUT = 10.0  # seconds for reaching a worker and for the whole TLS handshake
_EXPIRED = 10  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED

#: Host and port.
Address = tuple[str, int]
#: A worker that others connect to: its address and its PEM certificate.
Endpoint = tuple[Address, str]


def _context(credentials: Credentials, certificates, server: bool) -> ssl.SSLContext:
    """TLS 1.3 only, and nobody but the holders of these certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # certificates are pinned; names and addresses may change
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        context.num_tickets = 0  # no session is ever resumed
    for certificate in certificates:
        context.load_verify_locations(cadata=certificate)
    # the ssl module reads keys from files only: this one is gone at once, and encrypted as long as it is there
    password = os.urandom(32).hex().encode()
    key = serialization.load_pem_private_key(credentials.key, password=None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "credentials.pem")
        file.write_bytes(key + credentials.certificate.encode())
        context.load_cert_chain(file, password=password)
    return context


def connect(
    address: Address, credentials: Credentials, certificate: str, peer: str, timeout: float | None = TIMEOUT
) -> SocketChannel:
    """A channel to the worker at ``address`` (host, port), which must hold the key of ``certificate``.

    peer  its role, for errors. Raises ChannelError where nobody answers there, or somebody else does.
    """
    context = _context(credentials, [certificate], server=False)
    try:
        raw = socket.create_connection(address, CONNECT_TIMEOUT)
    except (OSError, UnicodeError) as error:  # the second for what cannot be a name, such as "a..b"
        why = getattr(error, "strerror", None) or "no answer"
        raise ChannelError(f"the {peer} cannot be reached at {address[0]}:{address[1]} ({why})") from None
    return _handshake(raw, context, {fingerprint(certificate): peer}, timeout, server=False)[0]


class Listener:
    """The listening side of a worker that others connect to.

    address      (host, port); port 0 takes a free one, which ``address`` then names
    peers        certificates of the workers let in, by name; a name may be any text

    ``accept`` only takes the connection; ``welcome``, which may wait for a slow or silent client, belongs in the
    thread that serves it, so that nobody else waits.
    """

    def __init__(self, address: Address, credentials: Credentials, peers: dict[str, str]):
        self._context = _context(credentials, peers.values(), server=True)
        self._names = {fingerprint(certificate): name for name, certificate in peers.items()}
        try:
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            self._sock = socket.create_server(address, family=family, backlog=64)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", error)
            raise InputError(
                f"cannot listen on {address[0]}:{address[1]} ({why}); choose another address or port"
            ) from None
        self.address = self._sock.getsockname()[:2]

    def accept(self) -> socket.socket:
        """The next connection, from a client not yet known. Raises OSError after ``close``."""
        return self._sock.accept()[0]

    def welcome(self, raw: socket.socket, timeout: float | None = TIMEOUT) -> tuple[SocketChannel, str]:
        """Shake hands: the channel and the client's name. Raises ChannelError for a stranger."""
        return _handshake(raw, self._context, self._names, timeout, server=True)

    def close(self) -> None:
        """Let no more clients in."""
        # close alone does not wake a thread that waits in accept
        with contextlib.suppress(OSError):  # not every system shuts a listening socket down
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _handshake(raw, context, names: dict[str, str], timeout, server: bool):
    """Wrap a connected socket; returns (channel, name of the peer by its fingerprint)."""
    role = "client" if server else next(iter(names.values()))
    try:
        raw.settimeout(CONNECT_TIMEOUT)
        sock = context.wrap_socket(raw, server_side=server)
    except (OSError, ValueError) as error:
        raw.close()
        reason = getattr(error, "reason", None) or type(error).__name__
        if getattr(error, "verify_code", None) == _EXPIRED or "EXPIRED" in reason:
            whose = (
                f"the {role}'s certificate" if isinstance(error, ssl.SSLCertVerificationError) else "the certificate"
            )
            raise ChannelError(
                f"no TLS with the {role}: {whose} has expired; its owner moves the files away, so that new ones are "
                "made, and hands out the new certificate"
            ) from None
        why = reason.lower().replace("_", " ")
        raise ChannelError(f"no TLS with the {role} ({why}); have certificates been exchanged?") from None
    name = names.get(hashlib.sha256(sock.getpeercert(binary_form=True)).hexdigest())
    if name is None:
        sock.close()
        raise ChannelError(f"the {role} has a certificate other than the one given for it")
    return SocketChannel(sock, name, timeout), name
