"""The workers as processes of this machine: started, introduced to each other, watched, and ended.

    with Workers("FSCDP-0.safetensors") as workers:
        workers.prepare()
        answer = workers.infer("eye.png")

Every worker is a fresh interpreter, not a copy of this process: only the provider's process opens the model's file,
only the patient's the image's, and this process opens neither. Each makes its own key; what passes through this
process are certificates, addresses, file names and, from the patient, the answer. It and each worker say in turn:

    worker    {"certificate": …}
    here      {"served": {"weights": …, "backbone": …, "size": …, "answer": …, "model": …}, "ahead": …}
                                                          to the provider only
    here      {"certificates": …, "addresses": …}         of the workers that are ready
    worker    {"address": …}; the patient {"ready": 0}
    here      {"prepare": n} or {"files": [[name, FILE], …]}  to the patient, any number of times
    patient   {"ready": n} or {"answers": [[name, answer], …]}

A worker that cannot go on says {"wrong input": …} or {"broken": …} instead.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.inference.protocols.opening import SCORES
from dopamine_lib.inference.workers import tls
from dopamine_lib.pool import Child, Parent, close_all

ROLES = ("crypto-provider", "provider", "patient")
LOOPBACK = ("127.0.0.1", 0)
END_TIMEOUT = 5.0


class Workers:
    """Patient, provider and crypto-provider on this machine. Use as a context manager, or call ``close``.

    weights   a model that ``reproduce`` wrote
    backbone  for a ``head``: file of the SqueezeNet it stands on; the embedded one by default
    size      side of the image in pixels; the model's own by default
    answer    what the patient is told: the "scores" or the "grade" alone
    model     for weights that ``reproduce`` did not write: one of torchvision's networks, or ``module:function``
    patient   certificate of a patient in another process, which uses ``peers``: then none is started here
    crypto_provider  False: none is started, and the other two make their randomness alone
    ahead     queries that may lie prepared at once, besides one; as many, and one, share their rounds
    quiet     drop their log, which otherwise goes to this process's standard error

    They may be left alone for as long as one likes (see ``client.PatientClient``).
    Raises InputError for what is wrong with the model, ChannelError where a worker ended.
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        backbone: str | Path | None = None,
        size: int | None = None,
        answer: str = SCORES,
        model: str | None = None,
        patient: str | None = None,
        crypto_provider: bool = True,
        ahead: int = 2,
        quiet: bool = False,
    ):
        self._children: dict[str, Child] = {}
        left_out = {"crypto-provider": not crypto_provider, "patient": patient is not None}
        roles = [role for role in ROLES if not left_out.get(role)]
        try:
            for role in roles:
                self._children[role] = Child(__name__, role, quiet=quiet)
            certificates = {role: self._hear(role)["certificate"] for role in roles}
            certificates.setdefault("patient", patient)
            served = {"weights": _absolute(weights), "backbone": _absolute(backbone), "size": size}
            self._say("provider", {"ahead": ahead, "served": served | {"answer": answer, "model": model}})
            addresses = {}
            for role in roles:
                self._say(role, {"certificates": certificates, "addresses": addresses})
                addresses[role] = self._hear(role).get("address")
        except BaseException:
            self.close()
            raise
        #: For a ``client.PatientClient``: (address, certificate) of the provider and of the crypto-provider, or None.
        told = {"addresses": addresses, "certificates": certificates}
        self.peers = [_endpoint(told, role) for role in ("provider", "crypto-provider")]

    def prepare(self, queries: int = 1) -> int:
        """Make correlated randomness for ``queries`` more; returns how many lie ready."""
        self._say("patient", {"prepare": queries})
        return self._hear("patient")["ready"]

    def infer(self, image: str | Path) -> dict:
        """The answer for one image file, as ``answer.Answer.record``. Raises InputError for a bad file."""
        return self.infer_all([image])[0][1]

    def infer_all(self, files: Sequence[str | Path]) -> list[tuple[str, dict]]:
        """For several images, or all rows of CSV files, the name of each and its answer.

        They share their rounds as far as ``ahead`` allows. Raises InputError for a bad file, before any is asked about.
        """
        self._say("patient", {"files": [(str(file), _absolute(file)) for file in files]})
        return [(name, answer) for name, answer in self._hear("patient")["answers"]]

    @property
    def pids(self) -> dict[str, int]:
        """Process numbers by role."""
        return {role: child.pid for role, child in self._children.items()}

    @property
    def alive(self) -> bool:
        """Whether all of them still run."""
        return bool(self._children) and all(child.alive for child in self._children.values())

    def close(self) -> None:
        """End the three processes; may be called twice."""
        close_all(self._children.values(), END_TIMEOUT)  # the patient first: it ends its session
        self._children.clear()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _say(self, role: str, message: dict) -> None:
        if role not in self._children:
            raise ChannelError(f"the {role}'s process has ended; start the workers again")
        self._children[role].say(message)

    def _hear(self, role: str) -> dict:
        """A worker's next message; its complaint becomes an exception of the same kind here."""
        try:
            message = self._children[role].hear()  # on a busy machine a start takes minutes; a death is heard at once
        except EOFError:
            raise ChannelError(f"the {role}'s process ended without a word; start the workers again") from None
        if "broken" in message:
            raise ChannelError(message["broken"])
        return message


