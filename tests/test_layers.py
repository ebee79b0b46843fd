"""One contract for every kind of layer: its clipped sums are those of a plain loop over samples.

A new kind of layer joins by a line in ``LAYERS``; a new way to put layers together, by one in ``NETS``.
"""

import pytest
import torch
from plain_clipping import clipped_sums_by_loop
from torch import nn

from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.layer import Layer
from dopamine_lib.privacy.layers import KINDS, Convolution, Embedding, Normalisation
from dopamine_lib.privacy.linear_map import LinearMap

#: A layer, the shape of its inputs without the batch, and the kind that differentiates it.
LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), (6,), LinearMap),
    "Linear, positions": (lambda: nn.Linear(6, 4, bias=False), (5, 6), LinearMap),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (4, 9, 8), LinearMap),
    "Conv2d, same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"), (4, 6, 5), LinearMap),
    "Conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 8, 7), Convolution),
    "Conv2d, grouped, same": (
        lambda: nn.Conv2d(6, 6, (2, 3), padding="same", padding_mode="reflect", dilation=(2, 1), groups=3, bias=False),
        (6, 7, 6),
        Convolution,
    ),
    "Conv2d, depthwise": (
        lambda: nn.Conv2d(4, 4, 3, stride=(2, 1), padding=1, groups=4),
        (4, 8, 7),
        Convolution,
    ),
    "Conv2d, depthwise, tiny": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 2, 2), Convolution),
    "Conv2d, depthwise, 5x5": (
        lambda: nn.Conv2d(4, 4, 5, stride=2, padding=2, dilation=(1, 2), groups=4, bias=False),
        (4, 11, 9),
        Convolution,
    ),
    "Conv2d, depthwise, doubled": (lambda: nn.Conv2d(4, 8, 5, padding=2, groups=4), (4, 6, 6), Convolution),
    "Conv2d, large kernel": (lambda: nn.Conv2d(3, 4, 5, stride=2, padding=2), (3, 8, 7), Convolution),
    "Conv2d, large kernel, wide": (lambda: nn.Conv2d(16, 4, 5, padding=2, bias=False), (16, 6, 6), Convolution),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 8), Layer),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 3), Layer),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (4, 3, 3), Layer),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 5, 3), Normalisation),
    "LayerNorm": (lambda: nn.LayerNorm((5, 3)), (4, 5, 3), Normalisation),
    "LayerNorm, no bias": (lambda: nn.LayerNorm(3, bias=False), (3,), Normalisation),
    "RMSNorm": (lambda: nn.RMSNorm(3), (4, 5, 3), Normalisation),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 5, 3), Layer),
    "Embedding": (lambda: nn.Embedding(5, 3, padding_idx=1), None, Embedding),
    "Embedding, rare": (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), None, Layer),
    "PReLU": (lambda: nn.PReLU(4), (4, 5), Layer),
    "Scale and bias": (lambda: Scale(4), (3, 4), Layer),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (6,), Layer),
    "weight_norm, as it was": (lambda: nn.utils.weight_norm(nn.Linear(6, 4)), (6,), Layer),
    "LSTM": (lambda: Last(nn.LSTM(4, 3, batch_first=True)), (5, 4), Layer),
}


class Scale(nn.Module):
    """A scale and a bias."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.linspace(0.5, 2, width)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x + self.shift


class Last(nn.Module):
    """The last output of a recurrent layer, which gives several."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0][:, -1]


class Net(nn.Module):
    """Two linear layers, and ``forward`` given: one way to put them together."""

    def __init__(self, forward, **others):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.put_together = forward
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x):
        return self.put_together(self, x)


def tied(net, x):
    return net.second(net.first(x))


def with_tied_weights():
    net = Net(tied)
    net.second.weight = net.first.weight
    return net


def residual(net, x):
    x = net.norm(net.first(x)).relu_()
    out = net.second(x)
    out += x
    return out.relu_()


