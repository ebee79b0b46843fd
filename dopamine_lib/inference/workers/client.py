"""The patient's side: holds the image, gets the answer. Loads no PyTorch.

    with PatientClient(credentials, provider, crypto_provider) as client:
        client.prepare()                                              # offline: the image need not be there yet
        answer = client.infer(read_image("eye.png", client.size))     # online
        answers = client.infer_all(images)                            # several, which share their rounds

The image, or a table's row, never leaves this process. What the patient gets besides the logits is public: the plan,
the grades, how a row becomes numbers, and at which severity a disease is called.
"""

import contextlib
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from dopamine_lib.data.csv_file import CsvFile
from dopamine_lib.data.decoding import open_apart
from dopamine_lib.data.images import prepare
from dopamine_lib.data.table import encoded_rows
from dopamine_lib.errors import InputError
from dopamine_lib.files import parse_json
from dopamine_lib.inference.network.parties import Patient, Progress
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.offline import parties as alone
from dopamine_lib.inference.protocols.channel import Channel, ChannelError
from dopamine_lib.inference.protocols.opening import GRADE
from dopamine_lib.inference.workers import control, tls
from dopamine_lib.inference.workers.answer import Answer
from dopamine_lib.inference.workers.control import Command, Status, Tag
from dopamine_lib.progress import progress_bar

Result = TypeVar("Result")
#: The most queries that share their rounds: each has a thread.
MOST_TOGETHER = 32


