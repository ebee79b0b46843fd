"""The protocols of private inference, each against plain arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from private_session import seeds, with_weights

from dopamine_lib.inference.network.rehearsal import run
from dopamine_lib.inference.protocols import beaver, kernels
from dopamine_lib.inference.protocols.comparison import COARSE, DROPPED, PRODUCTS, borrow
from dopamine_lib.inference.protocols.convolution import Branch, Convolution, ConvolutionOperation
from dopamine_lib.inference.protocols.normalised import NormalisedOperation
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, BufferLayout
from dopamine_lib.inference.protocols.pooling import (
    Axis,
    MaximumOperation,
    adaptive_windows,
    average_pool,
    max_pool,
    pair_counts,
    window_factors,
)
from dopamine_lib.inference.protocols.randomness import SESSION, fill, fresh_seed, query_key
from dopamine_lib.inference.protocols.relu import ReLU6, ReLU6Operation, ReLUOperation
from dopamine_lib.inference.protocols.sharing import decode, encode, random_ring, reconstruct, share, signed
from dopamine_lib.inference.protocols.truncation import TruncationOperation

EDGE = 2**31 - 2**15


def ring(values, bits=32):
    return np.asarray(values, np.int64).astype(f"u{bits // 8}")


# sharing and randomness


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_shares_add_up_to_what_was_shared(values):
    x = ring(values)
    assert np.array_equal(signed(reconstruct(*share(x))), values)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1000, 1000), st.sampled_from([32, 64]), st.integers(0, 20))
def test_fixed_point_is_right_to_half_a_unit(value, bits, exponent):
    assert abs(decode(encode([value], 2**exponent, bits), 2**exponent)[0] - value) <= 2.0 ** -(exponent + 1)


@pytest.mark.parametrize("value", [2.0**11, -(2.0**11) - 1, np.nan, np.inf])
def test_values_that_do_not_fit_the_ring_are_refused(value, refuses):
    with refuses("use a smaller scale"):
        encode([0.0, value], 2**20)


def test_no_two_streams_agree():
    seeds = [fresh_seed() for _ in range(3)]
    streams = set()
    for seed in seeds:
        for query in (0, 1, 2, SESSION):
            for operation in range(3):
                buffer = np.empty(64, np.uint8)
                fill(buffer, query_key(seed, query), operation)
                streams.add(buffer.tobytes())
    assert len(streams) == 3 * 4 * 3
    assert fresh_seed(1, "a") == fresh_seed(1, "a") != fresh_seed(1, "b")


def test_streams_of_one_operation_begin_alike_whatever_their_length():
    long, short = np.empty(300_001, np.uint8), np.empty(7, np.uint8)
    fill(long, bytes(16), 3)
    fill(short, bytes(16), 3)
    assert np.array_equal(long[:7], short) and abs(long.mean() - 127.5) < 1  # 1 is 7 standard errors


def test_a_layout_places_arrays_behind_one_another():
    layout = BufferLayout(a=("u1", (3,)), b=("u4", (2, 2)))
    assert layout.nbytes == 8 + 16
    arrays = layout.arrays(np.arange(24, dtype=np.uint8))
    assert arrays["a"].tolist() == [0, 1, 2] and arrays["b"][0, 0] == 0x0B0A0908


# multiplication


@pytest.mark.parametrize("bits", [32, 64])
def test_a_triple_multiplies(bits):
    x, y = random_ring((50,), bits), random_ring((50,), bits)
    (x_0, x_1), (y_0, y_1) = share(x), share(y)
    one, other = beaver.deal_triple((50,), bits)
    (e_0, f_0), (e_1, f_1) = beaver.mask(x_0, y_0, one), beaver.mask(x_1, y_1, other)
    e, f = e_0 + e_1, f_0 + f_1
    assert np.array_equal(beaver.multiply(0, e, f, one) + beaver.multiply(1, e, f, other), x * y)


def test_truncating_shares_is_off_by_one_at_most_where_the_ring_is_wide():
    x = ring(np.random.default_rng(0).integers(-(2**30), 2**30, 1000), 64)
    x_0, x_1 = share(x, bytes(16))
    y = signed(beaver.truncate(0, x_0, 16) + beaver.truncate(1, x_1, 16))
    assert np.abs(y - signed(x) / 2**16).max() <= 1


# comparison, ReLU, maximum


def check_relu(x, shift, y):
    """y is max(x, 0) >> shift up to what ``comparison`` says it may differ by."""
    x, y = np.asarray(x, np.int64), signed(y).astype(np.int64)
    floor = x >> shift
    kept = (y == floor) | (y == floor + 1)
    assert kept[x >= 0].all()
    assert (y[x <= -(2**DROPPED)] == 0).all()
    assert (kept | (y == 0))[x < 0].all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-EDGE, EDGE - 1), min_size=1, max_size=30),
    st.integers(0, 31),
)
def test_relu_is_right_within_its_margin(values, shift):
    check_relu(values, shift, run(ReLUOperation(len(values), shift), ring(values)))


def test_relu6_is_right_within_its_margin():
    rng, shift = np.random.default_rng(5), 7
    x, bound = rng.integers(-(2**30), 2**30, (3, 40, 25)), np.array([2**20, 2**27, 2**29])
    x[:, :3] = bound[:, None, None] + rng.integers(-(2**16), 2**16, (3, 3, 25))
    operation = ReLU6Operation(x.shape, shift)
    y = with_weights(operation, share(ring(x)), [], ring(bound))
    wanted = ReLU6("clip", (0,), x.shape, 1.0, shift).plain([x], ([], ring(bound)))
    apart = np.abs(signed(y) - wanted)
    close = np.minimum(np.abs(x), np.abs(x - bound[:, None, None])) < 2**DROPPED
    assert apart[~close].max() <= 2 and apart[close].max() <= 2 ** (DROPPED - shift) + 2


def edges(count, rng):
    """Values at and around every edge there is, and all over the range."""
    near = np.array([0, 2**15, -(2**15), 2**19, -(2**19), 2**30, -(2**30), EDGE, -EDGE - 2**15])
    values = rng.choice(near, count) + rng.integers(-(2**15), 2**15 + 1, count)
    values[: count // 3] = rng.integers(-(2**31), EDGE, count // 3)
    return np.clip(values, -(2**31), EDGE - 1)


def test_ten_thousand_comparisons_at_the_edges():
    values = edges(10_000, np.random.default_rng(1))
    check_relu(values, 15, run(ReLUOperation(len(values), 15), ring(values)))


@pytest.mark.slow
def test_ten_million_comparisons_at_the_edges():
    rng = np.random.default_rng(2)
    operation = ReLUOperation(1_000_000, 15)
    for _ in range(10):
        values = edges(1_000_000, rng)
        check_relu(values, 15, run(operation, ring(values)))


def test_a_positive_value_beyond_the_range_shows_as_wrong():
    """Tests the check: just below 2^31 the answer may be wrong, and sometimes is."""
    values = np.full(2000, 2**31 - 2)
    with pytest.raises(AssertionError):
        check_relu(values, 0, run(ReLUOperation(len(values), 0), ring(values), seeds=seeds(3)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-EDGE // 2 + 1, EDGE // 2 - 1)] * 2), min_size=1, max_size=30))
def test_maximum_is_right_within_its_margin(pairs):
    a, b = np.array(pairs).T
    y = signed(run(MaximumOperation(len(a)), ring(a), ring(b))).astype(np.int64)
    assert ((y == a) | (y == b)).all()
    assert (np.maximum(a, b) - y < 2**DROPPED).all()
    assert (y >= a)[a >= b].all()


def test_borrow_is_the_lexicographic_comparison_of_nibbles():
    """All 2^7 possible bits, under random masks shared at random, against the formula."""
    rng = np.random.default_rng(4)
    true = ((np.arange(128)[None] >> np.arange(7)[:, None]) & 1).astype(np.uint8)
    l0, e1, l1, e2, l2, e3, l3 = true
    masks = rng.integers(0, 2, (6, 128), dtype=np.uint8)
    products = np.array([np.bitwise_and.reduce([masks[j] for j in chosen]) for chosen in PRODUCTS])
    first = [rng.integers(0, 256, values.shape, dtype=np.uint8) for values in (masks, products)]
    second = [values ^ own for values, own in zip((masks, products), first, strict=True)]
    opened = true[:6] ^ masks
    got = borrow(PATIENT, opened, *first) ^ borrow(PROVIDER, opened, *second)
    assert len(PRODUCTS) == 15
    assert np.array_equal(got & 1, e3 & (l2 ^ e2 & (l1 ^ e1 & l0)))


# pooling, truncation


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [
        ((3, 3), (2, 2), (0, 0), False),
        ((3, 3), (2, 2), (0, 0), True),
        ((2, 3), (1, 2), (0, 0), True),
        ((3, 3), (2, 2), (1, 1), False),
        ((3, 2), (2, 3), (1, 1), True),
        ((4, 2), (3, 1), (2, 1), False),
        ((3, 3), (7, 9), (1, 0), True),
        ((3, 3), (1, 1), (1, 1), False),
        ((5, 4), (1, 1), (2, 2), False),
    ],
)
@pytest.mark.parametrize("shape", [(2, 7, 8), (1, 6, 6), (3, 3, 5)])
def test_pooling_matches_torch_in_shapes_and_values(shape, kernel, stride, padding, ceil):
    import torch
    import torch.nn.functional as F

    x = np.random.default_rng(0).integers(-1000, 1000, shape)
    sizes = []

    def maximum(a, b):
        sizes.append(len(a))
        return np.maximum(a, b)

    wanted = F.max_pool2d(torch.tensor(x).double()[None], kernel, stride, padding, ceil_mode=ceil)[0].numpy()
    axes = tuple(Axis(*one, ceil) for one in zip(kernel, stride, padding, strict=True))
    counts = pair_counts(shape, axes)
    before = x.copy()
    assert np.array_equal(max_pool(x, axes, [maximum] * len(counts)), wanted)
    assert sizes == counts and np.array_equal(x, before)


@pytest.mark.parametrize("outputs", [(1, 1), (2, 3), (4, 4)])
def test_average_pooling_matches_torch(outputs):
    import torch
    import torch.nn.functional as F

    x = np.random.default_rng(0).integers(0, 1000, (2, 7, 6))
    rows, columns = (adaptive_windows(n, m) for n, m in zip((7, 6), outputs, strict=True))
    common, _ = window_factors(rows, columns)
    wanted = F.adaptive_avg_pool2d(torch.tensor(x).double()[None], outputs)[0].numpy()
    x_0, x_1 = share(ring(x))
    got = average_pool(x_0, rows, columns) + average_pool(x_1, rows, columns)
    assert np.allclose(got / common, wanted)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**30), 2**30 - 1), min_size=1, max_size=30), st.integers(0, 30))
def test_truncation_rounds_down_or_up(values, shift):
    y = signed(run(TruncationOperation((len(values),), shift), ring(values))).astype(np.int64)
    floor = np.array(values) >> shift
    assert ((y == floor) | (y == floor + 1)).all()


def test_lifting_to_64_bits_is_exact():
    values = np.random.default_rng(0).integers(-(2**30), 2**30, 5000)
    y = run(TruncationOperation((5000,), 0, bits=64), ring(values))
    assert y.dtype == np.uint64 and np.array_equal(signed(y), values)


def test_truncation_has_the_right_mean():
    """10,000 roundings of 0.25: their mean lies within 5 standard errors, false alarm below 1e-6."""
    y = signed(run(TruncationOperation((10_000,), 4), ring(np.full(10_000, 4)), seeds=seeds(1)))
    assert abs(y.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 10_000)


# convolution and the head


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [
        ((1, 1), (1, 1), (0, 0), 1),
        ((3, 2), (2, 1), (1, 0), 1),
        ((5, 5), (1, 1), (2, 2), 1),
        ((3, 2), (2, 1), (1, 0), 2),
        ((3, 3), (1, 2), (1, 1), 6),
        ((1, 1), (2, 1), (0, 0), 6),
    ],
)
def test_convolution_of_shares_is_convolution(kernel, stride, padding, groups):
    import torch
    import torch.nn.functional as F

    rng = np.random.default_rng(0)
    x, bias = rng.integers(-99, 99, (6, 8, 7)), rng.integers(-99, 99, 6)
    w = rng.integers(-99, 99, (6, 6 // groups, *kernel))
    given = torch.tensor(x)[None], torch.tensor(w), torch.tensor(bias)
    wanted = F.conv2d(*given, stride, padding, groups=groups)[0].numpy()
    branch = Branch(6, kernel, stride, padding, groups)
    layer = Convolution("layer", (0,), (12, *wanted.shape[1:]), 1.0, (branch, branch), False)
    matrix = ring(w).reshape(6, -1)
    shares, biases = share(ring(x)), np.tile(ring(bias), 2)
    got = with_weights(ConvolutionOperation(layer, x.shape), shares, [matrix, matrix], biases)
    assert np.array_equal(signed(got), np.concatenate([wanted, wanted]))
    assert np.array_equal(layer.plain([x], ([matrix, matrix], biases)), np.concatenate([wanted, wanted]))


def test_the_normalised_head_equals_the_plain_one():
    rng = np.random.default_rng(0)
    x, w, bias = rng.integers(0, 2**20, 64), rng.normal(size=(5, 64)), rng.normal(size=5)
    w -= w.mean(1, keepdims=True)
    inverse_bits, weight_bits = 40, 16
    scale = 2.0 ** (inverse_bits + weight_bits)
    operation = NormalisedOperation(64, 5, inverse_bits)
    got = with_weights(operation, share(ring(x, 64)), [encode(w, 2**weight_bits, 64)], encode(bias, scale, 64))
    centred = x - x.mean()
    assert np.abs(decode(got, scale) - (w @ (centred / np.linalg.norm(centred)) + bias)).max() < 1e-3
    flat = with_weights(
        operation, share(ring(np.full(64, 7), 64)), [encode(w, 2**weight_bits, 64)], encode(bias, scale, 64)
    )
    assert np.allclose(decode(flat, scale), bias)


# kernels


def test_compiled_kernels_give_the_same_bits():
    pytest.importorskip("numba")
    from dopamine_lib.inference.protocols import compiled

    rng = np.random.default_rng(0)

    def words(*shape):
        return rng.integers(0, 2**32, shape, dtype=np.uint32)

    def same(name, arguments, outs):
        results = []
        for module in (kernels, compiled):
            for out in outs:
                out[...] = 0
            getattr(module, name)(*arguments)
            results.append([out.copy() for out in outs])
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True)), name

    for n in (8, 4088, 40_000):
        m, rho, extra, r_0 = words(n), words(n), words(4, n), words(n)
        thermometer = rng.integers(0, 2**16, (4, n), dtype=np.uint16)
        bits = rng.integers(0, 2, n, dtype=np.uint8)
        out, planes = np.empty(n, np.uint32), np.zeros((8, n // 8), np.uint8)
        same("look_up", (m, thermometer, planes), [planes])
        for number in (PATIENT, PROVIDER):
            ends, rest = np.empty((2, n // 8), np.uint8), np.empty(n // 8, np.uint8)
            same("look_up_end", (number, m, thermometer[2:], rho, ends, rest), [ends, rest])
            for shift in (0, 15, 16):
                same("finish_relu", (number, m, bits, rho, extra[:2], thermometer[:2], shift, out), [out])
            for coarse in (0, COARSE):
                arguments = number, extra[0, 3:], m, bits, r_0, rho, extra[1], coarse, out[3:]
                same("finish_maximum", arguments, [out])
        packed = [(np.empty(n, np.uint16), np.empty(n // 2, np.uint8)) for _ in range(2)]
        for masked, rest, into in zip((m, r_0), (0, 4095), packed, strict=True):
            for count in (n, n - 3, n // 2 - 1, 0):  # half as many and fewer: no element for the bytes' upper halves
                same("pack_masked", (extra[0, :count], np.uint32(rest), masked, *into), into)
        same("open_upper", (*packed[0], *packed[1], out), [out])
        assert np.array_equal(out, (m >> COARSE) + (r_0 >> COARSE) << COARSE)
        r, rho_bits, t, rho_1 = words(n), np.empty(n, np.uint8), np.empty_like(thermometer), words(n)
        for coarse in (0, COARSE):
            outs = r, rho_bits, t, rho_1
            same("deal_comparison", (r_0, m, bits, thermometer, rho, *outs, coarse), outs)
        outs = np.empty((2, n), np.uint32), np.empty((2, n), np.uint16)
        for shift in (0, 1, 15, 16):
            same("deal_relu", (m, bits, shift, extra[:2], thermometer[:2], *outs), outs)
        same("deal_maximum", (m, bits, rho, out), [out])
    for rows, depth, columns in ((1, 1, 1), (3, 5, 700), (5, 27, 1000), (64, 144, 513), (7, 6, 9000)):
        w, x, out = words(rows, depth), words(depth, columns), np.empty((rows, columns), np.uint32)
        same("multiply", (w, x, out), [out])
        assert np.array_equal(out, w @ x)


def test_numpy_kernels_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("DOPAMINE_KERNELS", "numpy")
    assert kernels.active.__wrapped__() is kernels
