"""The three workers as processes of this machine: started, introduced to each other, watched, and ended.

    with Workers("FSCDP-0.safetensors") as workers:
        workers.prepare()
        answer = workers.infer("eye.png")

Every worker is a fresh interpreter, not a copy of this process: the model's file is opened by the provider's process
only, the image's by the patient's only, and this process opens neither. Each makes its own key; what passes through
this process are certificates, addresses, file names and, from the patient, the answer. Nothing secret stands in an
argument or in the environment. A worker ends when its standard input does, so none outlives this process.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.channel import ChannelError

ROLES = ("hospital", "provider", "patient")
START_TIMEOUT = 300.0  # seconds for a worker to start: imports, compilation of kernels, calibration
END_TIMEOUT = 5.0


class Workers:
    """Patient, provider and hospital on this machine. Use as a context manager, or call ``close``.

    weights   a model that ``reproduce`` wrote
    backbone  for a ``head``: file of the SqueezeNet it stands on; the embedded one by default
    size      side of the image in pixels; the model's own by default
    patient   certificate of a patient in another process, who uses ``peers``: then none is started here
    quiet     drop their log, which otherwise goes where this process's errors go

    Raises InputError for what is wrong with the model, ChannelError where a worker ended.
    """

    def __init__(self, weights, *, backbone=None, size: int | None = None, patient: str | None = None, quiet=False):
        self._processes: dict[str, subprocess.Popen] = {}
        roles = ROLES if patient is None else ROLES[:-1]
        try:
            for role in roles:
                self._processes[role] = _start(role, quiet)
            certificates = {role: self._hear(role)["certificate"] for role in roles}
            certificates.setdefault("patient", patient)
            self._say("provider", {"weights": _absolute(weights), "backbone": _absolute(backbone), "size": size})
            addresses = {}
            for role in roles:
                self._say(role, {"certificates": certificates, "addresses": addresses})
                addresses[role] = self._hear(role).get("address")
        except BaseException:
            self.close()
            raise
        #: For a ``client.PatientClient``: (address, certificate) of the provider and of the hospital.
        self.peers = [(tuple(addresses[role]), certificates[role]) for role in ("provider", "hospital")]

    def prepare(self, queries: int = 1) -> int:
        """Make correlated randomness for so many more queries; returns how many lie ready."""
        self._say("patient", {"prepare": queries})
        return self._hear("patient")["ready"]

    def infer(self, image) -> dict:
        """The answer for one image file, as ``client.Answer.record``. Raises InputError for a bad file."""
        self._say("patient", {"image": _absolute(image)})
        return self._hear("patient")["answer"]

    @property
    def pids(self) -> dict[str, int]:
        """Process numbers by role."""
        return {role: process.pid for role, process in self._processes.items()}

    @property
    def alive(self) -> bool:
        """Whether all of them still run."""
        return bool(self._processes) and all(process.poll() is None for process in self._processes.values())

    def close(self) -> None:
        """End the three processes; may be called twice."""
        for process in reversed(self._processes.values()):  # the patient first: it ends its session
            with contextlib.suppress(BrokenPipeError):  # what a dead worker never read
                process.stdin.close()
            try:
                process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self._processes.clear()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _say(self, role: str, message: dict) -> None:
        try:
            self._processes[role].stdin.write(json.dumps(message) + "\n")
            self._processes[role].stdin.flush()
        except BrokenPipeError:
            self._hear(role)  # its last words say more
            raise ChannelError(f"the {role}'s process has ended; start the workers again") from None
        except (KeyError, ValueError):
            raise ChannelError(f"the {role}'s process has ended; start the workers again") from None

    def _hear(self, role: str) -> dict:
        """A worker's next line; its complaint becomes an exception of the same kind here."""
        process = self._processes[role]
        watchdog = threading.Timer(START_TIMEOUT, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise ChannelError(f"the {role}'s process ended without a word; start the workers again")
        message = json.loads(line)
        if "wrong input" in message:
            raise InputError(message["wrong input"])
        if "broken" in message:
            raise ChannelError(message["broken"])
        return message


def _absolute(path) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _start(role: str, quiet: bool = False) -> subprocess.Popen:
    home = str(Path(__file__).parents[3])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "dopamine_lib.inference.workers.worker", role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        env=environment,
        text=True,
        start_new_session=True,  # an interrupt from the keyboard is for this process, which then ends them
    )
