"""Key pairs of a distributed run's parties, whose public halves all know beforehand.

    DIR/hospital-3.key    the private keys, readable by their owner only; made on that hospital's machine, never copied
    DIR/hospital-3.pub    the public key and the certificate for TLS; everybody has all of them

A party that relays messages could replace the keys that it relays by its own, and read or change everything. So the
``.pub`` files travel another way (by hand, or from each hospital's own site) and are compared by ``fingerprint``. The
first line of either file is an X25519 key, which seals messages; below it, in PEM, is what TLS needs.
"""

import hashlib
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from dopamine_lib.encryption.certificates import Credentials
from dopamine_lib.encryption.certificates import fingerprint as certificate_fingerprint
from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.links import check_different
from dopamine_lib.encryption.messages import SERVER, MessageError
from dopamine_lib.errors import InputError
from dopamine_lib.federation.arguments import Parser
from dopamine_lib.files import read_key, write_key


def party_name(number: int) -> str:
    """The name of a party, in files and on the command line.

    >>> party_name(3), party_name(SERVER)
    ('hospital-3', 'server')
    """
    return "server" if number == SERVER else f"hospital-{number}"


def party_number(name: str) -> int:
    """The inverse of ``party_name``. Raises InputError for another name."""
    kind, _, number = name.partition("-")
    if name == "server":
        return SERVER
    if kind == "hospital" and number.isdecimal() and int(number) < SERVER and name == party_name(int(number)):
        return int(number)
    raise InputError(f"party '{name}' is unknown; write 'server', or 'hospital-0', 'hospital-1' and so on")


def fingerprint(public: bytes, certificate: str = "") -> str:
    """The hash of a public key, and of the PEM certificate with it, as 32 hexadecimal digits to compare by telephone.

    >>> fingerprint(bytes(32))
    'ed882494499da0d71cc18f8fb5bcf983'
    """
    more = bytes.fromhex(certificate_fingerprint(certificate)) if certificate else b""
    return hashlib.blake2b(public + more, digest_size=16, person=b"fingerprint").hexdigest()


def fingerprints(folder: str | Path) -> dict[str, str]:
    """The fingerprint of every public key in ``folder``, by party. Raises InputError where there are none."""
    paths = sorted(Path(folder).glob("*.pub"))
    if not paths:
        raise InputError(f"{folder} holds no .pub files; get each party's from its owner")
    return {path.stem: fingerprint(*_read(path, "get it from its owner")) for path in paths}


def make_identity(folder: str | Path, name: str) -> str:
    """Make the keys of the party called ``name`` in ``folder``; returns the fingerprint of what is public of them.

    Raises InputError where it has some already: new ones would lock out every party that knows the old ones.
    """
    party_number(name)
    folder, private, tls = Path(folder), os.urandom(32), Credentials.make(name, always=True)
    public = Identity(private).public
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_key(folder / f"{name}.key", f"{private.hex()}\n".encode() + tls.key)
        write_public(folder, name, public, tls.certificate)
    except FileExistsError:
        raise InputError(f"{folder / name}.key is there already; move it away first to give {name} a new one") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
    return fingerprint(public, tls.certificate)


def identity_command(words: list[str], program: str) -> int:
    """``identity PARTY DIR`` and ``fingerprints DIR``, as all programs of parties have them; returns 0.

    program  what was called, for help and refusals
    Exits with status 2 for other words. Raises InputError as ``make_identity`` and ``fingerprints`` do.
    """
    top = Parser(prog=program)
    commands = top.add_subparsers(dest="command", required=True)
    identity = commands.add_parser("identity", help="make a party's keys, once, on its own machine")
    identity.add_argument("party", metavar="PARTY", help="server, hospital-0, hospital-1, …")
    compared = commands.add_parser("fingerprints", help="print the fingerprints of all keys, to be compared")
    for command, text in ((identity, "where PARTY.key, which stays there, and PARTY.pub go"), (compared, "the keys")):
        command.add_argument("folder", metavar="DIR", help=text)
    arguments = top.parse_args(words)
    if arguments.command == "identity":
        name, found = arguments.party, make_identity(arguments.folder, arguments.party)
        print(f"{name}: fingerprint {found}; hand {name}.pub to all other parties")
        return 0
    for name, found in fingerprints(arguments.folder).items():
        print(f"{name}: fingerprint {found}")
    return 0


