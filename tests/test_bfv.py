"""The textbook BFV: Eqs. 4 to 6 as printed, exact twins, noise as predicted, refusals.

The statistical tests draw from fixed seeds; one seed in a million would fail them by chance.
"""

import functools
import itertools
import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dopamine_lib.encryption import sampling
from dopamine_lib.encryption.bfv import (
    Bfv,
    Parameters,
    paper_parameters,
    predicted_budget,
    predicted_product_budget,
)
from dopamine_lib.encryption.encoding import Batching, evaluate, expand
from dopamine_lib.encryption.ring import centred, ntt_primes

FALSE_ALARMS = 1e-6
TOY = Parameters(16, 97, ntt_primes(16, 28, 3))
SMALL = Parameters(256, 7681, ntt_primes(256, 30, 3))


@functools.cache
def setup(parameters):
    """A scheme with a seed and its two keys."""
    scheme = Bfv(parameters, seed=7)
    secret = scheme.secret_key()
    return scheme, secret, scheme.public_key(secret)


@pytest.fixture(scope="module")
def real():
    """The paper's parameters, randomness from the operating system, and twenty ciphertexts of random slots."""
    parameters = paper_parameters()
    scheme, batching = Bfv(parameters), Batching(parameters.n, parameters.t)
    secret = scheme.secret_key()
    public = scheme.public_key(secret)
    slots = np.random.default_rng(4).integers(-20480, 20481, (20, parameters.n))
    return scheme, secret, public, batching, slots, scheme.encrypt(public, batching.encode(slots))


def ring_product(a, b):
    """Exact product modulo x^n + 1 over the integers."""
    n, a, b = len(a), np.asarray(a, dtype=object), np.asarray(b, dtype=object)
    total = np.zeros(n, dtype=object)
    for i in range(n):
        total += a[i] * np.concatenate([-b[n - i :], b[: n - i]])
    return total


def test_the_papers_parameters():
    parameters = paper_parameters()
    assert (parameters.n, parameters.t, len(parameters.primes)) == (4096, 40961, 4)
    assert all(27 <= p.bit_length() <= 28 and p % 8192 == 1 for p in parameters.primes)
    assert parameters.q.bit_length() == 109 and parameters.security == 128
    assert parameters.delta * 40961 <= parameters.q < (parameters.delta + 1) * 40961


def test_security_is_the_standards_table():
    def security(n, bits, count):
        return Parameters(n, 17, ntt_primes(n, bits, count)).security

    assert security(4096, 28, 4) == 0, "112 bits are more than 109"
    assert [security(4096, bits, 2) for bits in (29, 28)] == [256, 256]
    assert security(4096, 25, 3) == 192 and security(2048, 27, 2) == 128 and security(1024, 28, 1) == 0
    assert TOY.security == SMALL.security == 0


