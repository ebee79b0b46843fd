"""The checker: it catches half the noise and a step that forgets the empty batch, and leaves sound ones alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.privacy.checker import chosen_event, clopper_pearson, epsilon_lower_bound
from dopamine_lib.privacy.definitions import Gaussian, Laplace, RandomisedResponse
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.loss import epsilon_at
from dopamine_lib.privacy.randomness import Randomness

DELTA = 1e-5
#: sigma of the step, at a rate where half of the batches of a hospital with one patient are empty.
SIGMA, RATE, CLIP = 12.0, 0.5, 1.0


@pytest.fixture
def one_thread():
    """Steps this small are slower on two threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def half_noise(mechanism):
    return type(mechanism)(mechanism.scale / 2, mechanism.sensitivity)


def laplace_bound(seed, kind=lambda mechanism: mechanism, samples=20_000):
    """What the checker says of a Laplace mechanism declared as epsilon = 1; returns (bound, declared)."""
    declared, rng = Laplace.for_epsilon(1.0), np.random.default_rng(seed)
    mechanism = kind(declared)
    on_d, on_d_prime = (mechanism.release(np.full(samples, x), rng) for x in (100.0, 101.0))
    return epsilon_lower_bound(on_d, on_d_prime, 0.0), 1.0


def gaussian_bound(seed, kind=lambda mechanism: mechanism, samples=400_000):
    """The same for a Gaussian of sigma = 3.73, which spends epsilon = 1.0 at delta = 1e-5."""
    declared, rng = Gaussian(3.73), np.random.default_rng(seed)
    mechanism = kind(declared)
    on_d, on_d_prime = (mechanism.release(np.full(samples, x), rng) for x in (100.0, 101.0))
    return epsilon_lower_bound(on_d, on_d_prime, DELTA), epsilon_at(declared, DELTA)


class ForgetsTheEmptyBatch(Hospital):
    """The published code (register, row 3): no noise where no patient was sampled."""

    def noised(self, clipped_sum, step):
        if len(self.sample(step)):
            return super().noised(clipped_sum, step)
        return np.zeros(len(clipped_sum), np.int64)


def step_bound(seed, kind=Hospital, steps=3000):
    """The same for one hospital's DP-SGD message without and with a second patient, all coins and noise its own."""
    features, labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1])
    torch.manual_seed(0)
    task = HeadTask(torch.nn.Linear(3, 2), features, labels)
    setting = replace(SETTINGS["FSCDP"], sample_rate=RATE, noise_multiplier=SIGMA)
    sides = []
    for patients in ([0], [0, 1]):
        randomness = Randomness(f"{seed}, {len(patients)} patients")
        plan = Plan.of(setting, Choice(0.1, CLIP), task, [np.array(patients)])
        hospital = kind(0, np.array(patients), task, plan, randomness)
        sides.append(np.stack([hospital.noisy_sum(task.start, step) for step in range(steps)]))
    direction = task.clipped_sums(task.start, torch.tensor([1]), CLIP)[0].numpy()  # what the second patient adds
    bound = epsilon_lower_bound(*sides, DELTA, score=lambda messages: messages @ direction)
    return bound, epsilon(SampledGaussian(SIGMA, RATE, 1), DELTA)


@pytest.mark.parametrize("seed", range(3))
def test_half_the_laplace_noise_is_caught(seed):
    bound, declared = laplace_bound(seed, half_noise)
    assert bound > declared
    assert bound <= 2.0  # which is what half the noise spends


@pytest.mark.parametrize("seed", range(3))
def test_half_the_gaussian_noise_is_caught(seed):
    bound, declared = gaussian_bound(seed, half_noise)
    assert declared == pytest.approx(1.0, abs=1e-3)
    assert bound > declared
    assert bound <= epsilon_at(Gaussian(3.73 / 2), DELTA)


def test_a_step_that_forgets_the_empty_batch_is_caught(one_thread):
    bound, declared = step_bound(0, ForgetsTheEmptyBatch)
    assert bound > 1.2 * declared
    # an empty batch is as likely as not without the second patient, and half as likely with it
    assert bound <= math.log(2)


@pytest.mark.parametrize("subject", [laplace_bound, gaussian_bound, step_bound])
def test_sound_mechanisms_pass(subject, one_thread):
    for seed in range(5):
        bound, declared = subject(seed)
        assert bound <= declared


@pytest.mark.slow
@pytest.mark.parametrize("subject", [laplace_bound, gaussian_bound, step_bound])
def test_sound_mechanisms_pass_100_seeds(subject, one_thread):
    alarms = sum(bound > declared for bound, declared in map(subject, range(100)))
    assert alarms <= 5


