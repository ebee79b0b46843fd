"""A session within one process, with everything that was sent kept: for the chapter and whoever wants to look.

    with Rehearsal(plan, weights) as session:
        logits = session.infer(x)
        session.messages
    run(ReLUOperation(1000, 8), x)                 one operation by itself, on the sum of two fresh shares

Patient, provider and crypto-provider are the real ones, each in a thread of its own; only the wire is a socket pair.
"""

import threading
from dataclasses import dataclass, field

import numpy as np

from dopamine_lib.inference.network.dealer import Dealer
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.network.program import Program
from dopamine_lib.inference.protocols.buffers import Workspace
from dopamine_lib.inference.protocols.channel import Recorded, local_pair
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Operation, Party
from dopamine_lib.inference.protocols.randomness import draw, fresh_seed
from dopamine_lib.inference.protocols.sharing import reconstruct, share


@dataclass(frozen=True)
class Message:
    """What one party sent to the other: its tag, what it is in words, and its bytes."""

    sender: str
    tag: int
    what: str
    content: bytes = field(repr=False)


class Rehearsal:
    """One session, set up when made. ``dealer``, ``patient`` and ``provider`` are its workers.

    seed  None for real randomness; two sessions with one seed show what must never happen, a mask used twice
    """

    def __init__(self, plan, weights, seed: int | None = None):
        self.dealer, self.program = Dealer(plan, seed), Program(plan)
        (to_provider, to_patient), (self._from_dealer, self._dealers) = local_pair(), local_pair()
        self._wire = Recorded(to_provider)
        self._channels = (to_provider, to_patient, self._from_dealer, self._dealers)
        self.patient = Patient(plan, self.dealer.patient_seed, self._wire)
        self.provider = Provider(plan, weights, self.dealer.provider_seed, to_patient)
        at_once(self.patient.setup, self.provider.setup)

    def infer(self, x):
        """Logits (classes,) of a normalised image (C, H, W), from dealing to the answer; forgets earlier messages."""
        at_once(
            self.patient.prepare,
            lambda: self.provider.prepare(self._from_dealer),
            lambda: self.dealer.send(self._dealers),
        )
        self._wire.log.clear()
        return at_once(lambda: self.patient.infer(x), self.provider.serve)[0]

    @property
    def messages(self) -> list[Message]:
        """What went over the wire since the last query began (before the first: the set-up), in order."""
        senders = {"sent": "patient", "received": "provider"}
        return [Message(senders[way], tag, self.program.describe(tag), data) for way, tag, data in self._wire.log]

    def close(self) -> None:
        """End the session; may be called twice."""
        for channel in self._channels:
            channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def run(operation: Operation, *values: np.ndarray) -> np.ndarray:
    """Share ring arrays, let both parties run an operation on the shares, and put its result together.

    Not for operations with weights of the provider's (convolutions), which take more than shares.
    """
    own = [draw(layout, fresh_seed(), 0) for layout in (operation.patient, operation.provider)]
    corrections = operation.corrections.views(np.empty(operation.corrections.nbytes, np.uint8))
    operation.deal(*own, corrections, None, Workspace())
    vars(own[PROVIDER]).update(vars(corrections))
    shares, ends = list(zip(*map(share, values), strict=True)), local_pair()

    def play(number):
        return operation.run(Party(number, ends[number]), 0, *shares[number], own[number])

    try:
        return reconstruct(*at_once(lambda: play(PATIENT), lambda: play(PROVIDER)))
    finally:
        for end in ends:
            end.close()


def at_once(*works):
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