def write_public(folder: Path, name: str, public: bytes, certificate: str = "") -> None:
    """Write what is public of one party's keys."""
    (folder / f"{name}.pub").write_text(f"{public.hex()}\n{certificate}", encoding="utf-8")


def read_publics(folder: str | Path, hospitals: int) -> dict[int, bytes]:
    """The public keys of the server and K hospitals, by number.

    Raises InputError for one that is missing, damaged, of low order or another party's as well.
    """
    folder, publics = Path(folder), {}
    for number in [*range(hospitals), SERVER]:
        path = folder / f"{party_name(number)}.pub"
        publics[number], _ = _read(path, "get it from its owner")
        try:
            Identity().agree(publics[number], b"usable")
        except MessageError as error:
            raise InputError(f"{path}: {error}") from None
    check_different(publics)
    return publics


def read_identity(folder: str | Path, number: int, publics: dict[int, bytes]) -> Identity:
    """A party's own key pair.

    Raises InputError where others can read the file, or where ``publics`` has another public key for the party.
    """
    path = Path(folder) / f"{party_name(number)}.key"
    remedy = f"make it here with: python -m dopamine_lib.federation.remote identity {party_name(number)} {folder}"
    identity = Identity(_read(path, remedy, read_key)[0])
    if publics[number] != identity.public:
        raise InputError(f"{path} does not belong to {path.stem}.pub beside it: the public key was replaced or is old")
    return identity


def read_certificates(folder: str | Path, hospitals: int) -> dict[int, str]:
    """The PEM certificates of the server and K hospitals, by number.

    Raises InputError for one that is missing, damaged or another party's too, and for a ``.pub`` file of an older
    version, without one.
    """
    certificates, holders = {}, {}
    for number in [*range(hospitals), SERVER]:
        path = Path(folder) / f"{party_name(number)}.pub"
        _, certificates[number] = _read(path, "get it from its owner")
        if not certificates[number]:
            raise InputError(f"{path} holds no certificate, which gRPC needs: its owner makes new keys")
        try:
            first = holders.setdefault(certificate_fingerprint(certificates[number]), path)
        except InputError:
            raise InputError(f"{path} holds a damaged certificate: get it from its owner") from None
        if first != path:
            raise InputError(f"{first} and {path} hold the same certificate: get each from its owner")
    return certificates


def read_credentials(folder: str | Path, number: int, certificates: dict[int, str]) -> Credentials:
    """A party's own key for TLS, with its certificate. Raises InputError where the two do not belong together."""
    path = Path(folder) / f"{party_name(number)}.key"
    _, pem = _read(path, "make it here", read_key)
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
        fits = key.public_key() == x509.load_pem_x509_certificate(certificates[number].encode()).public_key()
    except Exception:  # cryptography's parsers have an exception of their own for every kind of damage
        fits = False
    if not fits:
        raise InputError(f"{path} does not belong to the certificate in {path.stem}.pub beside it: one of them is old")
    return Credentials(certificates[number], pem.encode())


def _read(path: Path, remedy: str, read=Path.read_bytes) -> tuple[bytes, str]:
    """The 32 bytes of a file's first line, and what is below it."""
    try:
        first, _, rest = read(path).decode().partition("\n")
        key = bytes.fromhex(first)
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error.strerror}); {remedy}") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise InputError(f"{path} holds no key of 64 hexadecimal digits; {remedy}")
    return key, rest.strip() + "\n" if rest.strip() else ""
