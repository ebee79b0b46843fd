"""Key pairs of a distributed run's parties, whose public halves all know beforehand.

    DIR/hospital-3.key    the private key, readable by its owner only; made on that hospital's machine, never copied
    DIR/hospital-3.pub    the public key; everybody has all of them

A party that relays messages could replace the keys that it relays by its own, and read or change everything. So the
``.pub`` files travel another way (by hand, or from each hospital's own site) and are compared by ``fingerprint``.
"""

import hashlib
import os
from pathlib import Path

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.links import check_different
from dopamine_lib.encryption.messages import SERVER, MessageError
from dopamine_lib.errors import InputError
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


def fingerprint(public: bytes) -> str:
    """A public key's hash as 32 hexadecimal digits, to compare by telephone.

    >>> fingerprint(bytes(32))
    'ed882494499da0d71cc18f8fb5bcf983'
    """
    return hashlib.blake2b(public, digest_size=16, person=b"fingerprint").hexdigest()


def fingerprints(folder: str | Path) -> dict[str, str]:
    """The fingerprint of every public key in ``folder``, by party. Raises InputError where there are none."""
    paths = sorted(Path(folder).glob("*.pub"))
    if not paths:
        raise InputError(f"{folder} holds no .pub files; get each party's from its owner")
    return {path.stem: fingerprint(_read_key(path, "get it from its owner")) for path in paths}


def make_identity(folder: str | Path, name: str) -> str:
    """Make the key pair of the party called ``name`` in ``folder``; returns the fingerprint of its public key.

    Raises InputError where it has one already: a new one would lock out every party that knows the old one.
    """
    party_number(name)
    folder, private = Path(folder), os.urandom(32)
    public = Identity(private).public
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_key(folder / f"{name}.key", f"{private.hex()}\n".encode())
        write_public(folder, name, public)
    except FileExistsError:
        raise InputError(f"{folder / name}.key is there already; move it away first to give {name} a new one") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
    return fingerprint(public)


def write_public(folder: Path, name: str, public: bytes) -> None:
    """Write one party's public key."""
    (folder / f"{name}.pub").write_text(public.hex() + "\n", encoding="utf-8")


def read_publics(folder: str | Path, hospitals: int) -> dict[int, bytes]:
    """The public keys of the server and K hospitals, by number.

    Raises InputError for one that is missing, damaged, of low order or another party's as well.
    """
    folder, publics = Path(folder), {}
    for number in [*range(hospitals), SERVER]:
        path = folder / f"{party_name(number)}.pub"
        publics[number] = _read_key(path, "get it from its owner")
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
    remedy = f"make it here with: python -m dopamine_lib.federation.mpi identity {party_name(number)} {folder}"
    identity = Identity(_read_key(path, remedy, read_key))
    if publics[number] != identity.public:
        raise InputError(f"{path} does not belong to {path.stem}.pub beside it: the public key was replaced or is old")
    return identity


def _read_key(path: Path, remedy: str, read=Path.read_bytes) -> bytes:
    try:
        key = bytes.fromhex(read(path).decode())
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error.strerror}); {remedy}") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise InputError(f"{path} holds no key of 64 hexadecimal digits; {remedy}")
    return key
