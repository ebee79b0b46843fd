"""The DP-SGD step against a plain loop over samples, and the randomness under it."""

import math

import numpy as np
import pytest
import torch
from plain_clipping import clipped_sums_by_loop
from scipy import stats
from torch import nn

from dopamine_lib.errors import InputError
from dopamine_lib.models.networks import cnn, squeezenet
from dopamine_lib.privacy.accounting import WHOLE, SampledGaussian, epsilon
from dopamine_lib.privacy.dpsgd import Task, clip_factors, noise_share
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.integer_noise import IntegerNoise
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian


def make_task(kind):
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, 32, 32, dtype=torch.float64), torch.arange(12) % 5
    if kind == "head":
        features = torch.randn(12, 512, dtype=torch.float64)
        return HeadTask(nn.Linear(512, 5).double(), features, y), features, y
    net = {"cnn": cnn, "squeezenet": squeezenet}[kind]().double()
    return Task(net, lambda index: x[index], y, chunk=5), x, y


@pytest.mark.parametrize("kind", ["head", "cnn", "squeezenet"])
@pytest.mark.parametrize("rows", [list(range(12)), [3], []], ids=["batch", "one", "empty"])
@pytest.mark.parametrize("clip", [0.05, 1.0, math.inf])
def test_clipped_sums_equal_the_plain_loop(kind, rows, clip):
    task, x, y = make_task(kind)
    index, group = torch.tensor(rows, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64) % 3
    own = task.clipped_sums(task.start, index, clip, group, 4)
    task.load(task.start)
    reference = clipped_sums_by_loop(task.net, x[index], y[index], clip, group, 4)
    assert own.shape == (4, task.d)
    assert torch.allclose(own, reference, atol=1e-10, rtol=0)
    assert not own[3].any()  # nobody is in group 3


