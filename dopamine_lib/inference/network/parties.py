"""Patient and provider: what each does at set-up, ahead of a query, and online. Channels bring the messages.

A session; the seeds are two times 16 bytes from the crypto-provider's ``Dealer``:

    patient   = Patient(plan, patient_seed, channel_to_provider)
    provider  = Provider(plan, weights, provider_seed, channel_to_patient)
    both      setup()                    once; they check that their plans agree
    both      prepare(…)                 once an image, any number ahead; may run in a thread of its own
    patient   infer(x) -> logits         provider   serve()

After an error a session is over: nothing of it is used again, and a new one begins with new seeds.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from dopamine_lib.inference.network import plan as steps
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.network.program import ANSWER, DIGEST, MODEL, QUERY, Program
from dopamine_lib.inference.protocols.buffers import Workspace
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, TAGS, Party
from dopamine_lib.inference.protocols.pooling import average_pool, max_pool
from dopamine_lib.inference.protocols.randomness import SESSION, draw, query_key
from dopamine_lib.inference.protocols.sharing import decode


@dataclass(frozen=True)
class Weights:
    """The provider's secret: for each weighted step of the plan its matrices and its bias, as ring elements."""

    matrices: dict[int, list[np.ndarray]] = field(repr=False)
    biases: dict[int, np.ndarray] = field(repr=False)


class _Prepared:
    """One query's correlated randomness: used once, then its buffers serve another query."""

    def __init__(self, query: int, buffers: list[np.ndarray], own: list):
        self.query, self.buffers, self.own = query, buffers, own


class _Session:
    """What patient and provider have in common."""

    def __init__(self, number: int, plan: Plan, seed: bytes, channel):
        self.plan, self.program, self.channel = plan, Program(plan), channel
        self.party = Party(number, channel)
        self._seed, self._space = seed, Workspace()  # preparing has scratch of its own: it may run beside a query
        self._drawn = 0
        self._ready: deque[_Prepared] = deque()
        self._spare: list[list[np.ndarray]] = []
        self._over = False

    @property
    def ready(self) -> int:
        """Queries whose randomness lies ready."""
        return len(self._ready)

    def _begin(self) -> _Prepared:
        """The next query's randomness, which from now on counts as used."""
        if self._over:
            raise ChannelError("this session is over after an error; begin a new one")
        if not self._ready:
            raise ChannelError("no randomness lies ready for a query; prepare first")
        return self._ready.popleft()

    def _guarded(self, work, *arguments):
        """Do something with messages; whatever goes wrong ends the session."""
        try:
            return work(*arguments)
        except BaseException:
            self._over = True
            self._ready.clear()
            self.channel.close()
            raise

    def _agree(self) -> None:
        mine, theirs = np.frombuffer(self.plan.digest(), np.uint8), np.empty(32, np.uint8)
        self.channel.exchange(DIGEST, mine, theirs)
        if not np.array_equal(mine, theirs):
            raise ChannelError("the other side follows another plan; get the provider's plan again")

    def _next_key(self) -> tuple[int, bytes]:
        query, self._drawn = self._drawn, self._drawn + 1
        return query, query_key(self._seed, query)

    def _evaluate(self, x, prepared: _Prepared, progress=None) -> np.ndarray:
        """This party's share of the last value, from its share of the image."""
        numbered = iter(enumerate(zip(self.program.operations, prepared.own, strict=True)))

        def following():
            i, ((_, operation), own) = next(numbered)
            return TAGS * i, operation, own

        values = [x]
        for number, step in enumerate(self.plan.steps):
            inputs = [values[source] for source in step.sources]
            values.append(self._step(number, step, inputs, following))
            if progress:
                progress(number + 1, len(self.plan.steps), step.name)
        return values[-1]

    def _step(self, number: int, step, inputs, following) -> np.ndarray:
        x, party = inputs[0], self.party
        if isinstance(step, steps.Convolution):
            return self._weighted(number, x, following())
        if isinstance(step, steps.ReLU | steps.Truncate):
            tag, operation, own = following()
            return operation.run(party, tag, x, own)
        if isinstance(step, steps.MaxPool):

            def maximum(a, b):
                tag, operation, own = following()
                return operation.run(party, tag, a, b, own)

            return max_pool(x, step.kernel, step.stride, step.ceil, maximum)
        if isinstance(step, steps.NormalisedLinear):
            tag, lift, own = following()
            return self._weighted(number, lift.run(party, tag, x, own), following()).reshape(step.shape)
        if isinstance(step, steps.Raise):
            return x << step.shift
        if isinstance(step, steps.AveragePool):
            return average_pool(x, step.rows, step.columns)
        return np.concatenate([value << shift for value, shift in zip(inputs, step.shifts, strict=True)])


