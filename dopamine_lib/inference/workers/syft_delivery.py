"""Delivery by syft 0.10: sealed files between peers that approved each other. syft carries, the kit computes.

The paper names the PySyft of its time, which computed on additive shares. Today's has no secure computation: it
synchronises files between the datasites of peers over a shared drive, end-to-end encrypted, each for the readers that
its owner names. That fits what is sent once (seeds, fingerprints of certificates, shares of model, image and result),
not the hundred rounds of a query: a message takes a tenth of a second, and every later synchronisation reads it again.

    with Drive() as drive:                         syft's in-memory stand-in for the drive: offline, within one process
        patient, crypto_provider = drive.join("patient"), drive.join("crypto-provider")
        introduce(patient, crypto_provider)        one asks, the other approves
        crypto_provider.allow(patient)             one folder, readable by one peer
        crypto_provider.send(patient, SEED, seed)
        patient.receive(crypto_provider, SEED)

A peer writes in its own datasite only. syft seals a message for its reader, but would deliver an old one again: so
each message names its sender, its reader and its number. The in-memory drive is a test double: it shows what goes
where, and locks out nobody in this process. Some names used here belong to syft's own tests, hence the exact pin.
"""

import base64
import contextlib
import hashlib
import io
import os
import re
import struct
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

os.environ.setdefault("PRE_SYNC", "false")  # else syft synchronises whenever one of its attributes is read

from syft.sync.connections.drive.gdrive_transport import GDriveConnection
from syft.sync.connections.drive.mock_drive_service import MockDriveBackingStore, MockDriveService
from syft.sync.syftbox_manager import SyftboxManager, SyftboxManagerConfig
from syft_perms import SyftPermContext

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.channel import Channel, ChannelError

