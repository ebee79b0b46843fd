"""Gradient inversion: what an update gives away, exactly and by optimisation, and what takes that away."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dopamine_lib.auditing.inversion import dense_inputs, grade_of, invert, psnr, rank_among, total_variation
from dopamine_lib.data.synthetic import make_population
from dopamine_lib.models.networks import build, to_input
from dopamine_lib.privacy.dpsgd import Task

SIZE, HALF = 28, (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def task():
    """The kit's CNN and 60 patients, whose inputs (60, 3, 28, 28) lie in [-1, 1]."""
    torch.set_num_threads(1)
    images, labels, _ = make_population(60, SIZE, seed=3, threads=1)
    net = build("cnn", 5, None, seed=0)
    return Task(net, lambda index: to_input(images[index.numpy()], HALF, HALF), torch.from_numpy(labels))


def update_of(task, patient, clip=math.inf):
    return task.clipped_sums(task.start, torch.tensor([patient]), clip)[0]


def test_the_grade_can_be_read_off_the_last_bias(task):
    for patient in range(60):
        for clip in (math.inf, 0.1):
            assert grade_of(update_of(task, patient, clip), 5) == task.labels[patient]


def test_noise_hides_the_grade(task):
    """The share of one of ten hospitals, 0.36 C: 600 draws read as in 1 of 5, not always; by chance never near 0.9."""
    noise, rng, right = 1.15 / math.sqrt(10), torch.Generator().manual_seed(0), 0
    for draw in range(600):
        update = update_of(task, draw % 60, 0.1)
        right += grade_of(update + 0.1 * noise * torch.randn(len(update), generator=rng), 5) == task.labels[draw % 60]
    assert 0.1 < right / 600 < 0.7


def test_a_linear_layer_gives_its_input_away(task):
    """The CNN's first one: 32 rows after two convolutions, whose input is what the convolutions made of the image."""
    features = task.net[:7](task.inputs(torch.tensor([4])))[0].detach()
    update, start = update_of(task, 4, 0.5), 3 * 16 * 25 + 16 + 16 * 32 * 25 + 32
    weight, bias = update[start : start + 32 * 512].view(32, 512), update[start + 32 * 512 :][:32]
    assert torch.allclose(dense_inputs(weight, bias), features, atol=1e-4)
    both = update + update_of(task, 5, 0.5)
    weight, bias = both[start : start + 32 * 512].view(32, 512), both[start + 32 * 512 :][:32]
    assert not torch.allclose(dense_inputs(weight, bias), features, atol=1e-2), "a sum of two is a mixture"


def test_a_linear_net_is_inverted():
    """Without convolutions the pixels themselves are that input: exact, and the optimisation finds them too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.Sigmoid(), nn.Linear(20, 3))
    x = (0.5 * torch.randn(1, 3, 4, 4)).clamp(-1, 1)
    task = Task(net, lambda index: x[index], torch.tensor([2]))
    update = update_of(task, 0)
    assert torch.allclose(dense_inputs(update[:960].view(20, 48), update[960:980]), x.flatten(), atol=1e-4)
    found = invert(net, task.start, update, [2], (3, 4, 4), steps=300, tv=0.0)
    assert psnr(found, x) > 25
    noisy = update + update.norm() * torch.randn(len(update)) / math.sqrt(len(update)) * 3
    assert psnr(invert(net, task.start, noisy, [2], (3, 4, 4), steps=300, tv=0.0), x) < 15


def test_the_cnn_is_inverted_clipped_or_not_and_noise_stops_it(task):
    """80 steps. The mean of the other patients, which needs no update, is what a reconstruction must beat."""
    true, others = task.inputs(torch.tensor([1]))[0], task.inputs(torch.arange(60))
    noise = torch.randn(task.d, generator=torch.Generator().manual_seed(0)) * 0.5 * 1.15 / math.sqrt(10)

    def attack(update):
        return invert(task.net, task.start, update, [int(task.labels[1])], (3, SIZE, SIZE), steps=80)[0]

    bare, clipped, noised = map(attack, (update_of(task, 1), update_of(task, 1, 0.5), update_of(task, 1, 0.5) + noise))
    guessed = psnr(others[2:].mean(0), true)
    assert psnr(bare, true) > guessed + 1 and psnr(clipped, true) > guessed + 1, "clipping is no defence"
    assert rank_among(bare, 1, others) == rank_among(clipped, 1, others) == 1
    assert psnr(noised, true) < guessed - 5, "a hospital's own share of the noise is one"


def test_psnr_and_rank():
    true = np.zeros((3, 4, 4))
    assert psnr(true, true) == math.inf and psnr(true + 0.2, true) == pytest.approx(20)
    assert psnr(true + 1, true - 1) == 0
    others = np.arange(5.0)[:, None, None, None] * np.ones((5, 3, 4, 4))
    assert [rank_among(others[2] + 0.1, true, others) for true in range(5)] == [5, 3, 1, 2, 4]
    assert rank_among(others[0], 1, np.repeat(others[:1], 5, axis=0)) == 5, "nobody is told from a twin"
    x = torch.zeros(1, 1, 2, 3)
    x[..., 0] = 1
    assert total_variation(x) == pytest.approx(0.5) and total_variation(x.mT) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda net, w: invert(net, w, w[1:], [0], (3, 28, 28)), ("one number per parameter",)),
        (lambda net, w: invert(net, w, w, [], (3, 28, 28)), ("one grade per patient",)),
        (lambda net, w: invert(net, w, w, [0], (3, 28, 28), steps=0), ("steps is 0",)),
        (lambda net, w: grade_of(w[:3], 5), ("a bias of 5 values",)),
        (lambda net, w: dense_inputs(torch.zeros(4, 3), torch.zeros(4)), ("says nothing",)),
    ],
)
def test_bad_input_is_refused(refuses, task, call, said):
    with refuses(*said):
        call(task.net, task.start)
