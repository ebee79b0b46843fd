"""What each party sees is independent of the other's secret; and the test of it fails where a mask is misused.

A tiny network, a few hundred queries from seeds, every byte between the parties recorded. Three views:

    received  each byte a party receives, by position: uniform on 256 values
    opened    what both shares of a message add up to: uniform
    known     the opened value together with the receiver's own mask: uniform on pairs

Each is one chi-square statistic, summed over the positions of a message, and a p-value. Honest runs must stay above
1e-6 for every message of every view (about 60 of them: a false alarm in 20,000 honest runs, and the seeds are fixed);
a planted fault must fall below 1e-12.
"""

import numpy as np
import pytest
import torch
from private_session import with_weights
from scipy.stats import chi2
from torch import nn

from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.crypto_provider import CryptoProvider
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.network.plan import ANSWER, DIGEST, MODEL, QUERY, Weights
from dopamine_lib.inference.network.rehearsal import Rehearsal, at_once
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import Recorded, local_pair
from dopamine_lib.inference.protocols.comparison import Comparison, halves
from dopamine_lib.inference.protocols.normalised import NormalisedOperation
from dopamine_lib.inference.protocols.operation import TAGS, BufferLayout
from dopamine_lib.inference.protocols.pooling import MaximumOperation
from dopamine_lib.inference.protocols.randomness import query_key
from dopamine_lib.inference.protocols.relu import ReLUOperation
from dopamine_lib.inference.protocols.truncation import RangeOperation, TruncationOperation

QUERIES, MANY = 256, 4000
CLEAN, CAUGHT = 1e-6, 1e-12
IMAGES = [np.full((1, 4, 4), value, np.float32) for value in (-1.0, 1.0)]


