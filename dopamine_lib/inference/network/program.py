"""A plan as the list of operations that carry it out: the same list for patient, provider and crypto-provider."""

import math

from dopamine_lib.errors import InputError
from dopamine_lib.inference.network import plan as steps
from dopamine_lib.inference.network.plan import Plan, Step
from dopamine_lib.inference.protocols.convolution import ConvolutionOperation
from dopamine_lib.inference.protocols.normalised import NormalisedOperation
from dopamine_lib.inference.protocols.operation import TAGS, Operation
from dopamine_lib.inference.protocols.pooling import MaximumOperation, pair_counts
from dopamine_lib.inference.protocols.relu import ReLUOperation
from dopamine_lib.inference.protocols.truncation import TruncationOperation

#: Tags of the messages that belong to no operation. Tags from 0xC000 on are free for whoever runs the parties.
DIGEST, MODEL, QUERY, ANSWER = 0xBFFC, 0xBFFD, 0xBFFE, 0xBFFF
_NAMES = {DIGEST: "plan's digest", MODEL: "masked weights", QUERY: "query's number", ANSWER: "answer's share"}


def operations_of(step: Step, input_shape) -> list[Operation]:
    """The operations one step takes, in order."""
    count = math.prod(input_shape)
    if isinstance(step, steps.Convolution):
        return [ConvolutionOperation(step, input_shape)]
    if isinstance(step, steps.ReLU):
        return [ReLUOperation(count, step.shift)]
    if isinstance(step, steps.Truncate):
        return [TruncationOperation(tuple(input_shape), step.shift)]
    if isinstance(step, steps.MaxPool):
        return [MaximumOperation(n) for n in pair_counts(input_shape, step.kernel, step.stride, step.ceil)]
    if isinstance(step, steps.NormalisedLinear):
        lift = TruncationOperation(tuple(input_shape), 0, bits=64)
        return [lift, NormalisedOperation(count, step.shape[0], step.inverse_bits)]
    return []  # local: Raise, AveragePool, Concatenate


class Program:
    """All operations of a plan, and what they cost.

    operations  for each operation, in order: (number of its step, operation)
    weighted    numbers of the operations that use the provider's weights
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.operations = [
            (i, operation)
            for i, step in enumerate(plan.steps)
            for operation in operations_of(step, plan.input_shape(step))
        ]
        if len(self.operations) * TAGS > DIGEST:
            raise InputError(f"the network takes {len(self.operations)} operations; the most is {DIGEST // TAGS}")
        self.weighted = [i for i, (_, operation) in enumerate(self.operations) if operation.session.nbytes]

    def costs(self) -> dict[str, int]:
        """Payload bytes and rounds of one query, and the bytes of a session's set-up.

        online_to_provider, online_to_patient, rounds, offline_to_provider, offline_to_patient (nothing: its seed of
        16 bytes serves the whole session), setup_to_patient
        """
        operations = [operation for _, operation in self.operations]
        answer = self.answer_itemsize * self.plan.classes
        return {
            "online_to_provider": sum(operation.sent_by_patient for operation in operations) + 8,
            "online_to_patient": sum(operation.sent_by_provider for operation in operations) + answer,
            "rounds": sum(operation.rounds for operation in operations) + 1,
            "offline_to_provider": sum(operation.corrections.nbytes for operation in operations),
            "offline_to_patient": 0,
            "setup_to_patient": sum(operation.session.nbytes for operation in operations) + 32,
            "comparisons": sum(operation.comparisons for operation in operations),
        }

    @property
    def answer_itemsize(self) -> int:
        """Bytes of one logit's share."""
        return 8 if isinstance(self.plan.steps[-1], steps.NormalisedLinear) else 4

    def describe(self, tag: int) -> str:
        """What the message with this tag is, in words: for transcripts."""
        if tag >= DIGEST:
            return _NAMES[tag]
        i, operation = self.operations[tag // TAGS]
        return f"{self.plan.steps[i].name}: {operation.messages[tag % TAGS]}"