PAUSE, TIMEOUT = 0.05, 30.0  # seconds between two looks into the folder, and until a receiver gives up
#: A file begins with sender and reader (16 bytes), tag, number of the message, number of the part, count of parts.
_HEADER = struct.Struct("<16sIIII")
MAX_BYTES = 10**6 - _HEADER.size  # of a message per file: syft handles files well up to a megabyte
_GZIP, _BASE64 = b"\x1f\x8b", re.compile(rb"(?:[A-Za-z0-9+/]{4}){8,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_ONE_AT_A_TIME = threading.RLock()  # the in-memory drive and redirected output serve one thread


class Drive:
    """The shared drive, and the peers' folders in a temporary directory that ``close`` removes.

    encrypted  False, syft's own default, shows what the drive's owner would read then
    """

    def __init__(self, encrypted: bool = True):
        self.encrypted = encrypted
        self.store = MockDriveBackingStore()
        self._temporary = tempfile.TemporaryDirectory(prefix="dopamine-syft-")
        self.folder = Path(self._temporary.name)
        self.session = os.urandom(16)

    def join(self, name: str) -> "Peer":
        """A new peer with a datasite and keys of its own."""
        return Peer(name, self, self.folder)

    def shows(self, secret: bytes) -> bool:
        """Whether the drive's owner finds these bytes in a file, in an archive, or in the base64 within one."""
        texts = [text for file in self.store.files.values() for text in _unpacked(file.content)]
        decoded = [base64.b64decode(found) for text in texts for found in _BASE64.findall(text)]
        return any(secret in text for text in texts + decoded)

    def close(self) -> None:
        """Remove the peers' folders; may be called twice."""
        self._temporary.cleanup()

    def __enter__(self) -> "Drive":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Peer:
    """One worker's datasite. ``files`` are those it holds: its own, and those it was allowed to read."""

    def __init__(self, name: str, drive: Drive, folder: Path):
        self.name, self.email, self._drive = name, f"{name}@kit.test", drive
        self._sent, self._received = {}, {}
        config = SyftboxManagerConfig._base_config_for_testing(
            email=self.email,
            syftbox_folder=folder / name,
            write_files=True,
            has_do_role=True,
            has_ds_role=True,
            use_in_memory_cache=False,
            check_versions=True,
        )
        config.peer_manager_config.use_encryption = drive.encrypted
        with _quietly():
            self._syft = SyftboxManager.from_config(config)
            self._syft._add_connection(
                GDriveConnection.from_service(self.email, MockDriveService(drive.store, self.email))
            )
            self._syft.peer_manager.write_own_version()

    def allow(self, reader: "Peer") -> None:
        """Open a folder of this datasite to one reader; messages to it lie there."""
        folder = self._outbox(reader)
        folder.mkdir(exist_ok=True)
        with _quietly():
            SyftPermContext(datasite=folder.parent).open(f"{folder.name}/").grant_read_access(reader.email)

    def send(self, reader: "Peer", tag: int, data: bytes | np.ndarray) -> None:
        """Leave a message for a reader and synchronise. Raises InputError where the reader was not allowed before."""
        folder, content = self._outbox(reader), memoryview(data).cast("B")
        if not folder.is_dir():
            raise InputError(f"{self.name} has no folder that {reader.name} may read; call allow first")
        number = self._sent[reader.name] = self._sent.get(reader.name, -1) + 1
        parts = [content[at : at + MAX_BYTES] for at in range(0, len(content), MAX_BYTES)] or [content]
        with _quietly():
            for i, part in enumerate(parts):
                header = _HEADER.pack(self._address(self, reader), tag, number, i, len(parts))
                (folder / _file_name(number, i)).write_bytes(header + part)
            self.synchronise()

    def receive(self, sender: "Peer", tag: int, timeout: float = TIMEOUT) -> bytes:
        """The next message from a sender, which must have this tag.

        Raises ChannelError where none comes in time, or another than the one due.
        """
        number = self._received.get(sender.name, -1) + 1
        whole, part, parts = b"", 0, 1
        while part < parts:
            content = self._await(self._inbox(sender) / _file_name(number, part), sender, timeout)
            header, content = content[: _HEADER.size], content[_HEADER.size :]
            parts = _HEADER.unpack(header)[4] if len(header) == _HEADER.size else 0
            if header != _HEADER.pack(self._address(sender, self), tag, number, part, parts) or part >= parts:
                raise ChannelError(f"{sender.name} sent {self.name} another message than number {number}, tag {tag}")
            whole, part = whole + content, part + 1
        self._received[sender.name] = number
        return whole

    def synchronise(self) -> None:
        """Publish what is new here, and fetch what this peer may read."""
        with _quietly():
            self._syft.sync(auto_checkpoint=False, auto_compact=False)

    @property
    def files(self) -> list[str]:
        """The messages this peer holds, as SENDER/to_READER/NUMBER-PART."""
        found = self._syft.syftbox_folder.glob("*/to_*/*.bin")
        return sorted(str(path.relative_to(self._syft.syftbox_folder)) for path in found)

    def _await(self, path: Path, sender: "Peer", timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while not path.exists():
            self.synchronise()
            if not path.exists():
                if time.monotonic() > deadline:
                    raise ChannelError(
                        f"nothing for {self.name} from {sender.name}: has it approved, allowed and sent?"
                    )
                time.sleep(PAUSE)
        return path.read_bytes()

    def _address(self, sender: "Peer", reader: "Peer") -> bytes:
        text = f"{sender.email} {reader.email}".encode()
        return hashlib.blake2b(text, key=self._drive.session, digest_size=16).digest()

    def _outbox(self, reader: "Peer") -> Path:
        return self._syft.syftbox_folder / self.email / f"to_{reader.name}"

    def _inbox(self, sender: "Peer") -> Path:
        return self._syft.syftbox_folder / sender.email / f"to_{self.name}"

    def __repr__(self):
        return f"Peer({self.name!r})"


def introduce(one: Peer, other: Peer) -> None:
    """``one`` asks to be a peer of ``other``, which approves: both know each other's public key from then on."""
    with _quietly():
        one._syft.add_peer(other.email, verbose=False, sync=False)
        other._syft.load_peers()
        other._syft.approve_peer_request(one.email, verbose=False)
        one._syft.load_peers()


class ByPost:
    """A Channel that sends messages with certain tags by syft, and all others through another channel.

    channel       for all others: the rounds
    mine, theirs  this party's peer and the other's
    tags          of the messages that go by syft
    """

    def __init__(self, channel: Channel, mine: Peer, theirs: Peer, tags: Iterable[int]):
        self._channel, self._mine, self._theirs, self._tags = channel, mine, theirs, frozenset(tags)

    def send(self, tag: int, data: bytes | np.ndarray) -> None:
        """Send one message."""
        if tag in self._tags:
            self._mine.send(self._theirs, tag, data)
        else:
            self._channel.send(tag, data)

    def receive(self, tag: int, out: bytes | np.ndarray) -> None:
        """Receive one message into ``out``. Raises ChannelError for another tag or size."""
        if tag not in self._tags:
            self._channel.receive(tag, out)
            return
        data, out = self._mine.receive(self._theirs, tag), memoryview(out).cast("B")
        if len(data) != len(out):
            raise ChannelError(f"{self._theirs.name} sent {len(data)} bytes where {len(out)} are due")
        out[:] = data

    def exchange(self, tag: int, outgoing: bytes | np.ndarray, incoming: bytes | np.ndarray) -> None:
        """Send and receive at the same time; never by syft."""
        self._channel.exchange(tag, outgoing, incoming)

    def close(self) -> None:
        """Close the other channel."""
        self._channel.close()


def _unpacked(content: bytes) -> list[bytes]:
    """A file's bytes, and those of its members where it is an archive of the kind syft writes."""
    if not content.startswith(_GZIP):
        return [content]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [content, *(archive.extractfile(member).read() for member in archive.getmembers() if member.isfile())]


@contextlib.contextmanager
def _quietly():
    """One thread at a time, without syft's progress lines."""
    with _ONE_AT_A_TIME, contextlib.redirect_stdout(io.StringIO()):
        yield


def _file_name(number: int, part: int) -> str:
    return f"{number:06d}-{part:03d}.bin"