def test_false_alarms_are_as_rare_as_promised_where_the_event_is_plain():
    """Randomised response has one event to choose, and its bound then fails at most once in ten at 90 %."""
    response, wrong = RandomisedResponse.for_epsilon(1.0), 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sides = [response.release(np.full(1000, bit), rng) for bit in (0, 1)]
        wrong += epsilon_lower_bound(*sides, 0.0, confidence=0.9) > 1.0
    assert stats.binomtest(wrong, 200, 0.1, alternative="greater").pvalue > 0.01


def test_both_directions_are_tried():
    """Output 1 happens on D' alone: the bound is large whichever side comes first, and the event says which."""
    rng = np.random.default_rng(0)
    never, sometimes = np.zeros(5000), (rng.random(5000) < 0.1).astype(float)
    one, other = epsilon_lower_bound(never, sometimes, 1e-5), epsilon_lower_bound(sometimes, never, 1e-5)
    assert one > 3 and other > 3
    assert chosen_event(never, sometimes, 1e-5).reverse and not chosen_event(sometimes, never, 1e-5).reverse
    assert "likelier on D-prime" in str(chosen_event(never, sometimes, 1e-5))


def test_delta_pays_for_what_it_covers():
    rng = np.random.default_rng(0)
    never, sometimes = np.zeros(5000), (rng.random(5000) < 0.1).astype(float)
    assert epsilon_lower_bound(never, sometimes, 0.15) == 0  # an event of probability 0.1 is within delta = 0.15


def test_a_point_mass_inside_a_distribution_is_found():
    """Neither tail shows it: a point mass in the middle of the same normal distribution."""
    rng = np.random.default_rng(1)
    smooth, spiked = rng.normal(size=(2, 10_000))
    spiked[rng.random(10_000) < 0.2] = 0.0
    assert epsilon_lower_bound(smooth, spiked, 0.0) > 4
    assert chosen_event(smooth, spiked, 0.0).relation == "=="


def test_more_samples_or_less_confidence_raise_the_bound():
    few, _ = laplace_bound(5, samples=1000)
    many, _ = laplace_bound(5, samples=100_000)
    assert few < many < 1.0
    # bits leave one event to choose, so that confidence is all that changes
    bits = RandomisedResponse(0.7).release(np.array([[0], [1]]).repeat(2000, axis=1), np.random.default_rng(6))
    bounds = [epsilon_lower_bound(*bits, 0.0, confidence=confidence) for confidence in (0.999, 0.99, 0.8)]
    assert bounds == sorted(bounds) and bounds[0] < bounds[2]


def test_the_event_is_chosen_on_the_first_half_and_counted_on_the_second():
    """Samples that differ in their first half alone are no evidence."""
    rng = np.random.default_rng(7)
    on_d, on_d_prime = rng.normal(size=(2, 4000))
    on_d[:2000] += 5
    assert epsilon_lower_bound(on_d, on_d_prime, 0.0) < 0.3
    assert epsilon_lower_bound(on_d[:2000], on_d_prime[:2000], 0.0) > 3
    on_d[2000:] -= 5  # now the second half differs too, but in events that the first half rules out
    assert epsilon_lower_bound(on_d, on_d_prime, 0.0) == 0


@pytest.mark.parametrize("hits, trials", [(0, 50), (1, 50), (25, 50), (49, 50), (50, 50), (3, 100_000)])
def test_limits_are_clopper_and_pearsons(hits, trials):
    reference = stats.binomtest(hits, trials).proportion_ci(0.98, "exact")
    assert clopper_pearson(hits, trials, 0.01) == pytest.approx((reference.low, reference.high), rel=1e-9)


def test_bad_samples_are_refused(refuses):
    good, gap = np.zeros(500), np.zeros(500)
    gap[3] = math.nan
    with refuses("199", "200", "more often"):
        epsilon_lower_bound(good, good[:199], 0.0)
    with refuses("D-prime", "finite"):
        epsilon_lower_bound(good, gap, 0.0)
    with refuses("(500, 2)", "score"):
        epsilon_lower_bound(np.zeros((500, 2)), np.zeros((500, 2)), 0.0)
    for delta in (-0.1, 1.0, math.nan):
        with refuses("delta", str(delta), "[0, 1)"):
            epsilon_lower_bound(good, good, delta)
    for confidence in (0.0, 1.0, math.nan):
        with refuses("confidence", str(confidence), "(0, 1)"):
            epsilon_lower_bound(good, good, 0.0, confidence)
