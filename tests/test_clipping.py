"""No patient's part of a sum is longer than C, whatever image or model: huge, tiny, cancelling or not finite."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dopamine_lib.fairness.adaptive_clipping import AdaptiveClip, AdaptiveHead
from dopamine_lib.fairness.output_perturbation import clip_rows
from dopamine_lib.federation.hospital import NotFinite, contribute
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.training import Training
from dopamine_lib.models.networks import cnn, squeezenet
from dopamine_lib.privacy import dpsgd, head, layer, linear_map
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.head import HeadTask, unit_rows
from dopamine_lib.privacy.randomness import Randomness

MOST = 1 + 1e-6
SCALES = [1e-42, 1e-20, 1e-3, 1.0, 1e3, 1e10, 1e20, 1e30, 3e38]
WAYS = {"rule": linear_map.cheaper_by_gram, "gram": lambda *shape: True, "instantiated": lambda *shape: False}


def own_part(task, patient, clip, w=None):
    """What a patient adds to a sum, as float64 (d,)."""
    return task.clipped_sums(task.start if w is None else w, torch.tensor([patient]), clip)[0].double()


def convolutions():
    """A net with every kind of layer that has parameters, and padding that takes other pixels twice."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, stride=2, dilation=2, padding=2, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(7, 6, 1, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 9),
        nn.GELU(),
        nn.Linear(9, 3, bias=False),
    )


class Difference(nn.Module):
    """The first position less the second: two positions whose gradients cancel where their inputs are alike."""

    def forward(self, x):
        return x[:, 0] - x[:, 1]