class Patient(_Session):
    """Holds the image; the only one who learns the answer.

    plan, seed  public plan; 16 bytes from the crypto-provider, for this session only
    provider    channel to the provider
    """

    def __init__(self, plan: Plan, seed: bytes, provider):
        super().__init__(PATIENT, plan, seed, provider)
        self._masked: dict[int, list[np.ndarray]] = {}

    def setup(self) -> None:
        """Agree on the plan and receive the masked weights F = W - B. Raises ChannelError."""
        self._guarded(self._setup)

    def _setup(self) -> None:
        self._agree()
        for i in self.program.weighted:
            layout = self.program.operations[i][1].session
            buffer = np.empty(layout.nbytes, np.uint8)
            self.channel.receive(MODEL, buffer)
            self._masked[i] = list(vars(layout.views(buffer)).values())

    def prepare(self) -> None:
        """Get ready for one more image: no message, a convolution for every layer."""
        query, key = self._next_key()
        operations = [operation for _, operation in self.program.operations]
        buffers = self._spare.pop() if self._spare else [np.empty(o.patient.nbytes, np.uint8) for o in operations]
        own = [draw(o.patient, key, i, buffer) for i, (o, buffer) in enumerate(zip(operations, buffers, strict=True))]
        for i in self.program.weighted:
            operations[i].prepare(own[i], self._masked[i], self._space)
        self._ready.append(_Prepared(query, buffers, own))

    def infer(self, x: np.ndarray, progress=None) -> np.ndarray:
        """Logits, float64 (classes,), for a normalised image (C, H, W): see ``Plan.to_input``.

        progress  called with (steps done, steps, name) after each step of the plan
        Raises InputError for another shape or a value no picture can have, ChannelError where the session breaks.
        """
        image = self.plan.encode(x)
        prepared = self._begin()
        logits = self._guarded(self._infer, image, prepared, progress)
        self._spare.append(prepared.buffers)
        return logits

    def _infer(self, image: np.ndarray, prepared: _Prepared, progress) -> np.ndarray:
        self.channel.send(QUERY, np.array([prepared.query], "<u8"))
        mine = self._evaluate(image, prepared, progress)
        theirs = np.empty_like(mine)
        self.channel.receive(ANSWER, theirs)
        return decode(mine + theirs, self.plan.steps[-1].scale).reshape(-1)

    def _weighted(self, number: int, x, following) -> np.ndarray:
        tag, operation, own = following
        return operation.run_patient(self.party, tag, x, own)


class Provider(_Session):
    """Holds the model; learns which patient asked, and when.

    plan, weights  from ``network.compile_model``
    seed           16 bytes from the crypto-provider, for this session only
    patient        channel to the patient
    """

    def __init__(self, plan: Plan, weights: Weights, seed: bytes, patient):
        super().__init__(PROVIDER, plan, seed, patient)
        self._weights = weights

    def setup(self) -> None:
        """Agree on the plan and send the masked weights F = W - B. Raises ChannelError."""
        self._guarded(self._setup)

    def _setup(self) -> None:
        self._agree()
        key = query_key(self._seed, SESSION)
        for i in self.program.weighted:
            number, operation = self.program.operations[i]
            mask = draw(operation.session, key, i, buffer := np.empty(operation.session.nbytes, np.uint8))
            for b, w in zip(vars(mask).values(), self._weights.matrices[number], strict=True):
                np.subtract(w, b, out=b)
            self.channel.send(MODEL, buffer)

    def prepare(self, dealer) -> None:
        """Get ready for one more image: receive its corrections over a channel from ``Dealer.send``."""
        self._guarded(self._prepare, dealer)

    def _prepare(self, dealer) -> None:
        query, key = self._next_key()
        if not self._spare:
            operations = [operation for _, operation in self.program.operations]
            self._spare.append([np.empty(o.provider.nbytes + o.corrections.nbytes, np.uint8) for o in operations])
        buffers, own = self._spare.pop(), []
        for i, ((_, operation), buffer) in enumerate(zip(self.program.operations, buffers, strict=True)):
            drawn = draw(operation.provider, key, i, buffer[: operation.provider.nbytes])
            rest = buffer[operation.provider.nbytes :]
            dealer.receive(TAGS * i, rest)
            vars(drawn).update(vars(operation.corrections.views(rest)))
            own.append(drawn)
        self._ready.append(_Prepared(query, buffers, own))

    def serve(self) -> None:
        """Answer one query of the patient's. Raises ChannelError where the session breaks."""
        prepared = self._begin()
        self._guarded(self._serve, prepared)
        self._spare.append(prepared.buffers)

    def _serve(self, prepared: _Prepared) -> None:
        query = np.empty(1, "<u8")
        self.channel.receive(QUERY, query)
        if query[0] != prepared.query:
            raise ChannelError(f"the patient begins query {query[0]} where {prepared.query} is due: out of step")
        # the image is the patient's alone: the provider's share of it is zero
        self.channel.send(ANSWER, self._evaluate(np.zeros(self.plan.shape, np.uint32), prepared))

    def _weighted(self, number: int, x, following) -> np.ndarray:
        tag, operation, own = following
        weights, bias = self._weights.matrices[number], self._weights.biases[number]
        return operation.run_provider(self.party, tag, x, own, weights, bias)
