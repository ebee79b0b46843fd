"""Training on a device: the sums, the noise and whole runs are the processor's, to a stated tolerance.

Each test runs on CUDA where PyTorch sees it, and with the device's code on the processor everywhere.
"""

import math

import numpy as np
import pytest
import torch
from plain_clipping import clipped_sums_by_loop
from test_layers import LAYERS, Scale
from torch import nn

from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.machine import find_device
from dopamine_lib.models.networks import cnn, resident_inputs, squeezenet, to_input
from dopamine_lib.privacy import device_normal
from dopamine_lib.privacy.device_normal import DeviceNormals
from dopamine_lib.privacy.dpsgd import FILLED_TO, Task
from dopamine_lib.privacy.normal import ERROR, Normals
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian

#: Largest difference of a model's weights after a few steps in float32, relative to how far training has moved them.
TOLERANCE = 1e-3


def task_on(device, net, x, y):
    return Task(net.to(device), lambda index: x[index].to(device), y)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_equals_the_loop(device, name):
    if name == "LSTM" and device.type == "cuda":
        pytest.skip("cuDNN differentiates recurrent layers in training mode alone")
    torch.manual_seed(0)
    make, shape, _ = LAYERS[name]
    whole = torch.tensor([[0, 1, 3, 3], [1, 1, 1, 1], [4, 0, 4, 0]])
    x, y = torch.randn(3, *shape, dtype=torch.float64) if shape else whole, torch.arange(3)
    net = nn.Sequential(Scale(shape[-1]) if shape else nn.Identity(), make(), nn.Flatten(), nn.LazyLinear(3)).double()
    net(x)
    task, index, group = task_on(device, net, x, y), torch.arange(3), torch.tensor([0, 2, 0])
    own = task.clipped_sums(task.start, index, 0.05, group, 3).cpu()
    loop = clipped_sums_by_loop(net.cpu(), x, y, 0.05, group, 3)
    assert torch.allclose(own, loop, atol=1e-9, rtol=0) and own.abs().max() > 1e-4


@pytest.mark.parametrize("make", [cnn, squeezenet])
@pytest.mark.parametrize("rows", [list(range(12)), [3], [5] * 17, []], ids=["batch", "one", "more than 16", "empty"])
@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_clipped_sums_equal_the_plain_loop(device, make, rows, clip):
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, 32, 32, dtype=torch.float64), torch.arange(12) % 5
    net = make().double()
    task, index = task_on(device, net, x, y), torch.tensor(rows, dtype=torch.int64)
    group = index % 3
    own = task.clipped_sums(task.start, index, clip, group, 4).cpu()
    loop = clipped_sums_by_loop(net.cpu(), x[index], y[index], clip, group, 4)
    assert torch.allclose(own, loop, atol=1e-9, rtol=0)
    assert not own[3].any() and (not rows or own.abs().max() > 1e-4)


def test_a_device_sees_few_sizes_of_batches_and_what_fills_them_up_has_no_gradient(device, monkeypatch):
    sizes = []

    def inputs(index):
        sizes.append(len(index))
        return torch.ones(len(index), 3, device=device)

    torch.manual_seed(0)
    task = Task(nn.Linear(3, 2).to(device), inputs, torch.zeros(40, dtype=torch.int64))
    for clip in (0.1, math.inf):
        each = task.clipped_sums(task.start, torch.arange(1), clip)
        many = task.clipped_sums(task.start, torch.arange(21), clip)
        assert torch.allclose(many, 21 * each, rtol=1e-5)
    assert {size for size in sizes if size > 1} == {FILLED_TO, 2 * FILLED_TO}
    monkeypatch.setattr("dopamine_lib.privacy.dpsgd.NOBODY", 0)  # planted: they have one
    many = task.clipped_sums(task.start, torch.arange(21), math.inf)
    assert (many - 21 * each).norm() > each.norm()


def test_a_gradient_that_is_not_finite_counts_as_zero(device):
    x = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [1e30, math.inf]])
    torch.manual_seed(0)
    task = task_on(device, nn.Linear(2, 2), x, torch.zeros(3, dtype=torch.int64))
    whole, finite = (task.clipped_sums(task.start, index, 1.0) for index in (torch.arange(3), torch.arange(1)))
    assert torch.equal(whole, finite) and whole.any()


