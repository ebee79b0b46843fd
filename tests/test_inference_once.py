"""What is used once, and what is said of it: pads of transfers, masks of opened bits, sizes of messages, the digest.

Each byte of a pad masks one message: two under the same bytes would show their difference. No statistics: reads of the
pads are counted, for every kind of operation that two parties make randomness for.
"""

import numpy as np
import pytest
from test_inference_offline import OPERATIONS, RNG, made, making
from test_inference_privacy import PLAN, WEIGHTS

from dopamine_lib.inference.network import plan as plans
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.network.rehearsal import at_once, deal
from dopamine_lib.inference.offline import correlations
from dopamine_lib.inference.offline.correlations import Direction
from dopamine_lib.inference.offline.transfer import Pads
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import ChannelError, Recorded, local_pair
from dopamine_lib.inference.protocols.comparison import COARSE, SIGMA, Comparison
from dopamine_lib.inference.protocols.operation import BufferLayout, Party
from dopamine_lib.inference.protocols.pooling import MaximumOperation
from dopamine_lib.inference.protocols.relu import ReLU6Operation, ReLUOperation
from dopamine_lib.inference.protocols.truncation import RangeOperation, TruncationOperation

#: Besides those whose randomness is compared with a crypto-provider's: shifts where the words of a share change.
MORE = [ReLUOperation(9, shift) for shift in (1, 12, 16)]
MORE += [ReLU6Operation((1, 1, 5), 17), MaximumOperation(5, watch=False, coarse=COARSE)]
MORE += [TruncationOperation((1, 1, 1), 30, bits) for bits in (32, 64)]


@pytest.fixture(autouse=True)
def _numpy_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "active", lambda: kernels)


@pytest.fixture(scope="module")
def pair():
    return making()


class Read(np.ndarray):
    """A sender's pad that counts in ``counts`` (planes, 16) how often each of its bytes is read."""

    counts = None

    def __getitem__(self, key):
        if self.counts is not None:
            planes, *_, word = key
            size = self.dtype.itemsize
            self.counts[
                self.planes[slice(None) if planes is Ellipsis else planes], size * word : size * (word + 1)
            ] += 1
        return np.asarray(self)[key]


def most_reads(monkeypatch, operation, pair):
    """How often the byte of a pad was read that was read most often, when both parties made an operation's part."""
    of, counted = Pads.of, {}

    def counting(pads, planes, use, dtype):
        found = of(pads, planes, use, dtype)
        for which, pad in enumerate(found if pads._offset is not None else ()):
            found[which] = pad = pad.view(Read)
            # the pads are kept: another's object might take their place in memory
            _, pad.counts = counted.setdefault((id(pads), which, use), (pads, np.zeros((len(pads._rows), 16), int)))
            pad.planes = np.arange(len(pads._rows))[planes]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Pads, "of", counting)
        patch.setattr(correlations, "BLOCK", 32)
        made(operation, pair, [np.ones((5, 33), np.uint64)] if operation.weight_masks.nbytes else [])
    return max((counts.max() for _, counts in counted.values()), default=0)


@pytest.mark.parametrize("operation", OPERATIONS + MORE, ids=lambda operation: type(operation).__name__)
def test_no_byte_of_a_pad_masks_two_messages(operation, pair, monkeypatch):
    assert most_reads(monkeypatch, operation, pair) == (0 if isinstance(operation, RangeOperation) else 1)


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        (ReLUOperation(9, 12), lambda word, d: word // 2 if d.itemsize == 2 else word),  # inside the number before it
        (ReLUOperation(9, 17), lambda word, d: max(word - 1, 0)),
        (TruncationOperation((1, 1, 9), 7), lambda word, d: 0),  # the last bit of r, as that of a number and alone
        (TruncationOperation((1, 1, 9), 0, 64), lambda word, d: 0),
        (MaximumOperation(9), lambda word, d: 0),
    ],
    ids=["half a word", "a place too early", "top", "top of 64 bits", "rho"],
)
def test_two_messages_under_one_byte_are_caught(operation, fault, pair, monkeypatch):
    product = Direction.product
    monkeypatch.setattr(
        Direction,
        "product",
        lambda self, d, planes, word, *rest, use=0: product(self, d, planes, fault(word, d), *rest, use=use),
    )
    assert most_reads(monkeypatch, operation, pair) == 2


