"""Updates to integers and back: nothing wraps, one rounding, exact sums in every layout."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopamine_lib.encryption.codec import LAYOUTS, SLOTS, Codec, RangeError, check_limit, limit_of
from dopamine_lib.errors import InputError

ENCRYPTED = [name for name, layout in LAYOUTS.items() if layout.plain_modulus]


def near_the_edge(layout, hospitals, d, seed=0):
    """Values (K, d) of which a third are at the limit, a third next to it and a third anywhere."""
    rng, limit = np.random.default_rng(seed), limit_of(layout, hospitals)
    size = rng.choice([0, 1, 2], d)
    edge = np.where(size == 0, limit, np.where(size == 1, limit - rng.integers(0, 3, d), rng.integers(0, limit + 1, d)))
    signs = rng.choice([-1, 1], d)
    return np.tile(signs * edge, (hospitals, 1)).astype(np.int64)


@pytest.mark.parametrize("name", ENCRYPTED)
def test_parameters_of_the_layouts(name):
    layout = LAYOUTS[name]
    t = layout.plain_modulus
    assert t % (2 * SLOTS) == 1 and np.all(t % np.arange(3, math.isqrt(t) + 1, 2))
    largest = sum(layout.total_range << (f * layout.field_bits) for f in range(layout.fields))
    assert largest <= t // 2  # both signs of every total have a place mod t
    if layout.fields > 1:
        assert layout.total_range < 1 << (layout.field_bits - 1)


def test_sizes_of_squeezenet():
    assert LAYOUTS["paper"].ciphertexts(725_061) == 178
    assert LAYOUTS["packed"].ciphertexts(725_061) == 60
    assert LAYOUTS["wide"].ciphertexts(725_061) == 89


@settings(deadline=None)
@given(
    st.sampled_from(ENCRYPTED),
    st.integers(1, 5).flatmap(lambda k: st.lists(st.lists(st.integers(-1, 1), min_size=k, max_size=k), min_size=1)),
    st.integers(0, 2**32),
)
def test_packed_sums_are_sums(name, parts, seed):
    """Whatever the signs, slots add up to the slots of the sum, edges included."""
    layout, parts = LAYOUTS[name], np.array(parts, np.int64).T
    limit = limit_of(layout, len(parts))
    values = parts * np.random.default_rng(seed).integers(max(0, limit - 2), limit + 1, parts.shape)
    slots = sum(layout.pack(own) for own in values)
    d = values.shape[1]
    assert slots.shape == (layout.slots(d),) and np.abs(slots).max() <= layout.plain_modulus // 2
    assert np.array_equal(layout.unpack(slots, d), values.sum(0))


@pytest.mark.parametrize("name", ENCRYPTED)
@pytest.mark.parametrize("sign", [-1, 1])
def test_every_value_at_the_edge(name, sign):
    layout = LAYOUTS[name]
    values = np.full(7, sign * layout.total_range)
    assert np.array_equal(layout.unpack(layout.pack(values), 7), values)


def test_one_more_than_the_range_would_wrap():
    """The reason for the check: a field beyond its range changes its neighbour as well."""
    layout = LAYOUTS["packed"]
    wrong = layout.unpack(layout.pack(np.array([layout.total_range + 1, 0, 0])), 3)
    assert wrong.tolist() == [-(2**15), 1, 0]


@settings(deadline=None)
@given(
    st.sampled_from([*LAYOUTS]),
    st.integers(1, 20),
    st.floats(0.01, 20.0),
    st.lists(st.floats(-1, 1), min_size=1, max_size=40),
)
def test_only_one_rounding_is_lost(name, hospitals, bound, x):
    """Each value is within half a unit of itself, exactly as a fraction; K totals within K/2 units."""
    if name == "paper":
        bound = min(bound, 20 / hospitals)
    codec = Codec(name, hospitals=hospitals, bound=bound)
    x = np.array(x) * bound
    units = codec.encode(x)
    assert units.dtype == np.int64 and np.abs(units).max() <= codec.limit
    for value, unit in zip(x, units, strict=True):
        # and the product's own rounding in float64
        assert abs(Fraction(value) * Fraction(codec.scale) - int(unit)) <= Fraction(1, 2) + Fraction(1, 2**20)
    total = hospitals * units
    assert np.abs(codec.decode(total) - hospitals * x).max() <= hospitals * (0.5 + 1e-6) / codec.scale
    assert np.abs(total).max() <= codec.layout.total_range


def test_rounds_once_where_the_reference_rounds_and_truncates():
    """``int(round(x, 3) * 1000)`` is off by one for some thousandths; ours for none."""
    codec = Codec("paper", hospitals=1, bound=20.0)
    x = np.arange(-20_000, 20_001) / 1000
    assert np.array_equal(codec.encode(x), np.arange(-20_000, 20_001))
    theirs = np.array([int(round(value, 3) * 1000) for value in x.tolist()])
    assert 100 < np.count_nonzero(theirs != np.arange(-20_000, 20_001)) < 2000


def test_half_goes_to_even_and_float32_is_exact():
    codec = Codec("packed", hospitals=1, bound=2.0**15 - 1)
    assert codec.scale == 1
    assert codec.encode(np.array([0.5, 1.5, 2.5, -0.5, -1.5])).tolist() == [0, 2, 2, 0, -2]
    third = np.float32(1 / 3)
    fine = Codec("ring32", hospitals=1, bound=(2**31 - 1) / 2**27)
    assert fine.scale == 2**27 and codec.decode(fine.encode(np.array([third]))) == third * 2**27


def test_default_scale_uses_the_whole_range():
    codec = Codec("packed", hospitals=10, bound=0.5)
    assert codec.limit == 3276 and codec.encode(np.array([0.5, -0.5])).tolist() == [3276, -3276]
    assert Codec("paper", hospitals=10, bound=2.0).scale == 1000


@pytest.mark.parametrize("value", [0.51, -0.51, np.nan, np.inf, -np.inf])
def test_a_value_out_of_range_is_named_before_anything_is_encrypted(value):
    codec = Codec("packed", hospitals=10, bound=0.5)
    x = np.zeros(7)
    x[5] = value
    with pytest.raises(RangeError, match=r"^value 5 .*3276.*clip lower"):
        codec.encode(x)


def test_integers_over_the_limit_are_refused():
    check_limit(np.array([3276, -3276]), 3276)
    for value in (3277, -3277):
        with pytest.raises(RangeError, match=rf"value 1 is {value} units.*at most 3276"):
            check_limit(np.array([0, value]), 3276)


def test_bad_input(refuses):
    with refuses("layout is 'dense'", "paper, packed, wide, ring32"):
        Codec("dense", hospitals=2, bound=1.0)
    for bound in (0.0, -1.0, math.nan, math.inf):
        with refuses(f"bound is {bound}"):
            Codec("packed", hospitals=2, bound=bound)
    with refuses("hospitals is 0"):
        Codec("packed", hospitals=0, bound=1.0)
    with refuses("40000 hospitals", "32767"):
        Codec("packed", hospitals=40_000, bound=1.0)
    with refuses("a value of 3.0 is 3000 units", "2048"):
        Codec("paper", hospitals=10, bound=3.0)
    with refuses("shape (2, 2)"):
        Codec("packed", hospitals=2, bound=1.0).encode(np.zeros((2, 2)))
    assert issubclass(RangeError, InputError) and issubclass(RangeError, ValueError)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(ENCRYPTED), st.integers(1, 12), st.integers(1, 4000))
def test_sums_near_the_edge_are_exact(name, hospitals, d):
    layout = LAYOUTS[name]
    values = near_the_edge(layout, hospitals, d, seed=d)
    slots = sum(layout.pack(own) for own in values)
    assert np.array_equal(layout.unpack(slots, d), values.sum(0))
