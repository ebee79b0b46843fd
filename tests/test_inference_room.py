"""How much of the ring's room pictures take that no scale was set on, and that the patient is told where it is near."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from dopamine_lib import data
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.plan import Plan, evaluate
from dopamine_lib.inference.network.rehearsal import Rehearsal, at_once, deal
from dopamine_lib.inference.network.serving import calibration_images, extremes, load
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import Recorded, local_pair
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Party
from dopamine_lib.inference.protocols.pooling import MaximumOperation
from dopamine_lib.inference.protocols.relu import ReLU6Operation, ReLUOperation
from dopamine_lib.inference.protocols.room import RoomOperation, times
from dopamine_lib.inference.protocols.sharing import share
from dopamine_lib.inference.protocols.truncation import RangeOperation, TruncationOperation
from dopamine_lib.models.features import NormalisedFeatures, backbone
from dopamine_lib.models.networks import HALF, IMAGENET, build, to_input
from dopamine_lib.models.weights import load_weights
from dopamine_lib.page.served_model import SERVED

#: Within this of the two bounds it may be said either way.
FUZZY = 2**23


def room_used(plan, weights, pictures):
    return max(max(evaluate(plan, weights, plan.to_input(picture))[1].values()) for picture in pictures)


def test_pictures_unlike_any_calibrated_on_leave_room():
    start = load_weights()
    plan, weights = compile_model(backbone(start), 64, to_input(calibration_images(64), start.mean, start.std), *HALF)
    unseen = np.concatenate(
        [extremes(64, seed=9), np.random.default_rng(9).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)]
    )
    assert room_used(plan, weights, unseen) < 0.75


@pytest.mark.slow
def test_real_eyes_leave_room_with_large_activations(shared_data):
    start = load_weights(shared_data / "squeezenet1_1_features_imagenet.npz")
    calibration = to_input(calibration_images(224), start.mean, start.std)
    plan, weights = compile_model(backbone(start), 224, calibration, *IMAGENET)
    eyes = data.load("aptos", shared_data / "aptos2019", size=224).images[::60]
    assert room_used(plan, weights, eyes) < 0.75
    assert room_used(plan, weights, extremes(224, seed=9)) < 0.75


def driven(net, start, size, steps=40):
    """A picture made by gradient ascent to drive the net's largest output as far up as it goes."""
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, size, size, requires_grad=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (start.mean, start.std))
    ascent = torch.optim.Adam([pixels], lr=0.05)
    for _ in range(steps):
        ascent.zero_grad()
        (-net((pixels - mean) / std).amax()).backward()
        ascent.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    return (pixels.detach()[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def test_a_picture_made_to_leave_the_ring_is_reported_and_its_pixels_in_another_order_are_not():
    start = load_weights()
    net = build("squeezenet", 5, start, 0).eval()
    plan, weights = compile_model(net, 64, to_input(calibration_images(64), start.mean, start.std), *HALF)
    made = driven(net.features[:10], start, 64)
    shuffled = np.random.default_rng(0).permutation(made.reshape(-1, 3)).reshape(made.shape)
    assert room_used(plan, weights, [made]) > 1.5 and room_used(plan, weights, [shuffled]) < 0.5
    assert reported(plan, weights, [made, shuffled, made]) == [True, False, True]


def reported(plan, weights, pictures):
    """Whether each picture is said to come near the ring's end, by the real parties in one session."""
    said = []
    kernels.active()  # compiled now rather than while a message is waited for
    with Rehearsal(plan, weights) as session:
        for picture in pictures:
            session.infer(plan.to_input(picture))
            said.append(session.patient.exceeded)
    return said


@pytest.mark.slow
def test_every_picture_made_to_leave_the_ring_is_reported():
    """Twenty, driven for a layer and a number of steps of their own; some that come near the end leave it nowhere."""
    start = load_weights()
    net = build("squeezenet", 5, start, 0).eval()
    plan, weights = compile_model(net, 64, to_input(calibration_images(64), start.mean, start.std), *HALF)
    made = [driven(net.features[:depth], start, 64, steps) for depth in (5, 8, 10, 12) for steps in (5, 10, 20, 40, 80)]
    used = np.array([room_used(plan, weights, [picture]) for picture in made])
    said = np.array(reported(plan, weights, made))
    print(np.round(used, 2), said)
    assert (used > 1).sum() >= 10 and said[used > 0.51].all() and not said[used < 0.49].any()


@pytest.mark.slow
def test_photographs_of_other_sets_leave_room_with_the_served_model(shared_data):
    """The figures of the page on who sees what: 147 of APTOS-2019 and 200 of RetinaMNIST, enlarged."""
    plan, weights, _ = load(SERVED)
    eyes = data.load("aptos", shared_data / "aptos2019", size=64).images[::20]
    small = data.load("retinamnist", shared_data, size=64)
    used = [room_used(plan, weights, pictures) for pictures in (eyes, small.images[small.test[:200]])]
    assert len(eyes) + 200 == 347 and max(used) < 0.29
    assert not any(reported(plan, weights, eyes[::15]))


def test_features_that_spread_widely_leave_the_ring_of_the_head_no_more_than_others():
    """Averages over 4,096 places of 64 channels, half of them dark: q took 65 bits, and every answer was wrong."""
    torch.manual_seed(0)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormalisedFeatures(), nn.Linear(64, 3)
    net = nn.Sequential(nn.Conv2d(1, 64, 1), nn.ReLU(), *end).eval()
    with torch.no_grad():
        net[0].weight *= 0.1
        net[0].bias.copy_(1.25 * (torch.arange(64) % 2))
        x = torch.rand(4, 1, 64, 64) * 2 - 1
        wanted = net(x[:1])[0].numpy()
    with Rehearsal(*compile_model(net, 64, x)) as session:
        assert session.infer(x[0].numpy()) == pytest.approx(wanted, abs=2e-3) and not session.patient.exceeded


# one operation by itself


def asked(operation, *values, spoil=lambda own: None):
    """Whether values (n,) are said to be near the end, by both parties' part of one operation and of ``room``."""
    check, ends = RoomOperation(), local_pair()
    own, last = deal(operation), deal(check)
    spoil(own)
    for one in own:
        one.bias = np.full(1, 2**29, np.uint32)
    shares = list(zip(*(share(np.array(v, np.int64).astype(np.uint32)) for v in values), strict=True))

    def play(number):
        party = Party(number, ends[number])
        operation.run(party, 0, own[number], *shares[number])
        if party.asked:
            RangeOperation([operation.watched]).run(party, 8, None)
        return check.run(party, 16, last[number])

    try:
        return at_once(lambda: play(PATIENT), lambda: play(PROVIDER))[0]
    finally:
        for end in ends:
            end.close()


KINDS = {
    "ReLU": lambda x: (ReLUOperation(x.size, 7), x),
    "ReLU6": lambda x: (ReLU6Operation((1, 1, x.size), 7), x.reshape(1, 1, -1)),
    "maximum": lambda x: (MaximumOperation(x.size), x + 5, np.full(x.shape, 5)),
    "truncation": lambda x: (TruncationOperation((x.size, 1, 1), 7), x.reshape(-1, 1, 1)),
    "to a larger ring": lambda x: (TruncationOperation((1, x.size, 1), 0, bits=64), x.reshape(1, -1, 1)),
}
INSIDE = (0, -1, 2**20, 2**30 - FUZZY - 1, FUZZY - 2**30, 3 * 2**28, -3 * 2**28)
OUTSIDE = (2**30 + FUZZY, -(2**30) - FUZZY - 1, 2**31 - 1, -(2**31), 3 * 2**29, -3 * 2**29)


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_near_the_end_is_enough_wherever_it_is(kind):
    rng = np.random.default_rng(4)
    for count in (1, 8, 13):
        x = rng.choice(INSIDE, count)
        assert not asked(*KINDS[kind](x))
        for at in {0, count // 2, count - 1}:
            for value in OUTSIDE:
                y = x.copy()
                y[at] = value
                assert asked(*KINDS[kind](y))


def test_millions_of_values_inside_are_never_reported():
    x = np.random.default_rng(5).integers(FUZZY - 2**30, 2**30 - FUZZY, 2**21)
    assert not asked(TruncationOperation(x.shape, 0), x)


def test_of_scores_compared_for_the_grade_only_the_scores_themselves_are_looked_at():
    assert MaximumOperation(3, watch=False).watched == 0
    torch.manual_seed(0)
    x = torch.rand(8, 1, 4, 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    plan, weights = compile_model(net, 4, x, answer="grade")
    *_, (_, scores), (_, last), _ = plan.operations
    assert isinstance(last, RangeOperation) and isinstance(scores, TruncationOperation) and scores.shape == (3,)
    assert Plan.from_json(plan.to_json()).costs() == plan.costs()
    weights.biases[0][1] = 3 * 2**29  # as if a picture drove it there
    with Rehearsal(plan, weights) as session:
        session.infer(x[0].numpy())
        assert session.patient.exceeded


def test_scores_near_the_end_are_seen_by_the_patient():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 4, 4)
    plan, weights = compile_model(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 4, x)
    with Rehearsal(plan, weights) as session:
        session.infer(x[0].numpy())
        assert not session.patient.exceeded
        weights.biases[0][1] = 2**30 + 2**29
        session.infer(x[0].numpy())
        assert session.patient.exceeded


# what is opened


def test_the_field_is_one():
    rng = np.random.default_rng(6)
    a, b, c = (int(v) for v in rng.integers(1, 2**63, 3))
    assert times(a, b) == times(b, a) and times(a, b ^ c) == times(a, b) ^ times(a, c)
    assert times(times(a, b), c) == times(a, times(b, c)) and times(1, a) == a
    power = a
    for _ in range(63):  # a^(2^64 - 1) is 1 for every a but 0, so that every such a has an inverse
        power = times(times(power, power), a)
    assert power == 1


RUNS = 4000


def said_in_room(near, monkeypatch=None, draw=None):
    """What the patient sends, receives and works out in many runs, uint8 (RUNS, 8) each: E, F, S, result."""
    one, other = local_pair()
    log, check, results = Recorded(one), RoomOperation(), []
    if draw is not None:
        monkeypatch.setattr("dopamine_lib.inference.protocols.room.secrets.randbelow", draw)
    dealt = [deal(check) for _ in range(RUNS)]
    parties = Party(PATIENT, log), Party(PROVIDER, other)
    for party in parties:
        party.outside.update(b"near" if near and party.number == PATIENT else b"not")
    h = int.from_bytes(parties[0].outside.digest(), "little")

    def patient():
        for own, _ in dealt:
            check.run(parties[0], 0, own)

    at_once(patient, lambda: [check.run(parties[1], 0, own) for _, own in dealt])
    one.close()
    other.close()
    e, reply = ([b for way, _, b in log.log if way == wanted] for wanted in ("sent", "received"))
    e, reply = (np.array([np.frombuffer(b, "<u8") for b in rows]) for rows in (e, reply))
    for (own, _), (f, s) in zip(dealt, reply.tolist(), strict=True):
        results.append(times(f, h) ^ s ^ int(own.c[0]))
    results = np.array(results, "<u8")
    return [np.ascontiguousarray(v).view(np.uint8).reshape(RUNS, 8) for v in (e, *reply.T, results)]


def p_uniform(rows):
    counts = np.stack([np.bincount(column, minlength=256) for column in rows.T])
    return chi2.sf(((counts - len(rows) / 256) ** 2).sum() / (len(rows) / 256), 255 * rows.shape[1])


def test_the_patient_learns_one_bit_and_the_provider_nothing():
    for near in (False, True):
        *messages, result = said_in_room(near)
        assert min(map(p_uniform, messages)) > 1e-6
        assert p_uniform(result) > 1e-6 if near else not result.any()


def test_a_factor_that_stays_the_same_is_caught(monkeypatch):
    """The result would be the same for the same two hashes: more than a bit."""
    *_, result = said_in_room(True, monkeypatch, lambda below: 12345)
    assert p_uniform(result) < 1e-12