def cancelling(length, seed):
    """A task with one sample whose true gradient is short while its positions' are ``length`` times as long."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64, bias=False), Difference(), nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        net[2].weight.mul_(30)
    u, e = torch.randn(2, 64)
    u = length * u / u.norm()
    e -= u * (e @ u) / (u @ u)
    e /= e.norm()
    x = torch.stack([u, u + e])[None]
    return Task(net, lambda index: x[index], torch.tensor([0])), x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_patients_part_is_no_longer_than_c_at_any_scale(way, scale, monkeypatch):
    monkeypatch.setattr(linear_map, "cheaper_by_gram", WAYS[way])
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12).clamp(-1, 1) * scale
    task = Task(convolutions(), lambda index: x[index], torch.tensor([0, 1, 2, 0]))
    for stretch in (1.0, 1e12):
        for clip in (0.05, 1.0):
            parts = torch.stack([own_part(task, patient, clip, task.start * stretch) for patient in range(4)])
            assert (parts.norm(dim=1) <= clip * MOST).all()  # and so they are finite


@pytest.mark.parametrize("make, pixels", [(cnn, 28), (squeezenet, 64)])
def test_the_models_parts_are_exactly_c_long(make, pixels):
    torch.manual_seed(1)
    x = torch.randn(6, 3, pixels, pixels)
    task = Task(make(3), lambda index: x[index], torch.arange(6) % 3)
    parts = torch.stack([own_part(task, patient, 1e-3) for patient in range(6)])
    assert ((parts.norm(dim=1) / 1e-3 - 1).abs() < 5e-6).all() and (parts.norm(dim=1) <= 1e-3 * MOST).all()


@pytest.mark.parametrize("length", [1, 30, 1e3, 1e4, 3e4])
def test_norms_are_exact_where_positions_cancel(length):
    """The gradient of the first layer is (v, -v)^T (u, u + e) = -v e^T; that of the second is known exactly, too."""
    for seed in range(20):
        task, x = cancelling(length, seed)
        exact = Task(task.net.double(), lambda index, x=x: x.double()[index], torch.tensor([0]))
        true = own_part(exact, 0, math.inf)
        task.net.float()
        for clip in (1.0, 0.3):
            part = own_part(task, 0, clip)
            assert part.norm() <= clip * MOST
            if true.norm() > clip:
                assert part.norm() == pytest.approx(clip, rel=2e-6)


def test_gram_matrices_alone_would_let_cancelling_gradients_through(monkeypatch):
    """The faults put back: in float32 a part is many C long; in float64, but added up in float32, far too short."""
    monkeypatch.setattr(linear_map, "MOST_CANCELLED", math.inf)
    assert min(own_part(cancelling(1e4, seed)[0], 0, 1.0).norm() for seed in range(10)) < 0.9999

    def as_it_was(own, x, g):
        squares = (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        return layer.Kept(squares.clamp_min(0), inputs=x, outputs=g)

    monkeypatch.setattr(linear_map.LinearMap, "_by_gram", as_it_was)
    assert max(own_part(cancelling(1e4, seed)[0], 0, 1.0).norm() for seed in range(30)) > 5


@pytest.mark.parametrize("m", [1, 9, 577, 640, 641, 5000])
def test_norms_of_instantiated_gradients_are_exact(m):
    """Equal numbers are the worst: every rounding goes the same way."""
    torch.manual_seed(0)
    for value in torch.rand(200) * 3 + 0.01:
        matrices = value.expand(2, 3, m).contiguous()
        true = matrices.double().flatten(1).norm(dim=1)
        assert ((layer.matrix_norms(matrices) / true - 1).abs() < 7e-7).all()
    matrices[0] *= 1e30  # whose squares overflow
    assert layer.matrix_norms(matrices)[0] == pytest.approx(float(true[0]) * 1e30, rel=1e-6)


def poisoned(features, target):
    """A finite model of 5 classes at which the scores of one patient alone overflow."""
    matrix = torch.zeros(5, features.shape[1])
    matrix[0] = features[target] * 3e38 * 1.4
    matrix[1] = -matrix[0]
    w = torch.cat([matrix.flatten(), torch.zeros(5)])
    assert torch.isfinite(w).all()
    return w


@pytest.fixture
def features():
    torch.manual_seed(0)
    return unit_rows(torch.randn(50, 512)), torch.randint(0, 5, (50,))


@pytest.mark.parametrize("loop", [True, False], ids=["loop", "products"])
@pytest.mark.parametrize("make", [HeadTask, lambda *terms: AdaptiveHead(*terms, AdaptiveClip())])
def test_a_poisoned_head_learns_nothing_from_whether_there_is_a_message(make, loop, features, monkeypatch):
    """The gradient of the patient that it is made for counts as zero, beside others whose messages stay the same."""
    if loop:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(head, "_loop", lambda: None)
    task, target = make(nn.Linear(512, 5), *features), 7
    w = poisoned(features[0], target)
    w = torch.cat([w, task.start[len(w) :]])
    everybody = torch.arange(50)
    both = (task.clipped_sums(w, index, 0.5)[0] for index in (everybody, everybody[everybody != target]))
    with_target, without = both
    assert torch.isfinite(with_target).all() and without.any()
    moved = (with_target - without).norm()
    assert moved <= 0.5 * MOST and (moved == 0 or isinstance(task, AdaptiveHead))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, 3e38])
@pytest.mark.parametrize("way", ["clipped_sums", "product_sums"])
def test_features_that_are_not_finite_or_huge_move_a_heads_sums_by_c_at_most(bad, way, features):
    given, labels = features
    given[7, 3] = bad
    if way == "clipped_sums":
        pytest.importorskip("numba")
    task = HeadTask(nn.Linear(512, 5), given, labels)
    for mean in (None, torch.full((512,), 0.01)):
        if mean is not None:
            task.centre_on(mean)
        part = getattr(task, way)(task.start, torch.tensor([7]), 0.5)[0].double()
        assert part.norm() <= 0.5 * MOST and bool(part.any()) == (bad == 1e30)
    assert task.feature_sum(torch.tensor([7])).double().norm() <= MOST
    assert torch.isfinite(task.feature_sum(torch.arange(50))).all()
    rows = clip_rows(given.numpy(), radius=1.5)
    assert np.isfinite(rows).all() and np.linalg.norm(rows, axis=1).max() <= 1.5 * MOST


def test_a_model_stretched_beyond_floats_gives_zeros_at_the_very_first_batch():
    """The trial that looks for nets that mix samples is not made at weights that a server sent."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    x = torch.rand(2, 3, 8, 8)
    task = Task(net, lambda index: x[index], torch.tensor([0, 1]))
    w = task.start * 1e19
    assert torch.isfinite(w).all() and not task.clipped_sums(w, torch.tensor([0]), 1.0).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_an_image_that_is_not_finite_counts_as_zero_and_spoils_nobody(way, bad, monkeypatch):
    monkeypatch.setattr(linear_map, "cheaper_by_gram", WAYS[way])
    torch.manual_seed(0)
    x = torch.randn(6, 3, 28, 28)
    task = Task(cnn(5), lambda index: x[index], torch.arange(6) % 5)
    others = torch.tensor([0, 1, 2, 4, 5])
    without = task.clipped_sums(task.start, others, 0.5)[0]
    x[3, 0, 5, 5] = bad
    beside = task.clipped_sums(task.start, torch.arange(6), 0.5)[0]
    part = own_part(task, 3, 0.5)
    assert part.norm() <= 0.5 * MOST and (math.isfinite(bad) or not part.any())
    assert torch.allclose(beside - part.float(), without, atol=1e-5)


def test_a_stretched_network_overflows_for_the_brightest_image_alone_and_still_sends():
    torch.manual_seed(0)
    x = torch.rand(6, 3, 28, 28) * 0.05
    x[3] = 1.0
    task = Task(cnn(5), lambda index: x[index], torch.tensor([0, 1, 2, 3, 4, 0]))
    for stretch in 10.0 ** np.arange(5, 12, 0.25):
        assert torch.isfinite(task.clipped_sums(task.start * float(stretch), torch.arange(6), 1.0)).all()


