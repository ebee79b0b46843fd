"""What stands behind the patient's page: its backend, the other two workers, and consultations with them.

    consultation = Consultation(Backend())            # provider and crypto-provider, two processes on this machine
    consultation.get_ready()                          # ahead, while the patient still looks at the picture
    consultation.grade(image).answer.grade

The patient is the process that runs this; it reads no model. Where many pages are served at once (``app``), their
kernels are patients of one backend: ``Introduction.write`` leaves a file that only its owner can read, and
``SharedBackend`` reads it. Only the patients' side has the patients' key.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dopamine_lib.data.images import prepare
from dopamine_lib.errors import InputError
from dopamine_lib.files import atomic_path
from dopamine_lib.inference.protocols.channel import ChannelError, Recorded
from dopamine_lib.inference.protocols.opening import SCORES
from dopamine_lib.inference.workers import tls
from dopamine_lib.inference.workers.answer import Answer
from dopamine_lib.inference.workers.client import PatientClient, Progress
from dopamine_lib.inference.workers.processes import Workers
from dopamine_lib.page import served_model

#: Environment variable with the path of the introduction that ``app`` wrote for its kernels.
INTRODUCTION = "DOPAMINE_INTRODUCTION"
START_TIMEOUT = 300.0  # seconds to wait for another program's backend: imports, compilation of kernels, calibration
PATIENCE = 30.0  # seconds to go on trying after a worker died: starting it again takes about five
PAUSE = 0.5


@dataclass(frozen=True)
class Introduction:
    """What a patient needs to know of the other two.

    credentials                the patients' key
    provider, crypto_provider  each (address, PEM certificate)
    pids                       process numbers by role
    model                      ``served_model.facts`` of the model that is served
    """

    credentials: tls.Credentials = field(repr=False)
    provider: tls.Endpoint
    crypto_provider: tls.Endpoint
    pids: dict[str, int]
    model: dict

    def write(self, path: str | Path) -> None:
        """Leave it in a file that only its owner can read, in one step."""
        record = asdict(self) | {"credentials": [self.credentials.certificate, self.credentials.key.decode()]}
        with atomic_path(path, private=True) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Introduction":
        """What ``write`` left."""
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        certificate, key = record.pop("credentials")
        for role in ("provider", "crypto_provider"):
            address, its_certificate = record[role]
            record[role] = tuple(address), its_certificate
        return cls(credentials=tls.Credentials(certificate, key.encode()), **record)


class Backend:
    """The provider's and the crypto-provider's processes: started when first asked for, and again when one has died.

    weights   a model that ``reproduce`` wrote; by default the one that is shipped
    backbone  for a ``head``: file of the SqueezeNet it stands on; the embedded one by default
    size      side of the image in pixels; the model's own by default
    answer    what patients are told: the "scores" or the "grade" alone
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        backbone: str | Path | None = None,
        size: int | None = None,
        answer: str = SCORES,
    ):
        self._weights = Path(weights or served_model.SERVED)
        self._options = {"backbone": backbone, "size": size, "answer": answer}
        self._credentials = tls.Credentials.make("patient", always=True)
        self._lock = threading.Lock()
        self._workers, self._introduction, self._closed = None, None, False

    def introduction(self) -> Introduction:
        """How to reach them now; may start them first. Raises InputError for what is wrong with the model."""
        with self._lock:
            if self._closed:
                raise ChannelError("the page was closed; open it again")
            if self._workers is None or not self._workers.alive:
                self._end()
                model = served_model.facts(self._weights)
                model["size"] = self._options["size"] or model["size"]
                patient = self._credentials.certificate
                # in a notebook their log would appear below whatever cell runs
                self._workers = Workers(self._weights, **self._options, patient=patient, quiet=True)
                pids = self._workers.pids
                self._introduction = Introduction(self._credentials, *self._workers.peers, pids, model)
            introduction = self._introduction
        if self._closed:  # while they started
            self.close()
            raise ChannelError("the page was closed; open it again")
        return introduction

    def close(self) -> None:
        """End them, or have whoever starts them just now do that; waits for no start. May be called twice."""
        self._closed = True
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def _end(self) -> None:
        if self._workers is not None:
            self._workers.close()
        self._workers = None


