"""What the patient is told says no more than it should: scores under noise, or the grade alone.

The provider's noise comes from the operating system; here it is drawn from a seed, except where noise itself is tested
(a false alarm in 300,000 runs).
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dopamine_lib.inference.network import parties
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.graph import Branches
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.network.plan import Plan, evaluate
from dopamine_lib.inference.network.rehearsal import Rehearsal, at_once
from dopamine_lib.inference.protocols import kernels, opening
from dopamine_lib.inference.protocols.channel import ChannelError, local_pair
from dopamine_lib.inference.protocols.operation import TAGS
from dopamine_lib.inference.protocols.randomness import query_key
from dopamine_lib.inference.protocols.sharing import signed
from dopamine_lib.models.features import NormalisedFeatures

CLEAN, CAUGHT = 1e-6, 1e-12


@pytest.fixture(autouse=True)
def _numpy_kernels(monkeypatch):
    """The networks here are tiny: compiling would take longer than everything else."""
    monkeypatch.setattr(kernels, "active", lambda: kernels)


@pytest.fixture
def seeded_noise(monkeypatch):
    rng = np.random.default_rng(8)
    draw = rng.integers
    monkeypatch.setattr(opening, "random_ring", lambda shape, bits: draw(0, 2**bits, shape, np.uint64, endpoint=False))


def conv(*after):
    return nn.Conv2d(1, 4, 3), nn.ReLU(), *after


def head():
    return conv(nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormalisedFeatures(), nn.Linear(4, 3))


def parallel():
    return conv(Branches([nn.MaxPool2d(1), nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())]))


LAST = {
    "a normalised head": head,
    "a linear layer": lambda: conv(nn.Flatten(), nn.Linear(16, 3)),
    "a linear layer on the image": lambda: (nn.Flatten(), nn.Linear(16, 3)),
    "a convolution": lambda: conv(nn.Conv2d(4, 3, 2)),
    "ReLU": conv,
    "a maximum": lambda: (nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)),
    "an average": lambda: conv(nn.AvgPool2d(2)),
    "branches": parallel,
}


def compiled(name, answer="scores"):
    torch.manual_seed(0)
    return compile_model(nn.Sequential(*LAST[name]()), 4, pictures(24), answer=answer)


def pictures(count, seed=3):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Asked:
    """An honest patient's answers to pictures: ring elements, exactly as they were opened, int64 (N, classes).

    t  the inverse norms that a normalised head let it work out, one a picture
    """

    def __init__(self, monkeypatch, plan, weights, images, seed=None):
        self.answers, self.t, session = [], [], Rehearsal(plan, weights, seed)
        decode = parties.decode
        with monkeypatch.context() as patch:
            patch.setattr(parties, "decode", lambda z, scale: (self.answers.append(z.reshape(-1)), decode(z, scale))[1])

            def patient():
                for x in images:
                    session.patient.prepare()
                    session.patient.infer(x)

            def provider():
                for _ in images:
                    session.provider.prepare(session.offline)
                    session.provider.serve()

            at_once(patient, provider, lambda: [session.crypto_provider.send(session.dealt) for _ in images])
        session.close()
        self.answers = signed(np.stack(self.answers)).astype(np.int64)
        last = max(i for i, (number, _) in enumerate(plan.operations) if number < len(plan.layers))
        sent = [payload for way, tag, payload in session.patient_end.log if (way, tag) == ("sent", TAGS * last + 2)]
        for query, payload in enumerate(sent if "k" in plan.operations[last][1].patient.fields else []):
            own = plan.operations[last][1].patient.draw(query_key(session.patient._seed, query), last)
            self.t.append(int((np.frombuffer(payload, np.uint64) + own["k"])[0]))


def exactly(monkeypatch):
    """The fault: answers are opened as they are."""
    monkeypatch.setattr(parties, "noise", lambda bits, shape, ring_bits: np.zeros(shape, opening.RINGS[ring_bits]))


def p_stated(difference, bits):
    """p-value of integers being sums of 12 uniform ones of ``bits`` bits, less their mean."""
    stated = np.random.default_rng(0).integers(0, 2**bits, (12, 200_000)).sum(0) - 6 * (2**bits - 1)
    return stats.ks_2samp(difference.ravel(), stated).pvalue


@pytest.mark.parametrize("name", LAST)
@pytest.mark.usefixtures("seeded_noise")
def test_whatever_the_last_layer_an_answer_is_the_exact_one_and_fresh_noise(name, monkeypatch):
    plan, weights = compiled(name)
    images = pictures(100).numpy()
    noisy = Asked(monkeypatch, plan, weights, images, seed=5).answers
    exactly(monkeypatch)
    exact = Asked(monkeypatch, plan, weights, images, seed=5).answers  # seeds are the same, so all roundings are
    if name == "a normalised head":  # whose spread has noise of its own
        exact = np.rint([evaluate(plan, weights, x)[0] * plan.layers[-1].scale for x in images]).astype(np.int64)
    difference = noisy - exact
    assert p_stated(difference, plan.noise_bits) > CLEAN > CAUGHT > p_stated(exact - exact, plan.noise_bits)
    assert abs(difference).max() < 7 * 2**plan.noise_bits
    largest = abs(exact).max()
    assert 2.0**-16 < 2**plan.noise_bits / largest < 2.0**-12  # of the scores: far below any error that matters


# an honest patient's ways to the provider's biases


def remainders(answers, t):
    """Biases (classes,) by the Chinese remainder theorem: t u + b is b modulo t, for every picture's t."""
    found = []
    for column in answers.T:
        modulus, value = 1, 0
        for answer, its in zip(map(int, column[:8]), t, strict=False):
            common = math.gcd(modulus, its)
            step = (answer - value) // common * pow(modulus // common, -1, its // common) % (its // common)
            value, modulus = value + modulus * step, modulus // common * its
        found.append(value - modulus if value > modulus // 2 else value)
    return np.array(found, float)


def averages(answers, features):
    """Biases by least squares from what the patient knows of its own features (N, n)."""
    known = np.column_stack([features, np.ones(len(features))])
    return np.linalg.lstsq(known, answers.astype(float), rcond=None)[0][-1]


@pytest.mark.usefixtures("seeded_noise")
def test_a_thousand_answers_tell_no_more_of_biases_than_ideal_answers_with_the_stated_noise(monkeypatch):
    """Before: eight answers gave all of them exactly."""
    plan, weights = compiled("a normalised head")
    images = pictures(1000, seed=4)
    biases = signed(weights.biases[max(weights.biases)]).astype(float)
    torch.manual_seed(0)
    features = nn.Sequential(*head()[:-1])(images).detach().double().numpy()
    scale, sigma = plan.layers[-1].scale, 2.0**plan.noise_bits
    ideal = np.array([evaluate(plan, weights, x)[0] * scale for x in images.numpy()])
    ideal += opening.noise(plan.noise_bits, ideal.shape).view(np.int64)

    def closest(asked):
        ways = remainders(asked.answers, asked.t), averages(asked.answers, features[: len(asked.t)])
        return min(np.abs(way - biases).max() for way in ways)

    asked = Asked(monkeypatch, plan, weights, images.numpy(), seed=5)
    best = np.abs(averages(ideal, features) - biases).max()
    assert best / 5 < closest(asked) and sigma / 1000 < best < sigma
    left = asked.answers % np.array(asked.t)[:, None] / np.array(asked.t)[:, None]
    assert stats.kstest(left.ravel(), "uniform").pvalue > CLEAN
    exactly(monkeypatch)
    assert closest(Asked(monkeypatch, plan, weights, images[:8].numpy(), seed=5)) == 0


def test_noise_is_what_its_docstring_says():
    for bits, ring_bits in ((1, 32), (14, 32), (45, 64), (58, 64)):
        e = signed(opening.noise(bits, (20000,), ring_bits)).astype(float)
        assert abs(e.mean()) < 6 * 2**bits / math.sqrt(len(e)) and abs(e).max() <= 6 * 2**bits
        assert bits == 1 or p_stated(e, bits) > CLEAN
    assert not np.array_equal(opening.noise(40, (4,)), opening.noise(40, (4,)))


# the grade alone


@pytest.mark.parametrize("name", LAST)
def test_the_grade_alone_is_the_largest_score(name):
    plan, weights = compiled(name, "grade")
    assert plan.answer == "grade" and plan.noise_bits == 0
    assert Plan.from_json(plan.to_json()) == plan
    scores, its = compiled(name)
    assert plan.layers[: len(scores.layers)] == scores.layers and plan.classes == scores.classes
    with Rehearsal(plan, weights) as session:
        clear = 0
        for x in pictures(40, seed=9).numpy():
            exact = np.sort(evaluate(scores, its, x)[0])
            if exact[-1] - exact[-2] > 2.0**-10 * np.abs(exact).max():
                clear += 1
                told, room = evaluate(plan, weights, x)
                assert np.array_equal(session.infer(x), told) and room[f"{len(plan.layers) - 1} largest"] < 1
        assert clear > 10


def test_the_grade_among_a_thousand_and_its_bytes_on_the_channel():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1000))
    x = pictures(8)
    plan, weights = compile_model(net, 4, x, answer="grade")
    costs = plan.costs()
    with Rehearsal(plan, weights) as session:
        sent, received, rounds = session.patient_end.sent, session.patient_end.received, session.patient_end.rounds
        assert session.infer(x[0].numpy()) == net(x)[0].argmax()
        assert session.patient_end.sent - sent == costs["online_to_provider"]
        assert session.patient_end.received - received == costs["online_to_patient"]
        assert session.patient_end.rounds - rounds <= costs["rounds"] == 1 + 3 * 10 + 2 + 1 + 1
        assert costs["comparisons"] == 999
        assert [len(message.content) for message in session.messages if message.what == "answer's share"] == [2]


def test_a_plan_that_would_open_scores_without_noise_is_refused(refuses):
    for name, answer, bits in (
        ("a convolution", "scores", 0),
        ("a normalised head", "scores", 59),
        ("ReLU", "grade", 1),
    ):
        record = compiled(name, answer)[0].to_json()
        before = f'"noise_bits": {compiled(name, answer)[0].noise_bits}'
        with refuses("the answer's noise has"):
            Plan.from_json(record.replace(before, f'"noise_bits": {bits}'))
    with refuses("takes the largest of 16 without 20 bits"):
        Plan.from_json(compiled("ReLU", "grade")[0].to_json().replace('"dropped": 16', '"dropped": 20'))


def test_parties_of_different_answers_do_not_meet():
    (one, weights), (other, _) = compiled("ReLU"), compiled("ReLU", "grade")
    assert one.digest() != other.digest()
    left, right = local_pair()
    with pytest.raises(ChannelError, match="another plan|closed the connection|broke"):
        at_once(Patient(other, bytes(16), left).setup, Provider(one, weights, bytes(16), right).setup)
