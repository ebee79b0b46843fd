"""Patient and provider of a session: what each does at set-up, ahead of a query, and online. Channels bring messages.

    crypto_provider = CryptoProvider(plan)
    patient         = Patient(plan, crypto_provider.patient_seed, channel_to_provider)
    provider        = Provider(plan, weights, crypto_provider.provider_seed, channel_to_patient)
    both setup()                                         once; they check that their plans agree
    patient.prepare(), provider.prepare(channel),
        crypto_provider.send(channel)                    for every image, any number ahead, in threads of their own
    patient.infer(x) -> logits, provider.serve()         online
    patient.infer_all([x, y, z]), provider.serve(3)      several images that share their rounds

After an error a session is over: nothing of it is used again, and a new one begins with new seeds.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from dopamine_lib.inference.network.plan import ANSWER, DIGEST, MODEL, QUERY, Plan, Weights
from dopamine_lib.inference.protocols.channel import Channel, ChannelError
from dopamine_lib.inference.protocols.lanes import side_by_side
from dopamine_lib.inference.protocols.opening import SCORES, noise
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, TAGS, Own, Party, Run, Workspace
from dopamine_lib.inference.protocols.randomness import SESSION, query_key
from dopamine_lib.inference.protocols.sharing import decode

#: Called with (layers done, layers, name) after each layer of the plan.
Progress = Callable[[int, int, str], None]
Result = TypeVar("Result")


@dataclass(repr=False)
class Prepared:
    """One query's randomness, of each operation: used once, then its buffers serve another query."""

    query: int
    buffers: list[np.ndarray]
    own: list[Own]


class _Evaluator:
    """What patient and provider have in common."""

    def __init__(self, number: int, plan: Plan, seed: bytes, channel: Channel):
        self.plan, self.channel, self._number = plan, channel, number
        self._workspaces: list[Workspace] = []  # one for each query that runs at once
        self._seed, self._space = seed, Workspace()  # preparing has scratch of its own: it may run beside a query
        self._drawn = 0
        self._ready: deque[Prepared] = deque()
        self._spare: list[list[np.ndarray]] = []
        self._over = False

    @property
    def ready(self) -> int:
        """Queries whose randomness lies ready."""
        return len(self._ready)

    def _begin(self, queries: int) -> list[Prepared]:
        """The next queries' randomness, which from now on counts as used."""
        if self._over:
            raise ChannelError("this session is over after an error; begin a new one")
        if not 0 < queries <= len(self._ready):
            raise ChannelError(
                f"randomness lies ready for {len(self._ready)} queries, not for {queries}; prepare first"
            )
        return [self._ready.popleft() for _ in range(queries)]

    def _together(self, work: Callable[..., Result], prepared: list[Prepared], *arguments: Sequence) -> list[Result]:
        """``work(party, prepared, …)`` of each query; they share their rounds, and give their buffers back."""
        while len(self._workspaces) < len(prepared):
            self._workspaces.append(Workspace())

        def alone(query: tuple, space: Workspace) -> Callable[[Channel], Result]:
            return lambda lane: work(Party(self._number, lane, space), *query)

        queries = zip(prepared, *arguments, strict=True)
        works = [alone(query, space) for query, space in zip(queries, self._workspaces, strict=False)]
        results = self._guarded(side_by_side, self.channel, works)
        self._spare += [one.buffers for one in prepared]
        return results

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
            raise ChannelError(
                "the other side follows another plan, or another version of the protocols: get the provider's plan "
                "again, and install the provider's version of dopamine-kit"
            )

    def _next_key(self) -> tuple[int, bytes]:
        query, self._drawn = self._drawn, self._drawn + 1
        return query, query_key(self._seed, query)

    def _buffers(self, sizes: list[int]) -> list[np.ndarray]:
        return self._spare.pop() if self._spare else [np.empty(size, np.uint8) for size in sizes]

    def _runs(self, party: Party, prepared: Prepared) -> list[list[Run]]:
        """Each layer's operations, which then need shares only.

        The last ones are no layer's: they ask whether values came near the ring's end (``Plan.operations``).
        """
        runs = [[] for _ in range(len(self.plan.layers) + 1)]
        for i, (number, operation) in enumerate(self.plan.operations):
            runs[number].append(partial(operation.run, party, TAGS * i, prepared.own[i]))
        return runs

    def _evaluate(self, x: np.ndarray, runs: list[list[Run]], progress: Progress | None = None) -> np.ndarray:
        """This party's share of the last value, from its share of the image."""
        values, watched = [x], []
        for number, (layer, steps) in enumerate(zip(self.plan.layers, runs[:-1], strict=True)):
            values.append(layer.private([values[source] for source in layer.sources], steps))
            if number in self.plan.watched:
                watched.append(values[layer.sources[0]].reshape(-1))
            for source in layer.sources:
                if self.plan.last_reader[source] == number:
                    values[source] = None  # a residual network's values together take 100 MB
            if progress:
                progress(len(values) - 1, len(self.plan.layers), layer.name)
        ends = runs[-1][:-1]
        if watched:
            ends.pop(0)(np.concatenate(watched))
        for run in ends:
            run()
        return values[-1]


