"""A session within one process that keeps everything that was sent: for the chapter, the tests, and for looking into.

    with Rehearsal(plan, weights) as session:
        logits = session.infer(x)
        session.messages
    run(ReLUOperation(1000, 8), x)                 one operation by itself, on the sum of two fresh shares

Patient, provider and crypto-provider are the real ones, each in a thread of its own; only the wire is a socket pair.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dopamine_lib.inference.network.crypto_provider import CryptoProvider
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.network.plan import Plan, Weights
from dopamine_lib.inference.protocols.channel import Recorded, local_pair
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Operation, Own, Party, Workspace
from dopamine_lib.inference.protocols.randomness import fresh_seed
from dopamine_lib.inference.protocols.sharing import reconstruct, share

#: 16 bytes each for patient and provider, fresh where None.
Seeds = tuple[bytes | None, bytes | None]


@dataclass(frozen=True)
class Message:
    """What one party sent to the other: its tag, what it is in words, and its bytes."""

    sender: str
    tag: int
    what: str
    content: bytes = field(repr=False)


class Rehearsal:
    """One session, set up when made. ``crypto_provider``, ``patient`` and ``provider`` are its parties.

    seed                       None for real randomness; two sessions with one seed show what must never happen, a mask
                               used twice
    patient_end, provider_end  the channel between the two, with a log at either end
    offline, dealt             the channel from the crypto-provider: the provider's end and its own
    """

    def __init__(self, plan: Plan, weights: Weights, seed: int | None = None):
        self.plan, self.crypto_provider = plan, CryptoProvider(plan, seed)
        self.patient_end, self.provider_end = map(Recorded, local_pair())
        self.offline, self.dealt = local_pair()
        self.patient = Patient(plan, self.crypto_provider.patient_seed, self.patient_end)
        self.provider = Provider(plan, weights, self.crypto_provider.provider_seed, self.provider_end)
        at_once(self.patient.setup, self.provider.setup)

    def prepare(self) -> None:
        """Lay the randomness of one more query ready at patient and provider."""
        at_once(
            self.patient.prepare,
            lambda: self.provider.prepare(self.offline),
            lambda: self.crypto_provider.send(self.dealt),
        )

    def infer(self, x: np.ndarray) -> np.ndarray:
        """Logits (classes,) of a normalised image (C, H, W), from dealing to the answer; forgets earlier messages."""
        self.prepare()
        self.patient_end.log.clear()
        self.provider_end.log.clear()
        return self.online(x)

    def online(self, x: np.ndarray) -> np.ndarray:
        """The same with randomness that lies ready."""
        return at_once(lambda: self.patient.infer(x), self.provider.serve)[0]

    @property
    def messages(self) -> list[Message]:
        """What went over the wire since the last query began (before the first: the set-up), in order."""
        senders = {"sent": "patient", "received": "provider"}
        return [Message(senders[way], tag, self.plan.describe(tag), data) for way, tag, data in self.patient_end.log]

    def close(self) -> None:
        """End the session; may be called twice."""
        for channel in (self.patient_end, self.provider_end, self.offline, self.dealt):
            channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def run(operation: Operation, *values: np.ndarray, seeds: Seeds = (None, None)) -> np.ndarray:
    """Share ring arrays, let both parties run an operation on the shares, and put its result together.

    Not for operations that take weights as well as shares (convolutions).
    """
    own, shares, ends = deal(operation, seeds), list(zip(*map(share, values), strict=True)), local_pair()

    def play(number):
        return operation.run(Party(number, ends[number]), 0, own[number], *shares[number])

    try:
        return reconstruct(*at_once(lambda: play(PATIENT), lambda: play(PROVIDER)))
    finally:
        for end in ends:
            end.close()


def deal(operation: Operation, seeds: Seeds = (None, None), weight_masks: Sequence[np.ndarray] = ()) -> tuple[Own, Own]:
    """What patient and provider hold for one operation by itself."""
    layouts = operation.patient, operation.provider
    patient, provider = (layout.draw(seed or fresh_seed(), 0) for layout, seed in zip(layouts, seeds, strict=True))
    corrections = operation.corrections.arrays(np.empty(operation.corrections.nbytes, np.uint8))
    operation.deal(Own(**patient), Own(**provider), Own(**corrections), weight_masks, Workspace())
    return Own(**patient), Own(**provider, **corrections)


def at_once(*works: Callable[[], Any]) -> list:
    """Run functions in threads of their own and return their results; raises the first error of any."""
    results, errors = [None] * len(works), []

    def run(i, work):
        try:
            results[i] = work()
        except BaseException as error:  # handed on below: a thread's own would be lost
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i, work), daemon=True) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