#: A net of samples of 4 numbers, and the names of the modules by which it is differentiated.
NETS = {
    "one after the other": (lambda: Net(tied), {"first", "second"}),
    "one of them twice": (lambda: Net(lambda net, x: net.second(net.first(net.first(x)))), {""}),
    "twice in a part": (
        lambda: nn.Sequential(nn.Linear(4, 4), Net(lambda net, x: net.first(net.first(x)))),
        {"0", "1"},
    ),
    "tied weights": (with_tied_weights, {""}),
    "in place, but after its use": (lambda: Net(residual, norm=nn.GroupNorm(2, 4)), {"first", "second", "norm"}),
    "a scale beside layers": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), Net(lambda net, x: net.first(x) * net.own, own=nn.Parameter(torch.ones(4)))
        ),
        {"0", "1"},
    ),
    "weights used by another": (
        lambda: Net(lambda net, x: nn.functional.linear(net.first(x), net.first.weight + net.second.weight)),
        {""},
    ),
    "called by keyword": (lambda: Net(lambda net, x: net.second(input=net.first(x))), {""}),
    "positions as rows": (
        lambda: Net(lambda net, x: net.second(net.first(x.view(-1, 2).repeat(1, 2))).view(len(x), -1)),
        {""},
    ),
    "a row of positions": (
        lambda: Net(lambda net, x: net.first(x) + net.places(torch.arange(1)), places=nn.Embedding(1, 4)),
        {""},
    ),
    "samples turned round and back": (lambda: Net(lambda net, x: net.second(net.first(x).flip(0)).flip(0)), {""}),
    "a choice by value": (lambda: Net(lambda net, x: net.first(x if x.sum() > 0 else x)), {""}),
    "attention": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, 0.0, batch_first=True), nn.Flatten()
        ),
        None,
    ),
}


def assert_equals_the_loop(net, x):
    net, y = net.double().eval(), torch.arange(len(x)) % 3
    task = Task(net, lambda index: x[index], y)
    group = torch.tensor([0, 2, 0, 2, 1][: len(x)])
    own = task.clipped_sums(task.start, torch.arange(len(x)), 0.05, group, 4)
    loop = clipped_sums_by_loop(net, x, y, 0.05, group, 4)
    assert torch.allclose(own.to(loop), loop, atol=1e-10, rtol=0)
    assert own.abs().max() > 1e-4  # a comparison of zeros would show nothing
    assert not any(module._forward_hooks for module in net.modules())
    return task._keeper.layers


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_equals_the_loop(name):
    torch.manual_seed(0)
    make, shape, kind = LAYERS[name]
    x = (
        torch.randn(5, *shape, dtype=torch.float64)
        if shape
        else torch.tensor([[0, 1, 3, 3], [1, 1, 1, 1]] * 2 + [[4, 0, 4, 0]])
    )
    first = Scale(shape[-1]) if shape else nn.Identity()
    net = nn.Sequential(first, make(), nn.Flatten(), nn.LazyLinear(3)).double()
    net(x)  # the last layer's width
    layer = next(layer for layer in assert_equals_the_loop(net, x) if layer.name == "1")
    assert type(layer) is kind


def test_every_kind_is_tried():
    assert {kind for _, _, kind in LAYERS.values()} == {*KINDS.values(), Convolution, Layer}


@pytest.mark.parametrize("fault", ["norm", "sum"])
def test_a_faulty_layer_is_noticed(fault, monkeypatch):
    """The comparison fails where a kind of layer is wrong by a thousandth."""
    add = Normalisation.add

    def wrong_norm(*arguments):
        kept = Layer.keep(*arguments)
        kept.squares *= 0.998
        return kept

    def wrong_sum(layer, total, kept, factors, rows):
        add(layer, total, kept, 0.999 * factors, rows)

    monkeypatch.setattr(Normalisation, *(("keep", wrong_norm) if fault == "norm" else ("add", wrong_sum)))
    with pytest.raises(AssertionError):
        test_every_kind_of_layer_equals_the_loop("GroupNorm")


def test_where_a_module_is_not_what_it_seems_the_whole_net_is_differentiated(monkeypatch):
    """The last resort: what layers add up to, on noise, is compared with the net's own gradient."""
    monkeypatch.setattr(Normalisation, "gradients", lambda layer, x, g, parameters: torch.ones(len(x), 8).to(g))
    net = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3))
    assert [layer.name for layer in assert_equals_the_loop(net, torch.randn(5, 4).double())] == [""]


@pytest.mark.parametrize("name", NETS)
def test_any_way_to_put_layers_together_equals_the_loop(name):
    torch.manual_seed(0)
    make, names = NETS[name]
    found = {layer.name for layer in assert_equals_the_loop(make(), torch.randn(5, 4, dtype=torch.float64))}
    assert names is None or found == names
