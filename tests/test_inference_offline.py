"""Private inference without a crypto-provider: what the two parties make equals what one would have dealt, and hides.

Equal: the crypto-provider's own ``deal``, given what both parties ended with as their draws, computes the corrections
that the provider ended with. Hidden: every message is uniform, alone and against what its receiver knows. Honest runs
draw from the operating system and stay above 1e-9 for every p-value; each planted fault falls below 1e-12.
"""

import numpy as np
import pytest
import torch
from test_inference_privacy import CAUGHT, IMAGES, p_uniform, tiny
from torch import nn

from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.plan import evaluate
from dopamine_lib.inference.network.rehearsal import at_once
from dopamine_lib.inference.offline import correlations, parties, products, transfer
from dopamine_lib.inference.offline.correlations import Correlations, Direction
from dopamine_lib.inference.offline.products import N, PatientProducts, ProviderProducts, pack
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import ChannelError, Recorded, local_pair
from dopamine_lib.inference.protocols.comparison import COARSE
from dopamine_lib.inference.protocols.convolution import Branch, Convolution, ConvolutionOperation
from dopamine_lib.inference.protocols.normalised import NormalisedOperation
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Own, Workspace
from dopamine_lib.inference.protocols.pooling import MaximumOperation
from dopamine_lib.inference.protocols.relu import ReLU6Operation, ReLUOperation
from dopamine_lib.inference.protocols.room import RoomOperation
from dopamine_lib.inference.protocols.truncation import RangeOperation, TruncationOperation
from dopamine_lib.models.features import NormalisedFeatures

CLEAN = 1e-9
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _numpy_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "active", lambda: kernels)


class Pair:
    """Both sides of something that is made over a channel, and what went over it."""

    def __init__(self, patient, provider):
        self.ends = [Recorded(end) for end in local_pair()]
        self.sides = at_once(lambda: patient(self.ends[0]), lambda: provider(self.ends[1]))

    def __call__(self, one, other):
        """Let both sides work; returns the two results."""
        return at_once(lambda: one(self.sides[0]), lambda: other(self.sides[1]))

    def log(self, direction):
        """The payloads of the patient's end."""
        return [np.frombuffer(data, np.uint8) for way, _, data in self.ends[0].log if way == direction]


def making():
    return Pair(lambda end: Correlations(PATIENT, end, 1), lambda end: Correlations(PROVIDER, end, 1))


def multiplying():
    return Pair(lambda end: PatientProducts(end, 1), lambda end: ProviderProducts(end, 1))


def empty(operation, weights=None):
    """What patient and provider hold for an operation, not yet filled."""

    def arrays(layout):
        return layout.arrays(np.zeros(layout.nbytes, np.uint8))

    provider = arrays(operation.provider) | arrays(operation.corrections)
    return Own(**arrays(operation.patient)), Own(**provider, weights=weights)


def made(operation, pair, weights=None):
    own, make = empty(operation, weights), parties.MADE[type(operation)]
    pair(lambda side: make(side, operation, own[0]), lambda side: make(side, operation, own[1]))
    return own


OPERATIONS = [
    MaximumOperation(1001),
    MaximumOperation(5, watch=False),
    MaximumOperation(1001, coarse=COARSE),
    ReLUOperation(999, 17),
    ReLUOperation(40, 0),
    ReLUOperation(7, 30),
    ReLU6Operation((2, 3, 3), 9),
    RoomOperation(),
    TruncationOperation((3, 5, 47), 13),
    TruncationOperation((9, 1, 1), 0, bits=64),
    RangeOperation([105, 9]),
    NormalisedOperation(33, 5, 20),
]


def test_what_the_parties_make_is_what_a_crypto_provider_would_have_dealt(monkeypatch):
    monkeypatch.setattr(correlations, "BLOCK", 512)  # so that some take two
    pair, matrix = making(), RNG.integers(0, 2**64, (5, 33), np.uint64)
    for operation in OPERATIONS:
        weights = [matrix] if operation.weight_masks.nbytes else []
        patient, provider = made(operation, pair, weights)
        _, wanted = empty(operation)
        operation.deal(patient, provider, wanted, weights, Workspace())
        for name in operation.corrections.fields:
            found = np.asarray(getattr(provider, name))
            assert np.array_equal(found, getattr(wanted, name)), (operation, name)
            assert found.any()
    assert set(map(type, OPERATIONS)) == set(parties.MADE)


# --- products by BFV -------------------------------------------------------------------------------------


