"""What a net is tried out for before a patient is used: rows that touch each other, buffers, shapes, batches of one."""

import pytest
import torch
from plain_clipping import clipped_sums_by_loop
from torch import nn

from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.trial import noise_like, refuse_mixed_samples


class Net(nn.Module):
    """A linear layer on what ``before`` makes of rows of 12, with a buffer ``seen``."""

    def __init__(self, before=lambda net, x: x, after=lambda scores: scores):
        super().__init__()
        self.layer, self.before, self.after = nn.Linear(12, 3), before, after
        self.register_buffer("seen", torch.zeros(12))

    def forward(self, x):
        return self.after(self.layer(self.before(self, x)))


def task_of(net, **options):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    return Task(net, lambda index: x[index], torch.zeros(5, dtype=torch.int64), **options)


def first_step(net, **options):
    task = task_of(net, **options)
    return task.clipped_sums(task.start, torch.arange(5), 1.0)


@pytest.mark.parametrize(
    "mixes",
    [
        lambda net, x: x - x[:1],
        lambda net, x: torch.cumsum(x, 0),
        lambda net, x: x.flip(0).cumsum(0).flip(0),
        lambda net, x: torch.cat([x[:1], x[1:] - x[:-1]]),
        lambda net, x: torch.cat([x[:1], x[1:] + 1e-30 * x[:-1]]),
        lambda net, x: x.roll(1, 0),
        lambda net, x: x / 255 if x.nan_to_num().max() > 0.3 else x,
    ],
    ids=["first", "sums", "sums from behind", "differences", "barely", "rolled", "decided by all"],
)
def test_a_net_whose_later_rows_depend_on_others_is_refused(mixes, refuses):
    with refuses("others in its batch"):
        first_step(Net(mixes))


def test_a_layer_that_mixes_is_not_differentiated_alone_even_if_the_scores_do_not_show_it():
    class Undone(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixes, self.alone = nn.Linear(12, 3, bias=False), nn.Linear(12, 3)

        def forward(self, x):
            return self.mixes(x - x[:1]) + x[:1] @ self.mixes.weight.T + self.alone(x)

    net = Undone().double()
    samples = noise_like(torch.zeros(1, 12).double())
    assert refuse_mixed_samples(net, dict(net.named_parameters()), samples[0], []) == {"alone", ""}


def add(net, x):
    with torch.no_grad():
        net.seen.add_(x.sum(0))
    return x


def replace(net, x):
    net.seen = net.seen + x.sum(0).detach()
    return x


def only_in_training(net, x):
    return add(net, x) if torch.is_grad_enabled() else x


@pytest.mark.parametrize("gathers", [add, replace, only_in_training])
@pytest.mark.parametrize("use", [first_step, lambda net: task_of(net).logits(torch.zeros(39), torch.arange(5))])
def test_a_net_that_gathers_in_its_buffers_is_refused_and_they_stay(gathers, use, refuses):
    net = Net(gathers)
    with refuses("buffer 'seen'", "without noise", "beforehand"):
        use(net)
    assert not net.seen.any()


def test_a_buffer_that_is_only_read_stays_as_it_is():
    net = Net(lambda net, x: x + net.seen)
    net.seen.fill_(2.0)
    assert first_step(net).any() and bool((net.seen == 2).all())


@pytest.mark.parametrize(
    "after, said",
    [
        (lambda scores: scores[:, 0], "returns (3,) for a batch of 3"),
        (lambda scores: (scores, scores), "returns tuple"),
        (lambda scores: scores.squeeze(0), "returns (3,) for a batch of 1"),
        (lambda scores: scores.squeeze(0).softmax(1), "batch of 1"),
    ],
)
def test_a_net_that_returns_anything_but_a_row_of_scores_is_refused(after, said, refuses):
    with refuses(said):
        first_step(Net(after=after))


@pytest.mark.parametrize("classes", [2, 4])
def test_another_number_of_scores_than_classes_is_refused(classes, refuses):
    assert first_step(Net(), classes=3).any()
    with refuses("returns (3, 3)", f"(3, {classes})"):
        first_step(Net(), classes=classes)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_equal_the_loop(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.layer = kind(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(self.steps(x)[0][:, -1])

    torch.manual_seed(0)
    net, x, y = Recurrent(), torch.randn(4, 5, 4), torch.tensor([0, 1, 2, 0])
    task, group = Task(net, lambda index: x[index], y), torch.tensor([0, 0, 1, 1])
    with torch.no_grad():  # as in training
        own = task.clipped_sums(task.start, torch.arange(4), 0.1, group, 2)
    assert torch.allclose(own, clipped_sums_by_loop(net, x, y, 0.1, group, 2).to(own), atol=1e-5)
    assert own.norm() > 0.1