def _absolute(path) -> str | None:
    return None if path is None else str(Path(path).absolute())


def main(role: str, descriptor: str) -> None:
    """One worker: play ``role`` until the parent ends."""
    parent, credentials = Parent(int(descriptor), grace=END_TIMEOUT), tls.Credentials.make(role, always=True)
    with contextlib.suppress(EOFError):
        try:
            parent.say(certificate=credentials.certificate)
            play = {"crypto-provider": _crypto_provider, "provider": _provider, "patient": _patient}
            play[role](parent, credentials)
        except InputError as error:
            parent.say(**{"wrong input": str(error)})
        except ChannelError as error:
            parent.say(broken=str(error))


# Each role loads what it needs and compiles its kernels before it is told the rest: the three do that side by side.


def _crypto_provider(parent: Parent, credentials: tls.Credentials) -> None:
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.crypto_provider import CryptoProviderServer

    kernels.active()
    certificates = parent.hear()["certificates"]
    patients = {"patient": certificates["patient"]}
    _serve(parent, CryptoProviderServer(LOOPBACK, credentials, certificates["provider"], patients))


def _provider(parent: Parent, credentials: tls.Credentials) -> None:
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.compiling import compile_apart
    from dopamine_lib.inference.workers.provider import ProviderServer

    asked = parent.hear()
    served = compile_apart(**asked["served"], meanwhile=kernels.active)
    told = parent.hear()
    certificates = told["certificates"]
    patients = {"patient": certificates["patient"]}
    crypto_provider = _endpoint(told, "crypto-provider")
    _serve(parent, ProviderServer(LOOPBACK, credentials, patients, crypto_provider, *served, ahead=asked["ahead"]))


def _endpoint(told: dict, role: str) -> tls.Endpoint | None:
    return (tuple(told["addresses"][role]), told["certificates"][role]) if role in told["addresses"] else None


def _serve(parent: Parent, server) -> None:
    with server:
        parent.say(address=server.address)
        parent.hear()  # nothing more is said: it ends with the parent


def _patient(parent: Parent, credentials: tls.Credentials) -> None:
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.client import PatientClient

    kernels.active()
    told = parent.hear()
    with PatientClient(credentials, _endpoint(told, "provider"), _endpoint(told, "crypto-provider")) as client:
        parent.say(ready=0)
        while True:
            asked = parent.hear()
            try:
                if "prepare" in asked:
                    parent.say(ready=client.prepare(asked["prepare"]))
                else:
                    read = [(name + part, x) for name, file in asked["files"] for part, x in client.read(file)]
                    answers = client.infer_all([x for _, x in read])
                    parent.say(answers=[[name, one.record()] for (name, _), one in zip(read, answers, strict=True)])
            except InputError as error:  # found before anything was sent: the session goes on
                parent.say(**{"wrong input": str(error)})
            except ChannelError as error:  # nor is there a new session just now; the next question may find one
                parent.say(broken=str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