def convolution(shape, *branches, flat=False):
    layer = Convolution("c", (0,), (1, 1, 1), 1.0, branches, flat)
    return ConvolutionOperation(Convolution("c", (0,), layer.output_shape(shape), 1.0, branches, flat), shape)


def multiplied(pair, operation, a, weights):
    shares = np.empty((2, *operation.layer.shape), np.uint32)
    pair(lambda side: side.multiply(operation, a, shares[0]), lambda side: side.multiply(operation, weights, shares[1]))
    return shares


def ring(*shape):
    return RNG.integers(0, 2**32, shape, np.uint32)


def test_shares_of_a_product_add_up_to_it_exactly():
    """Values and weights anywhere in the ring; strides, padding, groups, branches, strips of a tall image, vectors."""
    pair = multiplying()
    for operation in (
        convolution((3, 12, 12), Branch(4, (3, 3), (2, 2), (1, 1))),
        convolution((4, 9, 7), Branch(3, (1, 1), (1, 1), (0, 0)), Branch(5, (3, 3), (1, 1), (1, 1))),
        convolution((4, 5, 5), Branch(2, (3, 2), (1, 1), (1, 0), groups=2)),
        convolution((2, 100, 90), Branch(2, (5, 3), (2, 3), (2, 1))),
        convolution((3, 5, 2), Branch(7, (1, 1), (1, 1), (0, 0)), flat=True),
    ):
        channels = operation.input_shape[0]
        a, weights = (
            ring(*operation.input_shape),
            [ring(b.channels, b.inputs(channels)) for b in operation.layer.branches],
        )
        wanted = operation.convolve(a, weights, Workspace(), np.empty(operation.layer.shape, np.uint32))
        assert np.array_equal(multiplied(pair, operation, a, weights).sum(0, dtype=np.uint32), wanted)


def test_compiled_transforms_give_the_same_residues(monkeypatch):
    pytest.importorskip("numba")
    plain = products.scheme().ring
    monkeypatch.setattr(kernels, "active", lambda: None)
    ring, primes = products.scheme().ring, np.array(plain.primes)[:, None]
    residues = np.concatenate([RNG.integers(0, primes, (2, len(primes), N)), (primes - 1 + np.zeros((1, 1, N), int))])
    assert type(ring) is not type(plain)
    assert np.array_equal(ring.transform(residues), plain.transform(residues))
    assert np.array_equal(ring.inverse(residues), plain.inverse(residues))


def test_a_packing_keeps_the_noise_below_what_drowns_it(refuses):
    branch = Branch(4096, (1, 1), (1, 1), (0, 0))
    packing = pack(branch, (25088, 1, 1))
    assert packing.made * packing.inputs <= products.MOST_TERMS and packing.made * packing.channels <= N
    # a fresh ciphertext's noise, what wraps around t, and their products with the largest weights
    fresh = 21 * (2 * N + 1)
    noise = products.MOST_TERMS * 2**31 * fresh + (products.MOST_TERMS * 2**30 + 2) * 2**32
    assert noise < 2**85 and products.FLOOD - 86 >= 64
    assert 2 * (noise + 2**products.FLOOD) < products.parameters().q // 2**32 and products.parameters().security >= 128
    with refuses("5000", "crypto-provider"):
        pack(Branch(1, (3, 3), (1, 1), (0, 0)), (1, 5000, 5000))


ONE = convolution((1, 8, 8), Branch(1, (1, 1), (1, 1), (0, 0)))


def replies(weights, a=None):
    """Two products of one A in one session: the shares of the patient, its scheme and the replies (2, 2, L, N)."""
    pair, a = multiplying(), ring(*ONE.input_shape) if a is None else a
    shares = [multiplied(pair, ONE, a, weights)[0] for _ in range(2)]
    sent = np.stack([reply.view("<u4").reshape(2, -1, N) for reply in pair.log("received")]).astype(np.int64)
    return shares, pair.sides[0], sent


def worst_reply(weight=0):
    """The smallest p-value of what a patient can see in a reply, for one weight."""
    weights = [np.full((1, 1), weight, np.uint32)]
    (one, other), patient, sent = replies(weights)
    values = [p_uniform(part.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]) for part in np.moveaxis(sent, 1, 0)]
    scheme, secret = patient._scheme, patient._secret
    messages = np.stack([scheme.decrypt(secret, tuple(reply)) for reply in sent]).astype(np.uint32)
    values.append(p_uniform(messages.view(np.uint8).reshape(-1, 4)))
    values.append(p_uniform((messages[0] - messages[1]).view(np.uint8).reshape(-1, 4)))
    delta = scheme.parameters.delta
    left = [
        scheme.phase(secret, tuple(reply)) - delta * m.astype(object) for reply, m in zip(sent, messages, strict=True)
    ]
    upper = np.array([[int(e % delta) >> products.FLOOD - 8 & 255 for e in noise] for noise in left], np.uint8)
    return min([*values, p_uniform(upper.reshape(-1, 1))])