def test_keys_are_equation_4():
    scheme, secret, (p0, p1) = setup(SMALL)
    ring = scheme.ring
    s = ring.lift(secret.s)
    assert set(s) == {-1, 0, 1}
    minus_e = ring.lift(ring.add(p0, ring.multiply(p1, secret.s)))
    assert np.abs(minus_e).max() <= sampling.ERROR_BITS and minus_e.any()
    assert ring.lift(p1).astype(float).std() == pytest.approx(SMALL.q / 12**0.5, rel=0.2), "a is uniform"


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_decryption_and_every_operation_against_the_exact_twin(data):
    parameters = data.draw(
        st.sampled_from([TOY, Parameters(8, 2, ntt_primes(8, 30, 2)), Parameters(16, 1000, TOY.primes)])
    )
    scheme, secret, public = setup(parameters)
    t, n = parameters.t, parameters.n
    message = st.lists(st.integers(-(t // 2), t // 2), min_size=n, max_size=n).map(np.array)
    a, b = data.draw(message), data.draw(message)
    one, other = scheme.encrypt(public, a), scheme.encrypt(public, b)
    for ciphertext, exact in (
        (one, a),
        (scheme.add(one, other), a + b),
        (scheme.multiply_plain(one, b), ring_product(a, b)),
        (scheme.multiply(one, other), ring_product(a, b)),
        (scheme.add(scheme.multiply(one, other), one), ring_product(a, b) + a),
    ):
        assert np.array_equal(scheme.decrypt(secret, ciphertext), centred(exact, t).astype(np.int64))
        assert scheme.noise_budget(secret, ciphertext) > 5


def test_whole_numbers_in_base_3_compute_under_encryption():
    scheme, secret, public = setup(SMALL)
    u, v = (scheme.encrypt(public, expand(number, 3, 256)) for number in (26, -1234))
    assert evaluate(scheme.decrypt(secret, scheme.add(u, v)), 3) == 26 - 1234
    assert evaluate(scheme.decrypt(secret, scheme.multiply(u, v)), 3) == 26 * -1234


def test_decryption_is_equation_6():
    """Eq. 6 with fractions instead of the shifted division."""
    from fractions import Fraction

    scheme, secret, public = setup(TOY)
    for ciphertext in (scheme.encrypt(public, np.arange(16) - 8), tuple(np.stack(public))):
        exact = [round(Fraction(TOY.t * int(x), TOY.q)) for x in scheme.phase(secret, ciphertext)]
        assert scheme.decrypt(secret, ciphertext).tolist() == [centred(m, TOY.t) for m in exact]


def test_noise_is_what_encryption_added():
    """t (e1 + e2 s - e u) - r m, from the same draws under the same seed."""
    scheme, source = Bfv(SMALL, seed=11), sampling.Source(11)
    secret = scheme.secret_key()
    public = scheme.public_key(secret)
    m = np.arange(256) - 128
    n, t = SMALL.n, SMALL.t
    s = source.ternary((n,))
    for p in SMALL.primes:
        source.uniform(p, (n,))
    e, u, e1, e2 = source.error((n,)), source.ternary((n,)), source.error((n,)), source.error((n,))
    expected = t * (e1 + ring_product(e2, s) - ring_product(e, u)) - SMALL.q % t * m
    found = scheme.noise(secret, scheme.encrypt(public, m))
    assert np.array_equal(found, expected)
    largest = int(np.abs(expected).max())
    budget = scheme.noise_budget(secret, Bfv.encrypt(setup_again(11), public, m))
    assert 2 ** (budget + 1) == pytest.approx(SMALL.q / largest, rel=1e-9)


def setup_again(seed):
    """A scheme whose next draws are those of the first encryption under ``seed``."""
    scheme = Bfv(SMALL, seed)
    scheme.public_key(scheme.secret_key())
    return scheme


def test_randomness_is_fresh_unless_seeded():
    def draw(seed):
        scheme = Bfv(TOY, seed)
        secret = scheme.secret_key()
        public = scheme.public_key(secret)
        m = np.zeros(16, dtype=int)
        return [secret.s, public[1], *(scheme.encrypt(public, m)[1] for _ in range(2))]

    for one, again in zip(draw(5), draw(5), strict=True):
        assert np.array_equal(one, again)
    for seed in (None, 5):
        drawn = draw(seed) + draw(None)
        assert not any(np.array_equal(a, b) for a, b in itertools.combinations(drawn, 2))


def binomial_differences():
    """The exact probabilities of the errors -21 … 21."""
    coins = stats.binom.pmf(np.arange(22), 21, 0.5)
    return np.convolve(coins, coins[::-1])


def chi_square(values, probabilities, low=0):
    counts = np.bincount(np.asarray(values) - low, minlength=len(probabilities))
    rare = probabilities * len(values) < 5  # pooled, as the test's approximation requires
    pool = [*counts[~rare], counts[rare].sum()] if rare.any() else counts
    expected = [*probabilities[~rare], probabilities[rare].sum()] if rare.any() else probabilities
    return stats.chisquare(pool, np.array(expected) * len(values)).pvalue


def test_distributions():
    source, many = sampling.Source(1), (200_000,)
    assert chi_square(source.error(many), binomial_differences(), -21) > FALSE_ALARMS
    assert chi_square(source.ternary(many), np.full(3, 1 / 3), -1) > FALSE_ALARMS
    for modulus in (2, 17, 97):
        assert chi_square(source.uniform(modulus, many), np.full(modulus, 1 / modulus)) > FALSE_ALARMS
    assert sampling.ERROR_STD**2 == pytest.approx(binomial_differences() @ np.arange(-21, 22) ** 2)
    assert sampling.ERROR_STD >= 8 / (2 * np.pi) ** 0.5, "no smaller than the standard's errors"


def test_wrong_distributions_are_noticed(monkeypatch):
    source, many = sampling.Source(1), (200_000,)
    for bits in (20, 22):
        monkeypatch.setattr(sampling, "ERROR_BITS", bits)
        assert chi_square(np.clip(source.error(many), -21, 21), binomial_differences(), -21) < FALSE_ALARMS
    biased = np.frombuffer(source.bytes(200_000), dtype=np.uint8) % 97  # a remainder instead of rejection
    assert chi_square(biased, np.full(97, 1 / 97)) < FALSE_ALARMS


def test_budget_as_predicted(real):
    """At the paper's size, fresh and summed: close to typical, never below guaranteed, and falling."""
    scheme, secret, _, batching, slots, ciphertexts = real
    measured = {}
    for count in (1, 2, 5, 10, 20):
        total = scheme.total(tuple(c[:count] for c in ciphertexts))
        measured[count] = scheme.noise_budget(secret, total)
        typical, guaranteed = predicted_budget(scheme.parameters, count)
        assert abs(measured[count] - typical) < 0.75 and measured[count] > guaranteed
        right = centred(slots[:count].sum(axis=0), 40961)
        assert np.array_equal(batching.decode(scheme.decrypt(secret, total)), right)
    assert list(measured.values()) == sorted(measured.values(), reverse=True)


@pytest.mark.parametrize("q, remainder", [(2041056769, 1), (2145687553, 203)])
def test_budget_as_predicted_where_errors_count(q, remainder):
    """A message adds no noise if q is 1 modulo t, and as much as the errors do if the remainder is about 200."""
    scheme, secret, public = setup(Parameters(256, 7681, (q,)))
    assert scheme.parameters.q % 7681 == remainder
    messages = np.random.default_rng(5).integers(-3840, 3841, (64, 256))
    fresh = scheme.encrypt(public, messages)
    for count in (1, 4, 16, 64):
        measured = scheme.noise_budget(secret, scheme.total(tuple(c[:count] for c in fresh)))
        typical, guaranteed = predicted_budget(scheme.parameters, count)
        assert abs(measured - typical) < 0.6 and measured > guaranteed


def test_a_product_is_scaled_and_rounded():
    """Component by component: t / q times the product over the integers, to the nearest integer."""
    from fractions import Fraction

    scheme, _, public = setup(TOY)
    one, other = (scheme.encrypt(public, np.arange(16) - shift) for shift in (3, 9))
    (a0, a1), (b0, b1) = ([scheme.ring.lift(c) for c in ciphertext] for ciphertext in (one, other))
    middle = ring_product(a0, b1) + ring_product(a1, b0)
    for found, exact in zip(
        scheme.multiply(one, other), (ring_product(a0, b0), middle, ring_product(a1, b1)), strict=True
    ):
        nearest = np.array([round(Fraction(TOY.t * int(x), TOY.q)) for x in exact], dtype=object)
        assert np.array_equal(scheme.ring.lift(found), centred(nearest, TOY.q))


def test_the_budget_of_a_product_is_as_predicted(real):
    scheme, secret, _, batching, slots, ciphertexts = real
    one, other = (tuple(c[i] for c in ciphertexts) for i in range(2))
    product = scheme.multiply(one, other)
    assert len(product) == 3
    assert np.array_equal(batching.decode(scheme.decrypt(secret, product)), centred(slots[0] * slots[1], 40961))
    assert abs(scheme.noise_budget(secret, product) - predicted_product_budget(scheme.parameters)) < 0.75
    weights = np.arange(4096) - 2000
    weighted = scheme.multiply_plain(one, batching.encode(weights))
    assert np.array_equal(batching.decode(scheme.decrypt(secret, weighted)), centred(slots[0] * weights, 40961))


def test_a_wrong_key_opens_something_else(real):
    """Without an error: the textbook, like SEAL, cannot tell."""
    scheme, _, _, batching, slots, ciphertexts = real
    opened = batching.decode(scheme.decrypt(scheme.secret_key(), tuple(c[0] for c in ciphertexts)))
    assert np.mean(opened == slots[0]) < 0.01


def test_encryption_is_fast_enough_at_the_papers_size(real):
    scheme, secret, public, batching, slots, _ = real
    took = []
    for _ in range(5):
        start = time.process_time()
        ciphertext = scheme.encrypt(public, batching.encode(slots[0]))
        took.append(time.process_time() - start)
    assert statistics.median(took) < 0.5
    assert np.array_equal(batching.decode(scheme.decrypt(secret, ciphertext)), slots[0])


def test_no_secret_is_printed():
    scheme, secret, _ = setup(TOY)
    for text in (repr(secret), str(secret), repr(scheme), repr(scheme.parameters)):
        assert "array" not in text and "[" not in text


def with_zeros(value):
    message = np.zeros(16, dtype=int)
    message[3] = value
    return message


def encrypt(m):
    scheme, _, public = setup(TOY)
    return scheme.encrypt(public, m)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Parameters(16, 1, TOY.primes), ("t is 1", "[2, ")),
        (lambda: Parameters(16, 2**90, TOY.primes), ("t is 1237940039285380274899124224", "half of q")),
        (lambda: Parameters(16, 97.0, TOY.primes), ("t is 97.0", "whole")),
        (lambda: Parameters(17, 97, TOY.primes), ("n is 17", "power of two")),
        (lambda: Parameters(16, 97, (19,)), ("modulus 19",)),
        (lambda: encrypt(with_zeros(49)), ("coefficient 3 is 49", "[-48, 48]")),
        (lambda: encrypt(np.zeros(16)), ("float64", "scale and round")),
        (lambda: encrypt(np.zeros(15, dtype=int)), ("15 coefficients", "n = 16")),
        (
            lambda: setup(SMALL)[0].decrypt(setup(SMALL)[1], encrypt(with_zeros(1))),
            ("(3, 256)", "check its parameters"),
        ),
        (lambda: setup(TOY)[0].total(encrypt(with_zeros(1))), ("with add",)),
        (lambda: predicted_budget(TOY, 0), ("number of ciphertexts is 0",)),
        (lambda: setup(TOY)[0].add(encrypt(with_zeros(1)), encrypt(with_zeros(1))[:1]), ("2 to 16",)),
    ],
)
def test_bad_input_is_refused(refuses, call, said):
    with refuses(*said):
        call()