class PatientClient:
    """Sessions with a provider, one after the other. Use as a context manager, or call ``close``.

    credentials                the patient's own key
    provider, crypto_provider  each (address, PEM certificate); None: patient and provider make the randomness alone
    wrap                       puts something around a session's channel to the provider, such as ``channel.Recorded``

    A session that the provider has closed, as it does after two minutes' silence, or that broke, is never resumed: a
    new one with new masks takes its place, and the query is asked there. Nobody learns more from asking twice, since
    no mask is used twice. Raises ChannelError where a new session cannot be had either, or breaks as well.
    """

    def __init__(
        self,
        credentials: tls.Credentials,
        provider: tls.Endpoint,
        crypto_provider: tls.Endpoint | None,
        wrap: Callable[[Channel], Channel] = lambda channel: channel,
    ):
        self._credentials, self._provider, self._crypto_provider, self._wrap = (
            credentials,
            provider,
            crypto_provider,
            wrap,
        )
        self._closed = False
        self._open()

    def _open(self) -> None:
        """A new session, in which nothing is prepared yet."""
        address, certificate = self._provider
        self._channel = self._wrap(tls.connect(address, self._credentials, certificate, "provider"))
        try:
            status = control.receive_number(self._channel, Tag.STATUS)
            if status != (Status.WELCOME if self._crypto_provider else Status.ALONE):
                raise ChannelError(_refusal(status))
            if self._crypto_provider:
                session = control.receive_bytes(self._channel, Tag.SESSION, control.SESSION_BYTES)
            card = _read_card(control.receive_text(self._channel, Tag.CARD))
            self.plan, self.grades, self.inputs, self.thresholds = card
            if self._crypto_provider:
                self._patient = Patient(self.plan, self._join(session), self._channel)
            else:
                self._patient = alone.Patient(self.plan, self._channel)
            before = self._channel.received
            self._patient.setup()
        except BaseException:
            self._channel.close()
            raise
        costs = self.plan.costs()
        self._bytes = {
            "offline_to_provider": costs["offline_to_provider"],
            "offline_to_patient": control.SEED_BYTES,
            "setup_to_patient": self._channel.received - before,
        }
        self._offline: list[float] = []

    def _in_session(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns; where the session turns out to be over, once more in a new one."""
        try:
            return work()
        except ChannelError:
            if self._closed:
                raise
            self._channel.close()
            self._open()
            return work()

    @property
    def size(self) -> int:
        """Height and width of the image in pixels."""
        return self.plan.shape[1]

    def read(self, file: str | Path) -> list[tuple[str, np.ndarray]]:
        """What a file of the patient's holds for the model to grade: an image, or the rows of a CSV file.

        Of each, what to add to the file's name, and what to ask about. Raises InputError for another file.
        """
        if self.inputs is None:
            return [("", prepare(open_apart(file), self.size))]
        table = CsvFile.read(Path(file))
        if not table.rows:
            raise InputError(f"{file}: no rows; a line for each patient follows the names of the columns")
        rows, _ = encoded_rows(table, self.inputs, "the provider")
        return [(f", line {line}", row) for (line, _), row in zip(table.rows, rows, strict=True)]

    def prepare(self, queries: int = 1) -> int:
        """Make correlated randomness for ``queries`` more, ahead of the images; returns how many lie ready.

        That may be fewer than asked for: the provider bounds what it keeps for all its patients together.
        """
        return self._in_session(lambda: self._prepare(queries))

    def _prepare(self, queries: int) -> int:
        for _ in range(queries):
            begin = time.perf_counter()
            control.send_number(self._channel, Tag.COMMAND, Command.PREPARE)
            if not control.receive_number(self._channel, Tag.GRANTED):
                break
            before = self._channel.sent, self._channel.received
            self._patient.prepare()  # while the provider does its part
            if not self._crypto_provider:
                self._bytes["offline_to_provider"] = self._channel.sent - before[0]
                self._bytes["offline_to_patient"] = self._channel.received - before[1]
            control.receive_number(self._channel, Tag.READY)
            self._offline.append(time.perf_counter() - begin)
        return len(self._offline)

    def infer(self, image: np.ndarray, progress: Progress | None = None) -> Answer:
        """The grade of one image, uint8 (size, size, 3), or row, float32 (p,). Prepares a query if none lies ready.

        progress  called with (layers done, layers, name) after each layer of the plan
        Raises InputError for an image of another shape or type, before anything is sent.
        """
        return self.infer_all([image], progress)[0]

    def infer_all(self, images: Sequence[np.ndarray], progress: Progress | None = None) -> list[Answer]:
        """The grades of several images, as many at once as fit, at most ``MOST_TOGETHER``: those share their rounds.

        How many fit is the provider's choice (``ProviderServer``), and each takes the memory of a query on both sides.
        """
        answers: list[Answer] = []
        inputs = [self._to_input(image) for image in images]
        with progress_bar(title="grading", unit="query", total=len(inputs), show=len(inputs) > 1) as bar:
            while len(answers) < len(inputs):
                rest = inputs[len(answers) :][:MOST_TOGETHER]
                answers += self._in_session(lambda rest=rest: self._infer(rest, progress))
                bar.update(len(answers) - bar.n)
        return answers

    def _to_input(self, x: np.ndarray) -> np.ndarray:
        if self.inputs is None:
            return self.plan.to_input(x)
        if x.shape != self.plan.shape[:1]:
            raise InputError(f"the row is {x.shape}, but this model reads {self.plan.shape[:1]}: encode it by inputs")
        return x.astype(np.float32).reshape(self.plan.shape)

    def _infer(self, inputs: list[np.ndarray], progress: Progress | None) -> list[Answer]:
        """The answers to the first inputs, as many as queries can be prepared for."""
        if (missing := len(inputs) - len(self._offline)) > 0:
            self._prepare(missing)
        inputs = inputs[: len(self._offline)]
        channel = self._channel
        before = channel.sent, channel.received, channel.rounds
        begin = time.perf_counter()
        control.send_number(channel, Tag.COMMAND, Command.INFER)
        control.send_number(channel, Tag.COUNT, len(inputs))
        opened = self._patient.infer_all(inputs, progress)
        cost = {
            "seconds_online": time.perf_counter() - begin,
            "rounds": channel.rounds - before[2],
            "together": len(inputs),
            "bytes": {
                "online_sent": (channel.sent - before[0]) // len(inputs),
                "online_received": (channel.received - before[1]) // len(inputs),
                **self._bytes,
            },
        }
        return [self._answer(logits, exceeded, cost) for logits, exceeded in opened]

    def _answer(self, opened: np.ndarray, exceeded: bool, cost: dict) -> Answer:
        """One query's answer, from what was opened of it and what it cost, but for its preparation."""
        if self.plan.answer == GRADE:
            grade, probabilities, logits = int(opened[0]), None, None
            if not 0 <= grade < len(self.grades):
                raise ChannelError(f"the provider's answer is grade number {grade} of {len(self.grades)}")
        else:
            odds = np.exp(opened - opened.max())
            grade, probabilities, logits = int(opened.argmax()), (odds / odds.sum()).tolist(), opened.tolist()
        return Answer(
            self.grades[grade],
            self.grades,
            probabilities,
            logits,
            seconds_offline=self._offline.pop(0),
            exceeded=exceeded,
            thresholds=self.thresholds,
            **cost,
        )

    def close(self) -> None:
        """End the session; may be called twice."""
        self._closed = True
        with contextlib.suppress(ChannelError):  # it is over already
            control.send_number(self._channel, Tag.COMMAND, Command.END)
        self._channel.close()

    def __enter__(self) -> "PatientClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _join(self, session: bytes) -> bytes:
        """The patient's seed for this session, from the crypto-provider."""
        address, certificate = self._crypto_provider
        channel = tls.connect(address, self._credentials, certificate, "crypto-provider")
        try:
            channel.send(Tag.JOIN, session)
            channel.send(Tag.JOIN, self.plan.digest())
            return control.receive_bytes(channel, Tag.SEED, control.SEED_BYTES)
        except ChannelError as error:
            raise ChannelError(f"{error}; is it the provider's own, and of this version of dopamine-kit?") from None
        finally:
            channel.close()


def _read_card(text: str) -> tuple[Plan, list[str], dict | None, dict[str, float]]:
    """The plan, the grades, a row's inputs, and thresholds. Raises ChannelError for anything else."""
    try:
        card = parse_json(text)
        plan, grades, inputs = Plan.from_json(card["plan"]), card["grades"], card["inputs"]
        thresholds = {what: float(threshold) for what, threshold in card["thresholds"].items()}
        if len(grades) != plan.classes or not all(isinstance(grade, str) for grade in grades):
            raise ValueError("grades")
        if any(unicodedata.category(character) == "Cc" for name in (*grades, *thresholds) for character in name):
            raise ValueError("names that would steer a terminal")
        if not all(0 <= threshold < len(grades) for threshold in thresholds.values()):
            raise ValueError("thresholds")
        if (
            inputs is not None
            and encoded_rows(CsvFile(Path(), [*inputs], []), inputs, "")[0].shape[1:] != plan.shape[:1]
        ):
            raise ValueError("inputs")
        return plan, grades, inputs, thresholds
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, InputError):
        raise ChannelError("the provider described its model in a way that cannot be read") from None


def _refusal(status: int) -> str:
    if status == Status.BUSY:
        return "the provider serves as many patients as it can; try again later"
    if status == Status.ALONE:
        return "the provider works without a crypto-provider; take --crypto-provider none"
    if status == Status.WELCOME:
        return "the provider needs the crypto-provider that it works with; give its address and certificate"
    if status == Status.NO_CRYPTO_PROVIDER:
        return "the provider could not reach the crypto-provider, which makes the randomness; ask its operator"
    return f"the provider refused with status {status}"