class SharedBackend:
    """A backend that another process runs, and whose introduction lies in a file."""

    def __init__(self, path: str | Path):
        self._path = Path(path)

    def introduction(self) -> Introduction:
        """How to reach them now; waits until that is known. Raises ChannelError where it stays unknown."""
        end = time.monotonic() + START_TIMEOUT
        while not self._path.exists():
            if time.monotonic() > end or not self._path.parent.exists():
                raise ChannelError("the program that serves this page has ended; start it again")
            time.sleep(0.1)
        try:
            return Introduction.read(self._path)
        except FileNotFoundError:  # it ends this moment
            raise ChannelError("the program that serves this page has ended; start it again") from None

    def close(self) -> None:
        """Nothing to end: another process runs it."""


def find_backend(weights: str | Path | None = None) -> Backend | SharedBackend:
    """The shared backend where there is one, else a backend of its own, as always for given ``weights``."""
    path = os.environ.get(INTRODUCTION)
    return SharedBackend(path) if path and weights is None else Backend(weights)


@dataclass(frozen=True)
class Grading:
    """One consultation's result.

    answer   the answer and what it cost
    seconds  from the request to the answer, including a new session where one was needed
    seen     uint32 (3, size, size): all that the provider ever received of the picture
    pids     process numbers by role
    model    ``served_model.facts``
    """

    answer: Answer
    seconds: float
    seen: np.ndarray = field(repr=False)
    pids: dict[str, int]
    model: dict


class Consultation:
    """The patient's side: one picture after another, each in a session of its own with fresh randomness.

    A session is opened ahead, by ``get_ready``, and closed after its answer, so that no page keeps a seat for long.
    A session that broke, or a backend that died, is replaced and the question asked again, for half a minute.
    """

    def __init__(self, backend: Backend | SharedBackend):
        self._backend = backend
        self._lock = threading.Lock()
        self._session, self._closed = None, False

    def introduction(self) -> Introduction:
        """See ``Backend.introduction``."""
        return self._backend.introduction()

    def get_ready(self) -> None:
        """Open a session and prepare a query, if that has not been done. Raises InputError and ChannelError."""
        with self._lock:
            self._open()

    def grade(
        self,
        image: Image.Image,
        progress: Progress | None = None,
        retrying: Callable[[ChannelError], object] | None = None,
    ) -> Grading:
        """The grade of an RGB picture from Pillow.

        progress  called with (steps done, steps, name); retrying: called with the error before another attempt
        Raises InputError for what is wrong with the model, ChannelError where the others cannot be reached.
        """
        begin = time.perf_counter()
        with self._lock:
            while True:
                try:
                    client, wires, introduction = self._open()
                    answer = client.infer(prepare(image, client.size), progress)
                    break
                except ChannelError as error:
                    self._close()
                    if self._closed or time.perf_counter() - begin > PATIENCE:
                        raise
                    if retrying:
                        retrying(error)
                    time.sleep(PAUSE)
            seen = np.frombuffer(wires[-1].log[-1][2], "<u4").reshape(client.plan.shape)
            self._close()
        pids = {"patient": os.getpid(), **introduction.pids}
        return Grading(answer, time.perf_counter() - begin, seen, pids, introduction.model)

    def close(self) -> None:
        """End the session and the backend; may be called twice."""
        self._closed = True
        self._backend.close()  # first: a consultation that is still going on ends with it
        with self._lock:
            self._close()

    def _open(self):
        if self._session is None:
            introduction, wires = self._backend.introduction(), []

            def wrap(channel):
                # the picture's only way out is the first operation's first message, E = X - A
                wires.append(Recorded(channel, lambda direction, tag: (direction, tag) == ("sent", 0)))
                return wires[-1]

            try:
                peers = introduction.provider, introduction.crypto_provider
                client = PatientClient(introduction.credentials, *peers, wrap)
            except InputError as error:  # a plan that cannot be carried out is not the patient's fault
                raise ChannelError(str(error)) from None
            self._session = client, wires, introduction
            client.prepare()
        return self._session

    def _close(self) -> None:
        if self._session is not None:
            self._session[0].close()
            self._session = None