def test_images_on_the_device_are_the_same_inputs_but_for_a_last_bit(device):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    mean, std, index = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), torch.tensor([4, 0, 0])
    own = resident_inputs(images, mean, std, device)(index).cpu()  # CUDA multiplies by a rounded 1/255
    assert torch.allclose(own, to_input(images[index], mean, std), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sure", [None, 0.45], ids=["as it is", "a tenth of the values asked for in full"])
def test_messages_are_the_processors_integer_for_integer(device, monkeypatch, sure):
    noise = RoundedGaussian(1.15, 0.5, 2, 300_001, total_range=2**15 - 1, sample_rate=0.1, patients=50)
    if sure is not None:
        noise.d, noise._sure = 3001, sure
        monkeypatch.setattr(Normals, "nearest", lambda self, index, x: 10**6 + index)  # to see who is asked
    sums = torch.randn(2, noise.d, generator=torch.Generator().manual_seed(0))
    sums[0, 0], sums[1, 1], sums[1, 2] = math.nan, 1e30, -math.inf
    streams = [[Randomness(0).stream("noise", k) for k in range(2)] for _ in range(2)]
    there = noise.combine_there(sums.to(device), [noise.draw(stream, 1, device)[0] for stream in streams[0]])
    here = [noise.combine(own, noise.draw(stream)[0]) for own, stream in zip(sums, streams[1], strict=True)]
    assert there.dtype == torch.int64 and np.array_equal(there.cpu().numpy(), np.stack(here))
    assert sure is None or (there > 10**5).sum() > 100


class Words:
    """A stream that begins with given words."""

    def __init__(self, *words):
        self.first, self.rest = list(words), Randomness(0).stream("rest")

    def words(self, n, pinned=False):
        own, self.first = self.first[:n], self.first[n:]
        return torch.cat([torch.tensor(own, dtype=torch.int64), self.rest.words(n + 1)])[:n]


def test_values_are_exact_to_the_stated_error_at_both_ends(device, monkeypatch):
    """Among them pairs of which 53 bits say too little: they get more, as on the processor."""
    u = [0, 1, 2**14, 2**15, 2**53 - 1, 2**53 - 2**32, 2**53 - 2**33, 2**52]
    v = [1, 2**53 // 3, 2**50, 2**51 + 7, 2**52 - 1, 3, 2**49, 2**53 - 1]

    def worst():
        drawn = DeviceNormals(Words(*u, *v), 2 * len(u), 64.0, device)
        ends = (drawn._interval(index, 0.0) for index in range(2 * len(u)))
        values = drawn.values.cpu().tolist()
        return max(abs(float(end - value)) for pair, value in zip(ends, values, strict=True) for end in pair) / 64

    assert worst() < ERROR
    monkeypatch.setattr(device_normal, "FEW", 0)  # planted: no more bits where u is near 0
    assert worst() > ERROR


def test_pinned_words_are_the_streams(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **more: empty(*shape, **more))
    first, second = (Randomness(1).stream("words") for _ in range(2))
    for n in (3, 2**17, 2**17 + 5):
        assert torch.equal(first.words(n, pinned=True), second.words(n))


def test_an_odd_number_of_values_is_drawn_as_on_the_processor(device):
    drawn, same = DeviceNormals(Words(), 7, 3.0, device), Normals(Words(), 7, 3.0)
    assert np.allclose(drawn.values.cpu().numpy(), same.values, rtol=0, atol=1e-12)


def trained(device, name, model, rounds, **options):
    """A seeded run's model after some rounds, and how far it has come."""
    options = Options(model=model, size=28, seed=0, settings=(name,), **options)
    experiment = Experiment.load(options, progress=False, device=device.type if device else "cpu")
    training = experiment.training(name)
    if device is not None:
        for hospital in training.hospitals:  # as it is where the task's vector is on a device
            hospital.device = None if experiment.plan(name).discrete else device
    training.reserve(1)
    for number in range(rounds):
        training._round(number)
    moved = training.server.w - training.task.start
    return moved.cpu(), experiment.predictions(training)


@pytest.mark.parametrize(
    "name, model, rounds, options",
    [
        ("FSCDP", "cnn", 3, {}),
        ("FSCDP", "squeezenet", 1, {}),
        pytest.param("FPDP", "cnn", 1, {}, marks=pytest.mark.slow),
        ("C", "cnn", 3, {}),
        ("FSCDP", "cnn", 2, {"aggregation": "masks"}),
        ("FSCDP", "cnn", 2, {"noise": "integer"}),
    ],
)
def test_a_run_is_the_processors_for_the_same_noise(device, monkeypatch, name, model, rounds, options):
    there, graded = trained(device, name, model, rounds, **options)
    monkeypatch.undo()
    here, same = trained(None, name, model, rounds, **options)
    assert here.norm() > 0 and (there - here).norm() <= TOLERANCE * here.norm()
    assert np.mean(graded == same) > 0.95


def test_what_is_drawn_ahead_is_what_is_drawn_in_time(device):
    options = Options(model="squeezenet", size=28, seed=0, settings=("FPDP",))
    experiment = Experiment.load(options, progress=False)
    ahead, plain = (experiment.training("FPDP").hospitals[3] for _ in range(2))
    ahead.device = device
    for step in (0, 1, 25, 26, 2499):  # a hospital sits rounds out, and nothing lies beyond its last step
        ((sample,), (noise, at)), ((same,), (other, _)) = ahead._draw(step), plain._draw(step)
        assert torch.equal(sample, same) and torch.equal(noise._words, other._words) and at == 0
        assert all(later > step for later in ahead._ahead)
    assert not ahead._ahead


@pytest.mark.parametrize(
    "name, said", [("mps", "float64"), ("tpu", "unknown"), ("cuda:x", "unknown"), ("cuda:99", "cpu")]
)
def test_a_device_that_is_not_there_is_refused(refuses, name, said):
    with refuses(name, said):
        find_device(name)


def test_auto_is_cuda_where_there_is_one():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
def test_cuda_computes_in_float32_proper():
    place = find_device("cuda")
    a = torch.full((64, 64), 1 + 2.0**-12, device=place)
    assert (a @ torch.eye(64, device=place) == a).all()  # TensorFloat-32 would round to 10 bits
    kernel = torch.eye(64, device=place).view(64, 64, 1, 1)
    assert (torch.conv2d(a.view(1, 64, 8, 8), kernel) == a.view(1, 64, 8, 8)).all()