def tiny(seed, answer="scores"):
    """A network of a convolution, a maximum, ReLU, and two linear layers with a truncation between them."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d((1, 2)), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)
    net = nn.Sequential(*layers)
    return compile_model(net, 4, torch.rand(8, 1, 4, 4) * 2 - 1, answer=answer)


PLAN, WEIGHTS = tiny(1)


class Run:
    """Many queries on one image in one session; all messages are in ``messages[side, direction, tag]`` (N, bytes)."""

    def __init__(self, image, queries=QUERIES, one_seed=False, model=(PLAN, WEIGHTS)):
        self.plan, self.queries, self.session = model[0], queries, Rehearsal(*model, seed=5)
        if one_seed:
            seed = self.session.crypto_provider.provider_seed = self.session.crypto_provider.patient_seed
            self.session.provider._seed = seed

        def patient():
            for _ in range(queries):
                self.session.patient.prepare()
                self.session.patient.infer(image)

        def provider():
            for _ in range(queries):
                self.session.provider.prepare(self.session.offline)
                self.session.provider.serve()

        def deal():
            for _ in range(queries):
                self.session.crypto_provider.send(self.session.dealt)

        at_once(patient, provider, deal)
        self.session.close()
        self.messages = {}
        for side, end in (("patient", self.session.patient_end), ("provider", self.session.provider_end)):
            for direction, tag, payload in end.log:
                if tag not in (DIGEST, MODEL, QUERY, ANSWER):
                    self.messages.setdefault((side, direction, tag), []).append(np.frombuffer(payload, np.uint8))
        self.messages = {key: np.stack(rows) for key, rows in self.messages.items()}

    def received(self):
        return {(side, tag): rows for (side, direction, tag), rows in self.messages.items() if direction == "received"}

    @property
    def truncations(self):
        return [
            i for i, (_, operation) in enumerate(self.plan.operations) if isinstance(operation, TruncationOperation)
        ]

    def opened(self):
        """Per side and message that opens a value: the opened bytes (N, n), and the side's own mask of them."""
        for i, (_, operation) in enumerate(self.plan.operations):
            if not isinstance(operation, Comparison | TruncationOperation | RangeOperation):
                continue
            for side, party, part in (
                ("patient", self.session.patient, "patient"),
                ("provider", self.session.provider, "provider"),
            ):

                def drawn(i, name, party=party, part=part):
                    """One array of all queries, in bytes (N, n)."""
                    layout = getattr(self.plan.operations[i][1], part)
                    rows = [layout.draw(query_key(party._seed, query), i)[name] for query in range(self.queries)]
                    return np.stack([row.reshape(-1).view(np.uint8) for row in rows])

                if isinstance(operation, RangeOperation):
                    masks = [np.hstack([drawn(j, "bits") for j in self.truncations])]
                else:
                    masks = [drawn(i, "r")]
                if isinstance(operation, Comparison):
                    bits = drawn(i, "bits").reshape(self.queries, -1, operation.padded // 8)
                    six = [7, 8, *range(6)] if operation.watched else [*range(6)]
                    masks += [bits[:, some].reshape(self.queries, -1) for some in (six, [6])]
                for k, mask in enumerate(masks):
                    mine = self.messages[side, "sent", TAGS * i + k]
                    theirs = self.messages[side, "received", TAGS * i + k]
                    if k or isinstance(operation, RangeOperation):
                        both = mine ^ theirs
                    elif getattr(operation, "coarse", 0):
                        both, mask = added_upper(mine, theirs), packed_upper(mask.view("<u4"))
                    else:
                        both = (mine.view("<u4") + theirs.view("<u4")).view(np.uint8)
                    yield (side, TAGS * i + k), both, mask


def packed_upper(values):
    """The upper 20 bits of values (N, n), as they travel: bytes (N, 5 n / 2)."""
    rows = np.empty((len(values), values.shape[1] * 5 // 2), np.uint8)
    for row, one in zip(rows, values, strict=True):
        kernels.pack_masked(one[:0], np.uint32(0), one, *halves(row))
    return rows


def added_upper(mine, theirs):
    """The sums that two messages open, packed again."""
    sums = np.empty((len(mine), mine.shape[1] * 2 // 5), np.uint32)
    for total, one, other in zip(sums, mine, theirs, strict=True):
        kernels.open_upper(*halves(one), *halves(other), total)
    return packed_upper(sums)


def p_uniform(rows):
    """p-value of the bytes (N, positions) being uniform, each position on its own, statistics added up."""
    n, positions = rows.shape
    counts = np.stack([np.bincount(column, minlength=256) for column in rows.T])
    return chi2.sf(((counts - n / 256) ** 2).sum() / (n / 256), 255 * positions)


def p_pairs(rows, own):
    """p-value of the pairs (low four bits here, low four bits of one's own) being uniform."""
    return p_uniform((rows & 15) << 4 | own & 15)


def p_alike(one, other):
    """p-value of two samples (N, positions) having one distribution, position by position."""
    statistic = freedom = 0
    for a, b in zip(one.T, other.T, strict=True):
        a, b = np.bincount(a, minlength=256), np.bincount(b, minlength=256)
        used = a + b > 0
        statistic += ((a - b)[used] ** 2 / (a + b)[used]).sum()
        freedom += used.sum() - 1
    return chi2.sf(statistic, max(freedom, 1))


def worst(run):
    """The smallest p-value of each view, and of all."""
    received = min(p_uniform(rows) for rows in run.received().values())
    opened = min(p_uniform(rows) for _, rows, _ in run.opened())
    known = min(p_pairs(rows, own) for _, rows, own in run.opened())
    return received, opened, known


@pytest.fixture(scope="module")
def honest():
    return [Run(image) for image in IMAGES]


def test_every_message_was_looked_at(honest):
    kinds = {tag for _, _, tag in honest[0].messages}
    wanted = {TAGS * i + k for i, (_, operation) in enumerate(PLAN.operations) for k in range(len(operation.messages))}
    assert kinds == wanted and len(wanted) == 1 + 3 + 3 + 1 + 1 + 1 + 1 + 2


def test_what_each_party_sees_is_uniform(honest):
    assert min(min(worst(run)) for run in honest) > CLEAN


def test_where_the_grade_is_opened_alone_all_else_is_uniform():
    black, white = (Run(image, model=tiny(1, "grade")) for image in IMAGES)
    assert min(*worst(black), *worst(white)) > CLEAN
    answers = {
        run: [payload for way, tag, payload in run.session.patient_end.log if tag == ANSWER] for run in (black, white)
    }
    assert all(len(payload) == 2 for payload in answers[black] + answers[white])
    shares = [np.stack([np.frombuffer(payload, np.uint8) for payload in answers[run]]) for run in (black, white)]
    assert min(*map(p_uniform, shares), p_alike(*shares)) > CLEAN


@pytest.mark.slow
def test_what_each_party_sees_is_uniform_in_many_queries():
    runs = [Run(image, MANY) for image in IMAGES]
    assert min(min(worst(run)) for run in runs) > CLEAN
    black, white = (run.received() for run in runs)
    assert min(p_alike(black[key], white[key]) for key in black) > CLEAN


def test_what_each_party_sees_is_the_same_for_two_images(honest):
    black, white = (run.received() for run in honest)
    assert min(p_alike(black[key], white[key]) for key in black) > CLEAN


def test_the_patient_can_work_out_the_provider_s_last_message_from_the_answer(honest):
    """The answer's share is the answer minus the patient's own share: it says no more than the answer does."""
    answers = [payload for direction, tag, payload in honest[0].session.patient_end.log if tag == ANSWER]
    assert p_uniform(np.stack([np.frombuffer(payload, np.uint8) for payload in answers])) > CLEAN


class Block(nn.Module):
    """Convolutions of each channel, ReLU6, a batch normalisation by itself, and a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.each = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.norm, self.clip, self.last = nn.BatchNorm2d(2), nn.ReLU6(), nn.Linear(8, 2)

    def forward(self, x):
        """(B, 1, 4, 4) to (B, 2)."""
        x = self.clip(self.first(x))
        return self.last((self.each(x) + self.norm(x)).flatten(1))


def block():
    torch.manual_seed(2)
    return compile_model(Block(), 4, torch.rand(8, 1, 4, 4) * 2 - 1)


def test_what_each_party_sees_of_a_block_is_uniform_and_the_same_for_two_images():
    model = block()
    assert {"ReLU6", "Sum"} <= {type(layer).__name__ for layer in model[0].layers}
    runs = [Run(image, model=model) for image in IMAGES]
    assert min(min(worst(run)) for run in runs) > CLEAN
    black, white = (run.received() for run in runs)
    assert min(p_alike(black[key], white[key]) for key in black) > CLEAN


def test_one_mask_for_a_value_and_the_value_less_six_is_caught(monkeypatch):
    """ReLU6 compares twice; with one mask for both the difference of two messages would be the secret bound."""
    draw = BufferLayout.draw

    def doubled(layout, key, operation, buffer=None):
        arrays = draw(layout, key, operation, buffer)
        if "r" in arrays and len(arrays["r"]) == 16:
            arrays["r"][8:] = arrays["r"][:8]
        return arrays

    def apart(run):
        rows = [rows for (_, tag), rows, _ in run.opened() if tag % TAGS == 0 and rows.shape[1] == 40]
        lower = rows[0][:, :32].view("<u2")  # of 16 elements
        return p_uniform((lower[:, :8] - lower[:, 8:]).view(np.uint8))

    model = block()
    assert apart(Run(IMAGES[0], model=model)) > CLEAN
    monkeypatch.setattr(BufferLayout, "draw", doubled)
    assert apart(Run(IMAGES[0], model=model)) < CAUGHT


def masked_weights(weights, sessions=QUERIES):
    """F = W - B of many sessions, as the patient receives it."""
    one, other = local_pair()
    recorded = Recorded(one)
    crypto_providers = [CryptoProvider(PLAN, seed) for seed in range(sessions)]

    def patient():
        for crypto_provider in crypto_providers:
            Patient(PLAN, crypto_provider.patient_seed, recorded).setup()

    def provider():
        for crypto_provider in crypto_providers:
            Provider(PLAN, weights, crypto_provider.provider_seed, other).setup()

    at_once(patient, provider)
    one.close()
    other.close()
    rows = [b for direction, tag, b in recorded.log if tag == MODEL]
    per_session = len(rows) // sessions
    return np.stack(
        [np.frombuffer(b"".join(rows[i : i + per_session]), np.uint8) for i in range(0, len(rows), per_session)]
    )


def test_masked_weights_are_the_same_for_two_models():
    silent = Weights(
        {number: [np.zeros_like(matrix) for matrix in matrices] for number, matrices in WEIGHTS.matrices.items()},
        WEIGHTS.biases,
    )
    one, other = masked_weights(WEIGHTS), masked_weights(silent)
    assert p_uniform(one) > CLEAN and p_uniform(other) > CLEAN
    # the seeds are the same, so the difference is the weights: what one mask for two models would give away
    assert p_uniform(one - other) < CAUGHT


def head_messages(x, seeds):
    """The messages of a normalised head of 8 features and 2 classes, by direction and tag: bytes (N, n)."""
    weights = [np.arange(16, dtype=np.uint64).reshape(2, 8)]
    shares = x.astype(np.uint64), np.zeros(8, np.uint64)
    runs = [with_weights(NormalisedOperation(8, 2, 40), shares, weights, weights[0][:, 0], seed) for seed in seeds]
    return {key: np.stack([np.frombuffer(run[key], np.uint8) for run in runs]) for key in runs[0]}


def test_a_head_s_messages_are_uniform_and_alike_for_two_images():
    flat, steep = (
        head_messages(x, range(i * QUERIES, (i + 1) * QUERIES)) for i, x in enumerate((np.ones(8), np.arange(8) * 1e6))
    )
    assert len(flat) == 4 and min(p_uniform(rows) for rows in (*flat.values(), *steep.values())) > CLEAN
    assert min(p_alike(flat[key], steep[key]) for key in flat) > CLEAN
    again = head_messages(np.ones(8), [7] * QUERIES)
    assert all(p_uniform(rows) < CAUGHT for rows in again.values())


def freeze(monkeypatch, field):
    """Every layout with this field is drawn from the first query's key: its randomness is used again and again."""
    draw, first = BufferLayout.draw, {}

    def frozen(layout, key, operation, buffer=None):
        if field in layout.fields:
            key = first.setdefault((operation, layout), key)
        return draw(layout, key, operation, buffer)

    monkeypatch.setattr(BufferLayout, "draw", frozen)


def test_a_reused_input_mask_is_caught(monkeypatch):
    freeze(monkeypatch, "a")
    run = Run(IMAGES[0])
    assert p_uniform(run.received()["provider", 0]) < CAUGHT


def test_a_reused_comparison_mask_is_caught(monkeypatch):
    freeze(monkeypatch, "r")
    run = Run(IMAGES[0])
    tags = {tag for (side, tag), rows, _ in run.opened() if p_uniform(rows) < CAUGHT}
    assert len(tags) == 3 + 3 + 1 + 1  # maximum, ReLU, truncation, and its two bits, which are drawn with its mask


def test_upper_bits_that_no_mask_covers_are_caught(monkeypatch):
    """A mask of 16 bits for messages of 20 would leave the sign and the three bits below it in the open."""
    draw = BufferLayout.draw

    def short(layout, key, operation, buffer=None):
        arrays = draw(layout, key, operation, buffer)
        if "r" in arrays and "bits" in arrays:
            arrays["r"][:] &= 2**28 - 1
        return arrays

    monkeypatch.setattr(BufferLayout, "draw", short)
    caught = {tag for (_, tag), rows, _ in Run(IMAGES[0]).opened() if p_uniform(rows) < CAUGHT}
    assert len(caught) == 3 and all(tag % TAGS == 0 for tag in caught)  # maximum, ReLU, truncation


def test_the_two_bits_about_the_ring_s_end_without_masks_are_caught(monkeypatch):
    """They would tell of two upper digits of the hidden value."""
    draw = BufferLayout.draw

    def bare(layout, key, operation, buffer=None):
        arrays = draw(layout, key, operation, buffer)
        if "bits" in arrays:  # the last two of a comparison's nine, and both of a truncation's
            arrays["bits"][-2:] = 0
        return arrays

    monkeypatch.setattr(BufferLayout, "draw", bare)
    run = Run(IMAGES[0])
    kinds = [type(operation) for _, operation in PLAN.operations]
    caught = {(kinds[tag // TAGS], tag % TAGS) for (_, tag), rows, _ in run.opened() if p_uniform(rows) < CAUGHT}
    assert caught == {(MaximumOperation, 1), (ReLUOperation, 1), (RangeOperation, 0)}


def test_one_seed_at_both_parties_is_caught():
    run = Run(IMAGES[0], one_seed=True)
    caught = {(side, tag % TAGS) for (side, tag), rows, own in run.opened() if p_pairs(rows, own) < CAUGHT}
    assert {("patient", 0), ("provider", 0), ("patient", 1), ("provider", 1)} <= caught


def test_the_crypto_provider_sends_nothing_else_from_its_memory(monkeypatch):
    """The gaps between the arrays of a message are zeros, also where fresh memory is not."""
    empty = np.empty

    def dirty(*arguments, **options):
        array = empty(*arguments, **options)
        array.reshape(-1).view(np.uint8)[...] = 0xAA
        return array

    monkeypatch.setattr(np, "empty", dirty)
    gaps = 0
    for i, sent in CryptoProvider(PLAN, seed=5).deal():
        layout = PLAN.operations[i][1].corrections
        gap = sent.copy()
        for array in layout.arrays(gap).values():
            array[...] = 0
        # what is left over are bytes of earlier corrections, which the provider has seen
        gaps += layout.nbytes - sum(array.nbytes for array in layout.arrays(gap).values())
        assert 0xAA not in gap
    assert gaps


def test_no_secret_in_representations_and_errors():
    session = Rehearsal(PLAN, WEIGHTS, seed=5)
    try:
        holders = session.crypto_provider, session.patient, session.provider, WEIGHTS, session.patient_end
        texts = " ".join(map(repr, holders))
        for seed in (session.crypto_provider.patient_seed, session.crypto_provider.provider_seed):
            assert repr(seed) not in texts and seed.hex() not in texts
        assert "array" not in texts
    finally:
        session.close()