# --- what goes over the wire -----------------------------------------------------------------------------


def sent(operation, own):
    """The patient's messages by tag, of a truncation's end too (tag 8), for shares of 0 that do not change."""
    elements = operation.watched if isinstance(operation, ReLU6Operation) else getattr(operation, "count", 0)
    shape = getattr(operation, "shape", (1, 1, elements) if isinstance(operation, ReLU6Operation) else (elements,))
    shares = [np.full(shape, 12345, np.uint32)] * (2 if isinstance(operation, MaximumOperation) else 1)
    ends = [Recorded(end) for end in local_pair()]

    def play(number):
        party = Party(number, ends[number])
        operation.run(party, 0, own[number], *(share if number else -share for share in shares))
        if party.asked:
            RangeOperation([operation.watched]).run(party, 8, None)

    at_once(lambda: play(0), lambda: play(1))
    for end in ends:
        end.close()
    return {tag: np.frombuffer(data, np.uint8) for way, tag, data in ends[0].log if way == "sent"}


def ones(array):
    return int(np.unpackbits(np.ascontiguousarray(array).view(np.uint8)).sum())


SINGLE = [operation for operation in OPERATIONS + MORE if isinstance(operation, Comparison | TruncationOperation)]


@pytest.mark.parametrize("operation", SINGLE, ids=lambda operation: type(operation).__name__)
def test_messages_are_as_long_as_announced_and_a_mask_bit_masks_one_place(operation):
    """Turn random bits of the mask round, and as many are turned round of what it masks: no two places share one."""
    own = deal(operation)
    for one in own:
        one.bias = np.full(1, 5, np.uint32)
    before = sent(operation, own)
    end = RangeOperation([operation.watched]).sent_by_patient if isinstance(operation, TruncationOperation) else 0
    assert sum(map(len, before.values())) == operation.sent_by_patient + end
    assert len(before) == len(operation.messages) + bool(end)
    turned = RNG.integers(1, 256, own[0].bits.shape, np.uint8)
    if isinstance(operation, Comparison):
        turned[SIGMA] = 0  # masks the message that comes after, which depends on the others
    own[0].bits ^= turned
    after, masked = sent(operation, own), 8 if end else 1
    assert np.array_equal(before[0], after[0]) and ones(before[masked] ^ after[masked]) == ones(turned)
    if isinstance(operation, Comparison):
        own[0].bits[SIGMA] ^= 0xFF
        assert (sent(operation, own)[2] == ~after[2]).all()


# --- who may meet ----------------------------------------------------------------------------------------


def test_parties_of_two_versions_do_not_meet(monkeypatch):
    """They hold one plan, but one draws other arrays, or sends other messages, or says that its protocols differ."""

    def digest(owner=Plan, name="__doc__", value=""):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            return Plan.from_json(PLAN.to_json()).digest()

    fields = BufferLayout.__init__
    others = [
        digest(plans, "PROTOCOL", plans.PROTOCOL + 1),
        digest(TruncationOperation, "messages", ("m = x - r",)),
        digest(BufferLayout, "__init__", lambda self, **named: fields(self, **dict(reversed(named.items())))),
    ]
    assert len({PLAN.digest(), *others}) == 4 and PLAN.digest() == digest()
    for one in others:
        older = type("Older", (Plan,), {"digest": lambda self, one=one: one}).from_json(PLAN.to_json())
        left, right = local_pair()
        with pytest.raises(ChannelError, match="another version|closed the connection|broke"):
            at_once(Patient(older, bytes(16), left).setup, Provider(PLAN, WEIGHTS, bytes(16), right).setup)