def test_a_reply_shows_nothing_of_the_weights():
    """Both components, the message, the difference of two messages for one A, and the noise, are uniform."""
    assert min(worst_reply(weight) for weight in (0, 2**31)) > CLEAN


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (products, "flood", lambda scheme: np.int64(0)),  # the noise of a product is left as it is
        (ProviderProducts, "_masked_zero", lambda self: np.zeros((2, products.LIMBS, N), np.int64)),
        (products, "random_ring", lambda shape: np.zeros(shape, np.uint32)),  # the message is not masked
        (products, "random_ring", lambda shape: np.random.default_rng(1).integers(0, 2**32, shape, np.uint32)),
    ],
    ids=["no flooding", "not randomised", "no mask", "one mask twice"],
)
def test_a_reply_that_shows_something_is_caught(owner, name, fault, monkeypatch):
    monkeypatch.setattr(owner, name, fault)
    assert worst_reply() < CAUGHT


def test_the_provider_sees_ciphertexts_alone():
    """Of an A of zeros the patient's messages are uniform: the public key, and both components of each."""
    pair = multiplying()
    multiplied(pair, ONE, np.zeros(ONE.input_shape, np.uint32), [np.ones((1, 1), np.uint32)])
    sent = np.stack([data.view("<u4").reshape(2, -1) for data in pair.log("sent")])
    assert p_uniform(sent.reshape(-1, 1).view(np.uint8)[:, :3]) > CLEAN


# --- oblivious transfer ----------------------------------------------------------------------------------


def test_both_base_keys_are_points_of_the_curve(monkeypatch):
    """As honest keys are: 32 random bytes are one in half of all cases only, and would show what was not chosen."""

    def outside():
        pair = Pair(
            lambda end: transfer.choose_base(end, 1, np.arange(transfer.WIDTH) % 2),
            lambda end: transfer.send_base(end, 1),
        )
        chosen, both = pair.sides
        assert all(seed == two[i % 2] != two[1 - i % 2] for i, (seed, two) in enumerate(zip(chosen, both, strict=True)))
        keys = pair.log("sent")[0].reshape(-1, 32)
        assert len({key.tobytes() for key in keys}) == 2 * transfer.WIDTH
        return sum(not transfer.on_curve(int.from_bytes(key.tobytes(), "little")) for key in keys)

    assert outside() == 0
    monkeypatch.setattr(transfer, "keyless", lambda: RNG.bytes(31) + bytes(1))
    assert outside() > 16  # of 128, half: fewer with probability 1e-19


def test_a_key_of_small_order_is_refused():
    with pytest.raises(ChannelError, match="no point"):
        Pair(lambda end: end.send(1, np.zeros((128, 2, 32), np.uint8)), lambda end: transfer.send_base(end, 1))


class Spied:
    """One ReLU made by both parties, with all that went over the channel."""

    def __init__(self, monkeypatch, count=4096):
        self.parts, sent = [], Direction.sent

        def spied(direction):
            if not direction.chooser:
                self.parts.append(direction._last)
            sent(direction)

        def message(direction, **fields):
            direction._last = make(direction, **fields)
            return direction._last

        make = Direction.message
        with monkeypatch.context() as patch:
            patch.setattr(Direction, "sent", spied)
            patch.setattr(Direction, "message", message)
            self.pair = making()
            for end in self.pair.ends:
                end.log.clear()
            self.patient, self.provider = made(ReLUOperation(count, 12), self.pair)

    def columns(self):
        """Each extension's columns, (128, bytes), in either direction."""
        sent, received = self.pair.log("sent"), self.pair.log("received")
        return sent[0].reshape(128, -1), received[1].reshape(128, -1)

    def worst(self):
        """The smallest p-value of what is sent and of what is made."""
        views = [*self.pair.log("sent"), *self.pair.log("received"), *self.columns()]
        views += [columns[:-1] ^ columns[1:] for columns in self.columns()]  # choices without a mask would cancel
        forward, backward = self.parts
        for lower, other in ((forward.d[-1], forward.t[0]), (forward.rho, forward.s1), (backward.s0, backward.s1)):
            words = lower.astype("<u4").view("<u2").reshape(*lower.shape, 2)
            views += [words[..., 0] - other, words[..., 1] - other]
        views += [forward.rho - forward.s0]
        views += [forward.d ^ forward.rho, forward.group1[:, :] ^ forward.group2[:1]]
        one, other = self.patient, self.provider
        views += [own.__dict__[name] for own in (one, other) for name in ("bits", "rho", "thermometer", "products")]
        views += [
            one.extra,
            other.extra,
            one.tops,
            other.tops,
            one.bits ^ other.bits,
            one.rho - one.r,
            other.rho - other.r,
        ]
        for r in (one.r, other.r, one.r - other.r):  # its lower 12 bits are 0
            assert not (r & 2**COARSE - 1).any()
            views += [(r >> COARSE).astype(np.uint16), (r >> 24).astype(np.uint8)]
        return min(p_uniform(np.ascontiguousarray(view).reshape(-1).view(np.uint8)[:, None]) for view in views)