@pytest.mark.parametrize("fault", ["factors", "rows"])
def test_the_faults_put_back_fail(fault, features, monkeypatch):
    """A factor that is NaN where a norm is, or rows that are multiplied by a zero factor alone, spoil the sum."""
    if fault == "factors":
        monkeypatch.setattr(dpsgd, "clip_factors", lambda norms, clip: 1 / (norms / clip).clamp_min(1))
        monkeypatch.setattr(dpsgd.torch, "where", lambda condition, kept, other: kept)
    else:
        monkeypatch.setattr(
            "dopamine_lib.privacy.head.shorten_rows",
            lambda rows, norms, clip: rows * dpsgd.clip_factors(norms, clip).to(rows.dtype)[:, None],
        )
    task = HeadTask(nn.Linear(512, 5), *features)
    assert not torch.isfinite(task.product_sums(poisoned(features[0], 7), torch.arange(50), 0.5)).all()


@pytest.mark.parametrize("fault", [False, True])
def test_what_has_lost_its_digits_is_left_out(fault, monkeypatch):
    """Errors scaled by C over a norm of 7e39 are subnormal: rounded up they would make a part longer than C."""
    if fault:
        monkeypatch.setattr(dpsgd, "SMALLEST", 0.0)
    task = HeadTask(nn.Linear(512, 2), torch.full((1, 512), 3e38), torch.tensor([0]))
    sums = [task.product_sums] if fault else [task.clipped_sums, task.product_sums]
    clips = [0.1 * 1.01**i for i in range(50)]
    longest = max(
        way(torch.zeros(task.d), torch.tensor([0]), clip)[0].double().norm() / clip for clip in clips for way in sums
    )
    assert (longest > MOST) == fault


class Functional(nn.Module):
    """Batch statistics inside ``forward``, where no layer shows them."""

    def __init__(self, normalise):
        super().__init__()
        self.layer, self.normalise = nn.Linear(12, 3), normalise

    def forward(self, x):
        return self.layer(self.normalise(x.flatten(1)))


@pytest.mark.parametrize(
    "mixes",
    [
        lambda x: nn.functional.batch_norm(x, None, None, training=True),
        lambda x: x - x.mean(0),
        lambda x: x - x.mean(0).detach(),
        lambda x: x / x.detach().abs().max(),
        lambda x: x * torch.softmax(x, dim=0),
        lambda x: x + 1e-30 * x.sum(),
        lambda x: x.flip(0),
        lambda x: nn.functional.dropout(x),
        lambda x: torch.where(x > x.detach().median(), x, 0),
    ],
    ids=["batch norm", "mean", "detached", "largest", "softmax", "barely", "flipped", "chance", "median"],
)
def test_a_net_that_mixes_samples_is_refused_however_it_does_so(mixes, refuses):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 2)
    task = Task(Functional(mixes), lambda index: x[index], torch.zeros(5, dtype=torch.int64))
    with refuses("batch", "take out"):
        task.clipped_sums(task.start, torch.arange(5), 1.0)


@pytest.mark.parametrize("alone", [nn.functional.normalize, torch.tanh, lambda x: nn.functional.layer_norm(x, (12,))])
def test_a_net_that_treats_every_sample_alone_passes(alone):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 2)
    task = Task(Functional(alone), lambda index: x[index], torch.zeros(5, dtype=torch.int64))
    assert task.clipped_sums(task.start, torch.arange(5), 1.0).any()


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False),
        nn.Sequential(nn.ModuleDict({"inner": nn.SyncBatchNorm(4, affine=False)})["inner"]),
        nn.LazyBatchNorm2d(affine=False),
    ],
    ids=["batch", "running", "hidden", "lazy"],
)
def test_layers_with_statistics_of_batches_are_refused_by_name(layer, refuses):
    with refuses("BatchNorm", "replace"):
        Task(nn.Sequential(nn.Conv2d(3, 4, 1), layer), lambda index: index, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["FSCDP", "FPDP", "F"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hospitals_refuse_a_model_that_is_not_finite_before_they_look_at_a_patient(name, bad, features, monkeypatch):
    choice = replace(CHOICES["head"][name], mean_noise_multiplier=None)
    task = HeadTask(nn.Linear(512, 5), *features)
    patients = np.array_split(np.arange(50), 5)
    training = Training(Plan.of(SETTINGS[name], choice, task, patients), task, patients, Randomness(0))
    w = task.start.clone()
    w[17] = bad
    monkeypatch.setattr(HeadTask, "clipped_sums", None)
    monkeypatch.setattr("dopamine_lib.federation.hospital.Hospital.sample", None)
    with pytest.raises(NotFinite, match="learning rate"):
        contribute(training.hospitals, w, 0)


def test_hospitals_refuse_mean_features_that_are_not_finite(features, refuses):
    task = HeadTask(nn.Linear(512, 5), *features)
    with refuses("mean features"):
        task.centre_on(torch.full((512,), math.nan))
    assert not task.mean.any()
