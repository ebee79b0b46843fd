"""Sums as computed are within the slack of the exact ones, however many patients are in them."""

import math

import pytest
import torch
from torch import nn

from dopamine_lib.models.networks import cnn
from dopamine_lib.privacy import dpsgd, head
from dopamine_lib.privacy.bookkeeping import Book
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.float_sums import CLIP_SLACK, FEW, FLOAT_SLACK, most_together, room, sum_type
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.layer import Kept
from dopamine_lib.privacy.linear_map import LinearMap

#: How far one of two neighbours' sums may be off, in units of C.
MOST = (FLOAT_SLACK - CLIP_SLACK) / 2
FAULT = {False: "as it is", True: "added in float32"}


def in_float32(monkeypatch):
    """The fault put back: float32, however many are added."""
    for module in (dpsgd, head):
        monkeypatch.setattr(module, "sum_type", lambda most, given: given)


def test_the_room_is_what_the_bound_leaves_of_the_slack():
    for most in (1, 10, FEW):
        assert most * room(most) + most * (most + 5) / 2 * 2**-24 == pytest.approx(MOST, rel=1e-12)
        assert room(most) > 0 and sum_type(most, torch.float32) == torch.float32
    for most in (FEW + 1, 10**6):
        assert room(most) == 0 and sum_type(most, torch.float32) == torch.float64
        assert most * (most + 5) / 2 * 2**-53 < MOST  # and none of it is needed
    group = torch.tensor([0, 2, 2]).repeat(FEW)
    assert most_together(group, None) == 3 * FEW and most_together(group, group) == 2 * FEW
    assert most_together(group[:FEW], group[:FEW]) == FEW


@pytest.mark.parametrize("fault", FAULT, ids=FAULT.values())
@pytest.mark.parametrize("way", ["clipped_sums", "product_sums"])
@pytest.mark.parametrize("patients", [FEW, FEW + 1, 12_000])
def test_a_heads_sum_is_exact_to_the_slack(patients, way, fault, monkeypatch):
    """Equal vectors are the worst: every rounding goes the same way. 12,000 are in a step of FPDP on MNIST."""
    if way == "clipped_sums":
        pytest.importorskip("numba")
    if fault:
        in_float32(monkeypatch)
    off = []
    for seed in range(3 if patients < 1000 else 1):
        torch.manual_seed(seed)
        x = torch.rand(1, 64).expand(patients, -1).contiguous()
        task = HeadTask(nn.Linear(64, 3), x, torch.zeros(patients, dtype=torch.int64))
        sums = [getattr(task, way)(task.start, index, 0.5)[0].double() for index in map(torch.arange, (1, patients))]
        off.append(float((sums[1] - patients * sums[0]).norm()) / 0.5)
    # a product's rows are computed together, which may round them otherwise
    assert (max(off) <= MOST + patients * 2e-7 * (way == "product_sums")) == (not fault or patients <= FEW + 1)


def layer(linear):
    return LinearMap("layer", linear, 0)


@pytest.mark.parametrize(
    "positions, samples, fault",
    [(1, FEW, False), (49, 10, False), (49, FEW, False), (64, 1000, False), (64, 1000, True)],
)
def test_a_layers_products_are_exact_to_the_room(positions, samples, fault):
    """Equal products again, at as many positions as Gram matrices are used for; the fault is float32 at any length."""
    torch.manual_seed(0)
    own, x, g = layer(nn.Linear(24, 8)), torch.rand(24), torch.rand(8)
    kept = own._by_gram(*(part.expand(samples, positions, -1).contiguous() for part in (x, g)))
    book = Book([(own, kept)])
    factors = dpsgd.clip_factors(book.norms, 1.0)
    sums = torch.zeros(1, 8 * 25, dtype=torch.float32 if fault else sum_type(samples, torch.float32))
    book.add_to(sums, factors, [0] * samples, math.inf if fault else room(samples))
    exact = samples * factors[0] * positions * torch.cat([torch.outer(g.double(), x.double()).flatten(), g.double()])
    assert (float((sums[0].double() - exact).norm()) <= MOST) == (not fault)


@pytest.mark.parametrize("fault", FAULT, ids=FAULT.values())
def test_instantiated_gradients_are_added_exactly(fault):
    own, samples = layer(nn.Linear(24, 8)), 12_000
    torch.manual_seed(0)
    gradient = torch.rand(8 * 25)
    kept = Kept(gradient.double().square().sum().expand(samples), gradients=gradient.expand(samples, -1).contiguous())
    book = Book([(own, kept)])
    factors = dpsgd.clip_factors(book.norms, 1.0)
    sums = torch.zeros(1, 8 * 25, dtype=torch.float32 if fault else sum_type(samples, torch.float32))
    piece = Book([(own, Kept(kept.squares[:100], gradients=kept.gradients[:100]))])
    for _ in range(samples // 100):  # by micro-batches
        piece.add_to(sums, factors[:100], [0] * 100)
    rows = gradient.view(8, 25).double()
    exact = samples * factors[0] * torch.cat([rows[:, :24].flatten(), rows[:, 24]])
    assert (float((sums[0].double() - exact).norm()) <= MOST) == (not fault)


@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_who_else_is_in_a_batch_moves_a_networks_gradients_by_a_thousandth_of_the_slack(stretch, monkeypatch):
    """Measured, not proven: the sum less the patient's own part, with and without the patient."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, 28, 28)
    task = Task(cnn(5), lambda index: x[index], torch.arange(40) % 5)
    monkeypatch.setattr(dpsgd, "sum_type", lambda most, given: torch.float64)
    monkeypatch.setattr(dpsgd, "room", lambda most: 0)
    everybody, w = torch.arange(40), task.start * stretch
    whole = task.clipped_sums(w, everybody, 1.0)[0]
    for patient in (0, 17, 39):
        rest = task.clipped_sums(w, everybody[everybody != patient], 1.0)[0]
        own = task.clipped_sums(w, everybody[[patient]], 1.0)[0]
        assert own.norm() == pytest.approx(1, rel=1e-5) and (whole - rest - own).norm() < 1e-3 * FLOAT_SLACK


def test_a_heads_gradients_do_not_depend_on_who_else_is_there():
    """By the compiled loop: to the last digit of float64, with the patient, without, and in another order."""
    pytest.importorskip("numba")
    torch.manual_seed(0)
    task = HeadTask(nn.Linear(64, 5), torch.randn(400, 64), torch.arange(400) % 5)
    everybody = torch.arange(400)
    whole = task.clipped_sums(task.start, everybody, 1.0)[0]
    alone = sum(task.clipped_sums(task.start, everybody[[patient]], 1.0)[0].double() for patient in range(400))
    assert (whole - alone).norm() < 1e-12
    assert (whole - task.clipped_sums(task.start, everybody.flip(0), 1.0)[0]).norm() < 1e-12


def test_a_gradient_that_overflows_at_every_position_is_zero():
    """Infinite products have an infinite norm, which is no more than eight times itself."""
    own = layer(nn.Linear(2, 2))
    x, g = torch.ones(2, 3, 2), torch.ones(2, 3, 2)
    g[0] = torch.inf
    assert own._by_gram(x, g) is None
    book = Book([(own, own.keep(x, g, {}))])
    sums = torch.zeros(1, 6)
    book.add_to(sums, dpsgd.clip_factors(book.norms, 1.0), [0, 0])
    assert torch.isfinite(sums).all() and float(sums.norm()) == pytest.approx(1, rel=1e-6)
