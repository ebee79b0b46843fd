"""Book-keeping against a plain loop over samples: every kind of layer, both ways to a norm, and what is refused."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_clipping import clipped_sums_by_loop
from torch import nn

from dopamine_lib.models.networks import cnn, squeezenet
from dopamine_lib.privacy import linear_map
from dopamine_lib.privacy.bookkeeping import BookKeeper
from dopamine_lib.privacy.dpsgd import clip_factors
from dopamine_lib.privacy.linear_map import LinearMap, cheaper_by_gram

CLIP = 0.5
WAYS = {"gram": lambda *shape: True, "instantiated": lambda *shape: False}


def parameters_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def sums_of(net, x, y, clip=CLIP, group=None, groups=1):
    """Clipped sums by book-keeping (groups, d); ``group`` ascends."""
    book = BookKeeper(net).open(parameters_of(net), x, y)
    sums = x.new_zeros(groups, sum(p.numel() for p in net.parameters()))
    book.add_to(sums, clip_factors(book.norms, clip), group or [0] * len(x))
    return sums


def assert_equals_the_loop(net, x, y, group=None, groups=1):
    net = net.double().eval()
    group = group or [0] * len(x)
    own = sums_of(net, x, y, CLIP, group, groups)
    loop = clipped_sums_by_loop(net, x, y, CLIP, torch.tensor(group), groups)
    assert torch.allclose(own, loop, atol=1e-10, rtol=0)
    assert own.abs().max() > 1e-4  # a comparison of zeros would show nothing


def random_batch(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64), torch.arange(shape[0]) % 3


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
PADDING = st.tuples(st.integers(0, 2), st.integers(0, 2)) | st.sampled_from(["same", "valid"])
CONVOLUTION = st.fixed_dictionaries(
    {
        "in_channels": st.integers(1, 3),
        "out_channels": st.integers(1, 4),
        "kernel_size": PAIR,
        "stride": PAIR,
        "dilation": PAIR,
        "padding": PADDING,
        "padding_mode": st.sampled_from(["zeros", "reflect", "circular"]),
        "bias": st.booleans(),
    }
).filter(lambda options: options["padding"] != "same" or options["stride"] == (1, 1))


@settings(max_examples=60, deadline=None)
@given(CONVOLUTION, st.sampled_from(sorted(WAYS)), st.booleans(), st.integers(1, 4))
def test_any_convolution_equals_the_loop(options, way, channels_last, batch):
    torch.manual_seed(0)
    first = nn.Conv2d(**options)
    second = nn.Conv2d(options["out_channels"], 3, 1)
    net = nn.Sequential(first, nn.Tanh(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = random_batch(batch, options["in_channels"], 8, 9)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with mock.patch.object(linear_map, "cheaper_by_gram", WAYS[way]):
        assert_equals_the_loop(net, x, y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(5, 7), (5, 4, 7), (5, 2, 3, 7), (1, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_equals_the_loop_at_any_number_of_positions(way, shape, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 6, bias=bias), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x, y = random_batch(*shape)
    net.double()(x)
    with mock.patch.object(linear_map, "cheaper_by_gram", WAYS[way]):
        assert_equals_the_loop(net, x, y)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", [cnn, squeezenet])
@pytest.mark.parametrize("way", [*WAYS, "rule"])
def test_the_models_equal_the_loop(make, way, in_place):
    torch.manual_seed(0)
    net = make(3)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = in_place
    x, y = random_batch(4, 3, 28, 28)
    rule = WAYS.get(way, cheaper_by_gram)
    with mock.patch.object(linear_map, "cheaper_by_gram", rule):
        assert_equals_the_loop(net, x.contiguous(memory_format=torch.channels_last), y, [0, 2, 2, 3], 5)


def test_the_rule_uses_both_ways_in_squeezenet():
    """Few positions: Gram; many: instantiated. The counts are those of the 64-pixel model."""
    assert cheaper_by_gram(9, 576, 256) and cheaper_by_gram(1, 512, 32)
    assert not cheaper_by_gram(225, 144, 64) and not cheaper_by_gram(961, 27, 64)


@pytest.mark.parametrize("fault", ["norms", "bias"])
def test_a_wrong_norm_is_noticed(fault):
    """The comparison above fails where norms are taken too small, or leave the bias out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = random_batch(4, 3, 2, 2)
    keep = LinearMap.keep

    def faulty(layer, x, g, *rest):
        kept = keep(layer, x, g, *rest)
        kept.squares = kept.squares * 0.99 if fault == "norms" else kept.squares - g.square().sum(1)
        return kept

    assert_equals_the_loop(net, x, y)
    with mock.patch.object(LinearMap, "keep", faulty), pytest.raises(AssertionError):
        assert_equals_the_loop(net, x, y)


@pytest.mark.parametrize("make, pixels", [(cnn, 28), (squeezenet, 64)])
def test_single_precision_keeps_the_clip_to_a_ten_thousandth(make, pixels):
    """A sample's share of a float32 sum is at most C, up to rounding."""
    torch.manual_seed(1)
    net = make(3).eval()
    x, y = random_batch(6, 3, pixels, pixels)
    x = x.float().contiguous(memory_format=torch.channels_last)
    assert (BookKeeper(net).open(parameters_of(net), x, y).norms > 0.01).all()
    for clip in (0.01, 1e-3):
        shares = sums_of(net, x, y, clip, list(range(6)), 6).double()  # each sample in a group of its own
        assert torch.allclose(shares.norm(dim=1), torch.tensor(clip, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_layer_the_loss_does_not_reach_has_no_gradient():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.used = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    x, y = random_batch(3, 4)
    sums = sums_of(Idle().double(), x, y)[0]
    assert not sums[:10].any() and sums[10:].any()


class Changed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.first(x)
        scores = self.layer(hidden)
        hidden.mul_(2)
        return scores


def test_an_input_that_is_changed_in_place_is_refused(refuses):
    """As in ordinary training."""
    net = Changed().double()
    x, y = random_batch(3, 4)
    with refuses("'layer'", "in place"):
        sums_of(net, x, y)
    assert not any(module._forward_hooks for module in net.modules())


def test_the_net_is_left_as_it_was():
    net = cnn(3).double().eval()
    before = {name: p.clone() for name, p in net.named_parameters()}
    x, y = random_batch(3, 3, 16, 16)
    with torch.no_grad():  # as in training
        sums_of(net, x, y)
    assert all(
        torch.equal(p, before[name]) and p.requires_grad and p.grad is None for name, p in net.named_parameters()
    )
    assert not any(module._forward_hooks for module in net.modules())
    assert F.cross_entropy(net(x), y).requires_grad
