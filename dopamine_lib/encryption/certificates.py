"""Certificates that are pinned: key pairs for mutual TLS between parties that know each other's beforehand.

Each party makes a key pair and a certificate signed by itself. The certificates, which are public, reach the others by
a way that people trust (a file from colleague to colleague, its fingerprint read out on the phone). No authority, no
name and no password is involved. ``inference.workers.tls`` and ``federation.remote`` stand on them.
"""

import datetime
import hashlib
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dopamine_lib.errors import InputError
from dopamine_lib.files import read_key, write_key

#: From when to when a certificate is valid that outlives no process: without an end (RFC 5280, section 4.1.2.5).
ALWAYS = (datetime.datetime(1970, 1, 2), datetime.datetime(9999, 12, 31, 23, 59, 59))
LIFETIME = datetime.timedelta(days=365)
#: The clocks of three machines may differ. Certificates are pinned one by one, so their dates protect nobody.
BACKDATED = datetime.timedelta(days=1)


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
