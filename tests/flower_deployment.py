"""A run over Flower's deployment engine on this machine: a SuperLink with TLS, and SuperNodes with keys.

    python tests/flower_deployment.py HOSPITALS [KEY=VALUE …]    keys as in the run-config; keep=FOLDER, resident=yes

Needs Flower, so an environment of its own (notebooks/pages/hospitals.md). Prints what ``flwr run`` prints. With
``resident=yes`` hospitals are nodes of their own, in place of stock SuperNodes.
"""

import contextlib
import datetime
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation.flower.config import words, write_app
from dopamine_lib.federation.wires.identities import make_identity, party_name

#: Nothing is reported to Flower's makers, and nothing is installed while a run is going on.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
PEM, OPENSSH = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
PLAIN = serialization.NoEncryption()


def tls(folder: Path) -> dict[str, Path]:
    """An authority's certificate, and a server's key and certificate for this machine's own address."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("authority", "superlink")]
    now = datetime.datetime.now(datetime.UTC)
    files = {}
    for name, subject, key in zip(("ca", "server"), names, keys, strict=True):
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(names[0]).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        made = made.not_valid_after(now + datetime.timedelta(days=2))
        made = made.add_extension(x509.BasicConstraints(name == "ca", None), critical=True)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), False)
        here = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        made = made.add_extension(x509.SubjectAlternativeName(here), critical=False)
        files[name] = folder / f"{name}.crt"
        files[name].write_bytes(made.sign(keys[0], hashes.SHA256()).public_bytes(PEM))
    files["key"] = folder / "server.key"
    files["key"].write_bytes(keys[1].private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))
    return files


def node_key(folder: Path, name: str) -> Path:
    """A SuperNode's key pair; the public half is beside it."""
    key, path = ec.generate_private_key(ec.SECP384R1()), folder / name
    path.write_bytes(key.private_bytes(PEM, OPENSSH, PLAIN))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)
    return path


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployment:
    """A SuperLink and its SuperNodes; a context, which ends them all.

    resident  the run-config of hospitals that are nodes of their own, in place of SuperNodes
    """

    def __init__(self, folder: Path, hospitals: int, resident: dict[str, object] | None = None):
        self.resident = resident
        self.folder, self.hospitals, self.processes = folder, hospitals, []
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = os.environ | QUIET | {"FLWR_HOME": str(folder / "flower")}
        for number in [*range(hospitals), SERVER]:
            make_identity(folder / "keys", party_name(number))
        self.app = write_app(folder / "app").parent
        self.files = tls(folder)
        (folder / "flower").mkdir()
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.files["ca"]}"\n',
            encoding="utf-8",
        )

    def __enter__(self) -> "Deployment":
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__, None, None, None)
            files = self.files
            self.start(
                "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", self.address.rpartition(":")[2],
                "--ssl-certfile", files["server"], "--ssl-keyfile", files["key"], "--ssl-ca-certfile", files["ca"],
                "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            )  # fmt: skip
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(self.address[10:]))):
                    break
                time.sleep(0.2)
            for number in range(self.hospitals):
                self.node(number)
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()

    def start(self, name: str, *command: object) -> subprocess.Popen:
        """Start a program of Flower's, whose words go to a log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            words = [str(Path(sys.executable).parent / command[0]), *map(str, command[1:])]
            self.processes.append(subprocess.Popen(words, stdout=log, stderr=log, env=self.environment))
        return self.processes[-1]

    def node(self, number: int) -> subprocess.Popen:
        """Register a hospital's key, and start its SuperNode."""
        key = node_key(self.folder, f"node-{number}")
        registered = self.flwr("supernode", "register", key.with_suffix(".pub"), "here", "--name", party_name(number))
        assert registered.returncode == 0, registered.stdout + registered.stderr
        if self.resident is not None:
            return self.start(
                f"node-{number}", "python", "-m", "dopamine_lib.federation.flower", "hospital", number,
                "--superlink", self.address, "--node-key", key, "--root-certificates", self.files["ca"],
                *words({**self.resident, "identities": self.folder / "keys", "out": self.folder / str(number)}),
            )  # fmt: skip
        own = f'partition-id={number} num-partitions={self.hospitals} identities="{self.folder / "keys"}" '
        own += f'out="{self.folder / str(number)}"'
        return self.start(
            f"node-{number}", "flower-supernode", "--superlink", self.address, "--root-certificates", self.files["ca"],
            "--auth-supernode-private-key", key, "--node-config", own, "--port", free_port(),
        )  # fmt: skip

    def flwr(self, *words: object) -> subprocess.CompletedProcess:
        """A command of Flower's."""
        command = [str(Path(sys.executable).parent / "flwr"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment)

    def run(self, **config: object) -> subprocess.CompletedProcess:
        """``flwr run``, until it has ended."""
        config = {"identities": str(self.folder / "keys"), "out": str(self.folder / "server"), **config}
        said = [f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}".lower() for k, v in config.items()]
        return self.flwr("run", self.app, "here", "--stream", "-c", " ".join(said))


def number_or_text(text: str) -> object:
    """A value of the run-config as the command line has it."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text, text)


if __name__ == "__main__":
    hospitals, given = int(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:])
    with contextlib.ExitStack() as stack:
        folder = Path(given.pop("keep", None) or stack.enter_context(tempfile.TemporaryDirectory()))
        resident = given.pop("resident", None)
        config = {"hospitals": hospitals} | {key: number_or_text(value) for key, value in given.items()}
        with Deployment(folder, hospitals, config if resident else None) as deployment:
            begin = time.monotonic()
            ran = deployment.run(**config)
            print(ran.stdout + ran.stderr, end="")
            print(f"{hospitals} hospitals, {time.monotonic() - begin:.0f} s in all")
