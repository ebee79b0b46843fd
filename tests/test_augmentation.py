"""Views of an image, and the mean of their gradients, clipped once for each patient."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dopamine_lib.federation.options import Options
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.training import Training
from dopamine_lib.models.networks import cnn
from dopamine_lib.privacy import dpsgd
from dopamine_lib.privacy.augmentation import TURN, ZOOM, views
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.randomness import Randomness

PATIENTS, SIZE, C = 24, 12, 0.1


def make_task(net, patients=PATIENTS, **more):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(patients, 3, SIZE, SIZE, generator=generator).to(next(net.parameters()))
    return Task(net, lambda index: images[index], torch.arange(patients) % 3, **more)


def some_chance(patients, count, seed=1):
    return torch.rand(patients, count, 3, generator=torch.Generator().manual_seed(seed))


def test_views_are_mirrored_turned_and_zoomed_within_bounds():
    image = torch.arange(81.0).view(1, 1, 9, 9)
    same, mirrored = views(image, torch.tensor([[[0.0, 0.5, 0.5], [0.9, 0.5, 0.5]]]))[0]
    assert torch.allclose(same, image[0], atol=1e-4) and torch.allclose(mirrored, image[0].flip(-1), atol=1e-4)
    # of a picture that is its own column's number, a turn by t has slopes cos t and sin t, times the zoom
    plane = (torch.arange(99.0) - 49).expand(1, 1, 99, 99)
    for chance, turn, zoom in ((0.0, -TURN, 1 - ZOOM), (1.0 - 1e-7, TURN, 1 + ZOOM)):
        (seen,) = views(plane, torch.tensor([[[0.0, chance, chance]]]))[0, 0]
        across, down = seen[49, 50] - seen[49, 49], seen[50, 49] - seen[49, 49]
        assert float(across) == pytest.approx(zoom * float(torch.tensor(turn).cos()), abs=1e-3)
        assert abs(float(down)) == pytest.approx(abs(zoom * float(torch.tensor(turn).sin())), abs=1e-3)
        assert seen.abs().max() <= 49
    several = torch.randn(4, 3, 9, 9)
    chance = some_chance(4, 5)
    assert views(several, chance).shape == (4, 5, 3, 9, 9)
    assert torch.equal(views(several, chance)[2:3], views(several[2:3], chance[2:3]))


class Scale(nn.Module):
    """A layer that has no formula of its own."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return x * self.by


def every_kind():
    """Convolutions with Gram matrices, with gradients made and with groups; normalisation; ``Layer``; a Linear."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        Scale(),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 32, 4),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


@pytest.mark.parametrize(
    "net, steps", [(lambda: cnn(3), 1), (lambda: cnn(3), 2), (every_kind, 1)], ids=["cnn", "two steps", "every kind"]
)
def test_the_sum_is_a_loop_over_patients_and_views(net, steps):
    torch.manual_seed(0)
    task, longest = make_task(net().double(), chunk=5), 0.0
    index, chance, eta = torch.tensor([3, 0, 7, 7, 11, 2]), some_chance(6, 4), 0.1
    total, plain = torch.zeros(task.d).double(), torch.zeros(task.d).double()
    for patient, drawn in zip(index.tolist(), chance, strict=True):
        x = views(task.inputs(torch.tensor([patient])), drawn[None])[0]
        w, moved = task.start.clone(), torch.zeros(task.d).double()
        for _ in range(steps):
            task.load(w)
            apart = [
                torch.autograd.grad(
                    F.cross_entropy(task.net(view[None]), task.labels[[patient]]), task.net.parameters()
                )
                for view in x
            ]
            gradient = sum(torch.cat([part.flatten() for part in own]) for own in apart) / len(apart)
            w, moved = w - eta * gradient, moved + gradient / steps
        total, plain = total + moved / max(1.0, float(moved.norm()) / C), plain + moved
        longest = max(longest, float(moved.norm()))
    found = task.trajectory_sum(task.start, index, C, steps, eta, chance)
    assert torch.allclose(found, total, rtol=0, atol=1e-9) and longest > C
    alone = task.trajectory_sum(task.start, index, C, steps, eta)
    assert not torch.allclose(found, alone, atol=1e-3)
    if steps == 1:
        group = torch.tensor([1, 0, 1, 0, 1, 1])
        both = task.clipped_sums(task.start, index, C, group, 2, chance)
        apart = [task.clipped_sums(task.start, index[group == g], C, chance=chance[group == g])[0] for g in (0, 1)]
        assert torch.allclose(both, torch.stack(apart), rtol=0, atol=1e-9)
        assert torch.allclose(both.sum(0), total, rtol=0, atol=1e-9)
        unclipped = task.clipped_sums(task.start, index, torch.inf, chance=chance)[0]
        assert torch.allclose(unclipped, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [1, 6])
def test_a_patient_moves_the_sum_by_c_at_most_whatever_the_views(count, monkeypatch):
    task, chance = make_task(cnn(3)), some_chance(PATIENTS, count)

    def moved():
        whole, rest = (
            task.clipped_sums(task.start, torch.arange(first, PATIENTS), C, chance=chance[first:])[0]
            for first in (0, 1)
        )
        return float((whole - rest).norm()) / C

    assert moved() <= 1 + 1e-5

    factors = dpsgd.clip_factors  # planted: each view is clipped, and all of them are added
    monkeypatch.setattr(dpsgd, "clip_factors", lambda norms, most: count * factors(norms, most))
    assert (moved() > 1 + 1e-5) == (count > 1)


def train(name="FSCDP", augment=0, seed=0, **more):
    task = make_task(nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.Flatten(), nn.Linear(64, 3)))
    declared = replace(SETTINGS[name], rounds=4, epochs=2, sample_rate=0.5)
    declared = replace(declared, local_steps=2) if declared.averages else declared
    parts = torch.arange(PATIENTS).view(3, -1).numpy() if declared.federated else [torch.arange(PATIENTS).numpy()]
    plan = Plan.of(declared, CHOICES["cnn"][name], task, list(parts), augment=augment, **more)
    return Training(plan, task, list(parts), Randomness(seed)).run()


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_setting_trains_on_views_at_the_same_charge(name):
    torch.manual_seed(0)
    alone = train(name)
    torch.manual_seed(0)
    found = train(name, augment=3)
    torch.manual_seed(0)
    again = train(name, augment=3)
    assert torch.equal(found.server.w, again.server.w)  # views are drawn from the run's own streams
    assert not torch.allclose(found.server.w, alone.server.w, atol=1e-7)
    assert [ledger.charged for ledger in found.ledgers] == [ledger.charged for ledger in alone.ledgers]


def test_refusals(refuses):
    for terms in ({}, {"model": "linear", "data": "heart"}, {"data": "heart", "model": "mlp"}):
        with refuses("augment", "sees none", "leave it out"):
            Options(augment=4, **terms)
    for value in (-1, 1.5, 1001):
        with refuses("augment", str(value)):
            Options(model="cnn", augment=value)
    assert Options(model="cnn", augment=4).augment == 4