class Patient(_Evaluator):
    """Holds the image; the only one who learns the answer.

    plan, seed  public plan; 16 bytes from the crypto-provider, for this session only
    provider    channel to the provider

    exceeded    whether the last image drove some value near the ring's end: then its answer may be wrong
    """

    def __init__(self, plan: Plan, seed: bytes, provider: Channel):
        super().__init__(PATIENT, plan, seed, provider)
        self.exceeded = False
        self._masked: dict[int, list[np.ndarray]] = {}

    def setup(self) -> None:
        """Agree on the plan and receive the masked weights F = W - B. Raises ChannelError."""
        self._guarded(self._setup)

    def _setup(self) -> None:
        self._agree()
        for i in self.plan.weighted:
            layout = self.plan.operations[i][1].weight_masks
            buffer = np.empty(layout.nbytes, np.uint8)
            self.channel.receive(MODEL, buffer)
            self._masked[i] = list(layout.arrays(buffer).values())

    def prepare(self) -> None:
        """Get ready for one more image: no message, and a convolution for every layer that has one."""
        query, key = self._next_key()
        operations = [operation for _, operation in self.plan.operations]
        buffers, own = self._buffers([operation.patient.nbytes for operation in operations]), []
        for i, (operation, buffer) in enumerate(zip(operations, buffers, strict=True)):
            own.append(Own(**operation.patient.draw(key, i, buffer)))
            if i in self.plan.weighted:
                operation.prepare(own[i], self._masked[i], self._space)
        self._ready.append(Prepared(query, buffers, own))

    def infer(self, x: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """Logits, float64 (classes,), for a normalised image (C, H, W): see ``Plan.to_input``.

        Where the plan's ``answer`` is the grade alone: its number, (1,).

        progress  called with (layers done, layers, name) after each layer of the plan
        Raises InputError for another shape or a value no picture can have, ChannelError where the session breaks.
        """
        ((logits, self.exceeded),) = self.infer_all([x], progress)
        return logits

    def infer_all(
        self, images: Sequence[np.ndarray], progress: Progress | None = None
    ) -> list[tuple[np.ndarray, bool]]:
        """The same for several images at once: they share their rounds, and each keeps its own answer.

        Of each image (logits, whether it drove some value near the ring's end). ``progress`` hears of the first.
        """
        encoded = [self.plan.encode(x) for x in images]
        prepared = self._begin(len(encoded))
        return self._together(self._infer, prepared, encoded, [progress] + [None] * (len(encoded) - 1))

    def _infer(
        self, party: Party, prepared: Prepared, image: np.ndarray, progress: Progress | None
    ) -> tuple[np.ndarray, bool]:
        party.channel.send(QUERY, np.array([prepared.query], "<u8"))
        runs = self._runs(party, prepared)
        mine = self._evaluate(image, runs, progress)
        near = any([run() for run in runs[-1][-1:]])
        theirs = np.empty_like(mine)
        party.channel.receive(ANSWER, theirs)
        last = self.plan.layers[-1]
        answer = decode(mine + theirs, last.scale).reshape(-1)
        # scores are looked at here; a grade's number fills its ring
        end = 2.0 ** (last.bits - 2) / last.scale if self.plan.answer == SCORES else np.inf
        return answer, near or bool(np.abs(answer).max() >= end)


class Provider(_Evaluator):
    """Holds the model; learns which patient asked, and when.

    plan, weights  from ``compiler.compile_model``
    seed           16 bytes from the crypto-provider, for this session only
    patient        channel to the patient
    """

    def __init__(self, plan: Plan, weights: Weights, seed: bytes, patient: Channel):
        super().__init__(PROVIDER, plan, seed, patient)
        self._weights = weights

    def setup(self) -> None:
        """Agree on the plan and send the masked weights F = W - B. Raises ChannelError."""
        self._guarded(self._setup)

    def _setup(self) -> None:
        self._agree()
        key = query_key(self._seed, SESSION)
        for i in self.plan.weighted:
            number, operation = self.plan.operations[i]
            buffer = np.empty(operation.weight_masks.nbytes, np.uint8)
            masks = operation.weight_masks.draw(key, i, buffer).values()
            for b, w in zip(masks, self._weights.matrices[number], strict=True):
                np.subtract(w, b, out=b)
            self.channel.send(MODEL, buffer)

    def prepare(self, crypto_provider: Channel) -> None:
        """Get ready for one more image: receive its corrections over a channel from ``CryptoProvider.send``."""
        self._guarded(self._prepare, crypto_provider)

    def _prepare(self, crypto_provider: Channel) -> None:
        query, key = self._next_key()
        operations = [operation for _, operation in self.plan.operations]
        buffers, own = self._buffers([o.provider.nbytes + o.corrections.nbytes for o in operations]), []
        for i, ((number, operation), buffer) in enumerate(zip(self.plan.operations, buffers, strict=True)):
            drawn = operation.provider.draw(key, i, buffer[: operation.provider.nbytes])
            rest = buffer[operation.provider.nbytes :]
            crypto_provider.receive(TAGS * i, rest)
            own.append(Own(**drawn, **operation.corrections.arrays(rest)))
            if (weights := self._weights.of(number)) is not None:
                own[i].weights, own[i].bias = weights
        self._ready.append(Prepared(query, buffers, own))

    def serve(self, queries: int = 1) -> None:
        """Answer this many queries of the patient's at once. Raises ChannelError where the session breaks."""
        self._together(self._serve, self._begin(queries))

    def _serve(self, party: Party, prepared: Prepared) -> None:
        query = np.empty(1, "<u8")
        party.channel.receive(QUERY, query)
        if query[0] != prepared.query:
            raise ChannelError(f"the patient begins query {query[0]} where {prepared.query} is due: out of step")
        # the image is the patient's alone: the provider's share of it is zero
        runs = self._runs(party, prepared)
        share = self._evaluate(np.zeros(self.plan.shape, np.uint32), runs)
        if self.plan.noise_bits:
            share = share + noise(self.plan.noise_bits, share.shape, self.plan.layers[-1].bits)
        for run in runs[-1][-1:]:
            run()
        party.channel.send(ANSWER, share)
