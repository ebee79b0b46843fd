"""Patient and provider without a crypto-provider: the same sessions, for which they make the randomness themselves.

    patient, provider = Patient(plan, channel_to_provider), Provider(plan, weights, channel_to_patient)
    both setup()                                         once: base transfers, and the patient's public key
    both prepare()                                       for every image, at once, any number ahead; not beside a query
    patient.infer(x) -> logits, provider.serve()         online, as with a crypto-provider

No weights are sent masked: the patient's share of A * W comes out of its own ciphertexts.
"""

from dopamine_lib.errors import InputError
from dopamine_lib.inference.network import parties
from dopamine_lib.inference.network.plan import Plan, Weights
from dopamine_lib.inference.offline.correlations import Correlations
from dopamine_lib.inference.offline.products import PatientProducts, ProviderProducts, pack
from dopamine_lib.inference.protocols.channel import Channel
from dopamine_lib.inference.protocols.convolution import ConvolutionOperation
from dopamine_lib.inference.protocols.normalised import NormalisedOperation
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Own
from dopamine_lib.inference.protocols.pooling import MaximumOperation
from dopamine_lib.inference.protocols.randomness import fill, fresh_seed
from dopamine_lib.inference.protocols.relu import ReLU6Operation, ReLUOperation
from dopamine_lib.inference.protocols.room import RoomOperation
from dopamine_lib.inference.protocols.truncation import RangeOperation, TruncationOperation
from dopamine_lib.progress import progress_bar

#: The tag of all messages ahead of a query: their order and sizes follow from the plan.
OFFLINE = 0xD000
#: How the randomness of each kind of operation but convolutions is made: a method of ``Correlations``.
MADE = dict.fromkeys((ReLUOperation, ReLU6Operation, MaximumOperation), Correlations.comparison) | {
    TruncationOperation: Correlations.truncation,
    RangeOperation: lambda *_: None,  # truncations have what it takes
    RoomOperation: Correlations.room,
    NormalisedOperation: Correlations.normalised,
}


def check_plan(plan: Plan) -> None:
    """Raise InputError for a plan with an operation whose randomness the two parties cannot make."""
    for _, operation in plan.operations:
        if isinstance(operation, ConvolutionOperation):
            for branch in operation.layer.branches:
                pack(branch, operation.input_shape)
        elif type(operation) not in MADE:
            raise InputError(
                f"the network has a {type(operation).__name__}, whose randomness two parties cannot make alone: use a "
                "crypto-provider"
            )


class Patient(parties.Patient):
    """Holds the image; the only one who learns the answer. Raises InputError for a plan that ``check_plan`` refuses."""

    def __init__(self, plan: Plan, provider: Channel):
        check_plan(plan)
        super().__init__(plan, fresh_seed(), provider)

    def _setup(self) -> None:
        self._agree()
        self._correlations = Correlations(PATIENT, self.channel, OFFLINE)
        self._products = PatientProducts(self.channel, OFFLINE)

    def prepare(self) -> None:
        """Make the randomness of one more image, while the provider does its part. Raises ChannelError."""
        self._guarded(self._prepare)

    def _prepare(self) -> None:
        query, key = self._next_key()
        operations = [operation for _, operation in self.plan.operations]
        buffers, own = self._buffers([operation.patient.nbytes for operation in operations]), []
        # a minute for SqueezeNet: the person who waits is the patient
        for i, operation in enumerate(progress_bar(operations, title="randomness for a query", unit="operation")):
            own.append(Own(**operation.patient.arrays(buffers[i])))
            if isinstance(operation, ConvolutionOperation):
                fill(own[i].a.reshape(-1), key, i)
                self._products.multiply(operation, own[i].a, own[i].z)
            else:
                MADE[type(operation)](self._correlations, operation, own[i])
        self._ready.append(parties.Prepared(query, buffers, own))


class Provider(parties.Provider):
    """Holds the model. Raises InputError for a plan that ``check_plan`` refuses."""

    def __init__(self, plan: Plan, weights: Weights, patient: Channel):
        check_plan(plan)
        super().__init__(plan, weights, fresh_seed(), patient)

    def _setup(self) -> None:
        self._agree()
        self._correlations = Correlations(PROVIDER, self.channel, OFFLINE)
        self._products = ProviderProducts(self.channel, OFFLINE)

    def prepare(self) -> None:
        """Make the randomness of one more image, while the patient does its part. Raises ChannelError."""
        self._guarded(self._prepare_together)

    def _prepare_together(self) -> None:
        query, _ = self._next_key()
        operations = [operation for _, operation in self.plan.operations]
        buffers, own = self._buffers([o.provider.nbytes + o.corrections.nbytes for o in operations]), []
        for i, ((number, operation), buffer) in enumerate(zip(self.plan.operations, buffers, strict=True)):
            size = operation.provider.nbytes
            corrections = operation.corrections.arrays(buffer[size:])
            own.append(Own(**operation.provider.arrays(buffer[:size]), **corrections))
            if (weights := self._weights.of(number)) is not None:
                own[i].weights, own[i].bias = weights
            if isinstance(operation, ConvolutionOperation):
                self._products.multiply(operation, own[i].weights, own[i].c)
            else:
                MADE[type(operation)](self._correlations, operation, own[i])
        self._ready.append(parties.Prepared(query, buffers, own))