@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_neither_micro_batches_nor_the_order_of_patients_change_the_sums(clip):
    task, x, y = make_task("cnn")
    index, group = torch.tensor([7, 1, 11, 3, 3, 0, 5]), torch.tensor([2, 0, 2, 0, 1, 2, 0])
    task.chunk = None
    whole = task.clipped_sums(task.start, index, clip, group, 3)
    for chunk in (1, 3):
        task.chunk = chunk
        assert torch.allclose(task.clipped_sums(task.start, index, clip, group, 3), whole, atol=1e-12, rtol=0)
    reference = clipped_sums_by_loop(task.net, x[index], y[index], clip, group, 3)
    assert torch.allclose(whole, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pixels, most", [(28, 128), (64, 128), (128, 32), (224, 10)])
def test_memory_is_bounded_by_micro_batches_whose_size_follows_from_the_images(pixels, most):
    sizes = []

    def inputs(index):
        sizes.append(len(index))
        return torch.zeros(len(index), 3, pixels, pixels)

    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    task = Task(net, inputs, torch.zeros(300, dtype=torch.int64))
    for clip in (1.0, math.inf):
        sizes.clear()
        task.clipped_sums(task.start, torch.arange(300), clip)
        assert max(sizes) == most and sum(sizes) == 300 + 1  # one image tells the size


def test_training_needs_no_gradient_mode_and_leaves_w_alone():
    task, _, _ = make_task("cnn")
    w = task.start.clone()
    with torch.no_grad():
        sums = [task.clipped_sums(w, torch.arange(4), clip) for clip in (1.0, math.inf)]
    assert torch.equal(w, task.start) and not w.requires_grad
    assert not any(own.requires_grad for own in sums) and all(own.any() for own in sums)


@pytest.mark.parametrize("kind", ["cnn", "squeezenet"])
def test_logits_are_the_nets(kind):
    task, x, _ = make_task(kind)
    index = torch.tensor([4, 0, 9, 2, 2, 7])
    w = task.start * 0.9
    scores = task.logits(w, index)
    task.load(w)
    assert torch.allclose(scores, task.net(x[index]), atol=1e-12)
    assert task.logits(w, index[:0]).shape == (0, 5)


@pytest.mark.parametrize("kind", ["head", "cnn"])
def test_no_patient_moves_the_sum_by_more_than_the_clip(kind):
    task, _, _ = make_task(kind)
    everybody = torch.arange(12)
    whole = task.clipped_sums(task.start, everybody, 0.3)[0]
    for patient in range(12):
        without = task.clipped_sums(task.start, everybody[everybody != patient], 0.3)[0]
        assert (whole - without).norm() <= 0.3 * (1 + 1e-9)


def test_the_bound_on_a_patient_is_missed_where_norms_are_taken_too_small(monkeypatch):
    task, _, _ = make_task("cnn")
    monkeypatch.setattr("dopamine_lib.privacy.dpsgd.clip_factors", lambda norms, clip: clip_factors(norms / 2, clip))
    assert task.clipped_sums(task.start, torch.tensor([0]), 0.05).norm() > 0.05 * 1.5


def test_squeezenet_has_the_parameters_the_paper_says():
    assert sum(p.numel() for p in squeezenet(5).parameters()) == 725_061


def test_shares_of_noise_add_up_to_sigma_c():
    """Lemma 1 with the right variance: K shares of sigma C / sqrt(K) make sigma C."""
    total = sum(noise_share(1.15, 2.0, 10) ** 2 for _ in range(10))
    assert math.sqrt(total) == pytest.approx(1.15 * 2.0)


@pytest.mark.parametrize("discrete", [False, True])
def test_gaussian_and_discrete_noise_are_interchangeable(discrete):
    """A hospital draws, combines and is accounted for in the same way, whichever noise it adds."""
    if discrete:
        terms = dict(total_range=2**31 - 1, sample_rate=0.1, steps=10)
        noise = IntegerNoise(1.15, 0.5, 4, 20_000, **terms)
    else:
        noise = RoundedGaussian(1.15, 0.5, 4, 20_000, total_range=2**15 - 1, sample_rate=0.1, patients=50)
    first, second = noise.draw(Randomness(0).stream("noise"), 2)
    message = noise.combine(torch.full((20_000,), 0.25), first)
    assert message.shape == (20_000,) and message.dtype == np.int64
    left = noise.decode(message) - 0.25
    assert stats.kstest(left / noise_share(1.15, 0.5, 4), "norm").pvalue > 0.01
    assert (message != noise.combine(torch.full((20_000,), 0.25), second)).sum() > 19_000
    for colluding in (0, 1):
        expected = SampledGaussian(1.15 * math.sqrt(1 - colluding / 4), 0.1, 10)
        spent, due = (epsilon(event, 1e-4, orders=WHOLE) for event in (noise.event(10, colluding), expected))
        assert spent == pytest.approx(due, rel=0.01)
    with pytest.raises(InputError, match="4"):
        noise.event(10, colluding=4)


def test_uniform_fills_the_unit_interval():
    draws = Randomness(2).stream("sample").uniform(50_000).numpy()
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 0.01


def test_streams_repeat_when_seeded_and_differ_by_purpose():
    first = Randomness(7).stream("noise", 1).uniform(8)
    assert torch.equal(first, Randomness(7).stream("noise", 1).uniform(8))
    assert not torch.equal(first, Randomness(7).stream("noise", 2).uniform(8))
    assert not torch.equal(first, Randomness(8).stream("noise", 1).uniform(8))


def test_without_a_seed_the_key_comes_from_the_operating_system():
    draws = {tuple(Randomness().stream("noise").uniform(4).tolist()) for _ in range(20)}
    assert len(draws) == 20


def test_a_stream_goes_on_where_it_stopped():
    stream, whole = Randomness(3).stream("x"), Randomness(3).stream("x").uniform(10)
    assert torch.equal(torch.cat([stream.uniform(4), stream.uniform(6)]), whole)


def test_poisson_sizes_are_binomial():
    """The size of a Poisson sample of n at rate q has mean nq and variance nq(1-q)."""
    present = Randomness(4).stream("x").uniform(2000 * 300).view(2000, 300) < 0.1
    sizes = present.sum(1).numpy()
    assert abs(sizes.mean() - 30) < 4 * math.sqrt(27 / 2000)
    assert abs(sizes.var() - 27) < 5
    assert np.corrcoef(sizes[:-1], sizes[1:])[0, 1] < 0.1