def test_all_that_is_sent_and_made_is_uniform(monkeypatch):
    assert Spied(monkeypatch).worst() > CLEAN


def one_word(direction, d, planes, word, *rest, use=0):
    return PRODUCT(direction, d, planes, 0, *rest, use=use)


PRODUCT = Direction.product


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (Direction, "product", one_word),  # one pad for two messages
        (correlations, "fresh_seed", lambda: bytes(16)),  # both parties draw from one seed
        (transfer, "_seed", lambda own, public, number: bytes(16)),  # one seed for all columns: choices unmasked
    ],
    ids=["pad used twice", "one seed at both", "choices unmasked"],
)
def test_a_fault_in_the_transfers_is_caught(owner, name, fault, monkeypatch):
    monkeypatch.setattr(owner, name, fault)
    assert Spied(monkeypatch).worst() < CAUGHT


def test_a_chooser_has_one_pad_of_two():
    pair = Pair(lambda end: transfer.Chooser(end, 1), lambda end: transfer.Sender(end, 1))
    choices = RNG.integers(0, 256, (3, 64), np.uint8)
    own, both = pair(lambda side: side.extend(choices), lambda side: side.extend(3, 512))
    (had,), pads = own.of(slice(3), 5, np.uint8), both.of(slice(3), 5, np.uint8)
    bits = np.unpackbits(choices, axis=1, bitorder="little")[..., None]
    assert np.array_equal(had, np.where(bits, pads[1], pads[0]))
    other = np.where(bits, pads[0], pads[1])
    assert (
        min(
            p_uniform((other ^ had).reshape(-1, 16)),
            p_uniform((own.of(slice(3), 6, np.uint8)[0] ^ had).reshape(-1, 16)),
        )
        > CLEAN
    )


# --- whole queries ---------------------------------------------------------------------------------------


def head():
    """A convolution, and a head on normalised features."""
    torch.manual_seed(1)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormalisedFeatures(), nn.Linear(6, 3)
    return compile_model(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), *end).eval(), 4, torch.rand(8, 1, 4, 4) * 2 - 1)


@pytest.mark.parametrize("answer", ["scores", "grade", "scores of a head"])
def test_answers_are_those_with_a_crypto_provider(answer):
    """Two queries prepared ahead, all of whose randomness differs; then what is sent online is what the plan says."""
    plan, weights = head() if answer.endswith("head") else tiny(1, answer)
    pair = Pair(lambda end: parties.Patient(plan, end), lambda end: parties.Provider(plan, weights, end))
    pair(lambda side: side.setup(), lambda side: side.setup())
    for _ in range(2):
        pair(lambda side: side.prepare(), lambda side: side.prepare())
    for side in pair.sides:
        one, other = (np.concatenate(prepared.buffers) for prepared in side._ready)
        assert (one != other)[one | other != 0].mean() > 0.9
    for x in IMAGES:
        before = len(pair.ends[0].log)
        found, _ = pair(lambda side: side.infer(x), lambda side: side.serve())  # noqa: B023
        wanted, _ = evaluate(plan, weights, x)
        assert np.abs(found - wanted).max() < (0.5 if answer == "grade" else 1e-3 * np.ptp(wanted))
        online = sum(len(data) for way, _, data in pair.ends[0].log[before:] if way == "sent")
        assert online == plan.costs()["online_to_provider"]


def test_an_operation_that_nobody_can_make_is_refused(refuses, monkeypatch):
    monkeypatch.delitem(parties.MADE, ReLUOperation)
    with refuses("ReLUOperation", "use a crypto-provider"):
        parties.check_plan(tiny(1)[0])
