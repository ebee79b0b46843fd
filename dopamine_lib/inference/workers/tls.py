"""Mutual TLS 1.3 between workers that know each other's certificates beforehand.

Each worker makes a key pair and a certificate signed by itself. The certificates, which are public, reach the
others by a way that people trust (a file from colleague to colleague, its fingerprint read out on the phone).
From then on a worker talks only to holders of the keys of the certificates it was given: no authority, no name
and no password is involved, and a stranger is turned away before a byte of the protocol is sent.
"""

import contextlib
import datetime
import hashlib
import os
import socket
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dopamine_lib.errors import InputError
from dopamine_lib.files import read_key, write_key
from dopamine_lib.inference.protocols.channel import TIMEOUT, ChannelError, SocketChannel

CONNECT_TIMEOUT = 10.0  # seconds for reaching a worker and for the whole TLS handshake
#: From when to when a certificate is valid that outlives no process: without an end (RFC 5280, section 4.1.2.5).
ALWAYS = (datetime.datetime(1970, 1, 2), datetime.datetime(9999, 12, 31, 23, 59, 59))
LIFETIME = datetime.timedelta(days=365)
#: The clocks of three machines may differ. Certificates are pinned one by one, so their dates protect nobody.
BACKDATED = datetime.timedelta(days=1)

_EXPIRED = 10  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED

#: Host and port.
Address = tuple[str, int]
#: A worker that others connect to: its address and its PEM certificate.
Endpoint = tuple[Address, str]


@dataclass(frozen=True)
class Credentials:
    """A worker's private key and its certificate, both PEM. The key is left out of ``repr``."""

    certificate: str
    key: bytes = field(repr=False)

    @classmethod
    def make(cls, name: str, *, always: bool = False) -> "Credentials":
        """A new P-256 key and a certificate for it, signed by itself; ``name`` is for human readers only.

        always  valid whatever the clock says, for workers that end with the process that started them: machines without
                a battery begin in 1970, and when their clock is set, a page that runs must go on
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        begin, end = ALWAYS if always else (now - BACKDATED, now + LIFETIME)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(certificate.public_bytes(serialization.Encoding.PEM).decode(), pem)

    @classmethod
    def at(cls, path: str | Path, name: str) -> "Credentials":
        """The credentials kept at ``path``, made there if there are none, readable by their owner only.

        The certificate for the others is written beside them, as ``path`` with the ending ``.crt``.
        Raises InputError for a file without credentials, one that others may read, or one that cannot be made there.
        """
        path = Path(path)
        beside = path.with_suffix(".crt")
        try:
            if not path.exists():
                if beside == path or beside.exists():
                    raise InputError(f"{beside} is where the certificate of --identity {path} goes: name another file")
                made = cls.make(name)
                write_key(path, made.key + made.certificate.encode())
                beside.write_text(made.certificate, encoding="utf-8")
                return made
            pem = read_key(path)
        except OSError as error:
            raise InputError(f"--identity {path} cannot be used ({error.strerror}); name another file") from error
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            key = serialization.load_pem_private_key(pem, password=None)
        except Exception as error:  # cryptography's parsers have an exception of their own for every kind of damage
            raise InputError(
                f"{path} does not hold a private key and its certificate; name a file that does, or a new one"
            ) from error
        if certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
            raise InputError(
                f"{path}: the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}; move the file and "
                f"{beside.name} away, and new ones are made, then hand out the new {beside.name}"
            )
        if key.public_key() != certificate.public_key():
            raise InputError(
                f"{path}: the key does not belong to the certificate; move the file away, and it is made again"
            )
        begin = pem.index(b"-----BEGIN CERTIFICATE-----")
        return cls(pem[begin:].decode(), pem[:begin])

    @property
    def fingerprint(self) -> str:
        """See ``fingerprint``."""
        return fingerprint(self.certificate)


def fingerprint(certificate: str) -> str:
    """SHA-256 of a PEM certificate, in hexadecimal. Raises InputError where the text is not a certificate."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.strip())).hexdigest()
    except ValueError as error:
        raise InputError("this is not a certificate in PEM; give the .crt file that the other worker wrote") from error


def read_certificate(path: str | Path) -> str:
    """The PEM certificate in a file. Raises InputError for a missing file and for one with anything else in it."""
    try:
        certificate = Path(path).read_text(encoding="utf-8")
        until = x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc
        fingerprint(certificate)
    except OSError as error:
        raise InputError(f"certificate {path} cannot be read ({error.strerror}); ask the other worker for it") from None
    except Exception:  # as above
        raise InputError(f"{path} is not a PEM certificate; give the .crt file that the other worker wrote") from None
    if until < datetime.datetime.now(datetime.UTC):
        raise InputError(f"certificate {path} expired on {until:%Y-%m-%d}; ask the other worker for its new one")
    return certificate


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
    except OSError as error:
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
        except OSError as error:
            raise InputError(
                f"cannot listen on {address[0]}:{address[1]} ({error.strerror}); choose another address or port"
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
