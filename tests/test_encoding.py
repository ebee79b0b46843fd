"""Base-b expansion, the ring and batching: the paper's examples, exact slow twins, SEAL's encoder, refusals."""

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st

from dopamine_lib.encryption.encoding import Batching, digits, evaluate, expand, polynomial_text
from dopamine_lib.encryption.ring import Ring, bit_reversal, centred, is_prime, ntt_primes, root_of_minus_one

WHOLE = st.integers(-(10**30), 10**30)
BASES = st.integers(2, 1000)
RINGS = [(2, (5, 13)), (8, (17, 97, 113)), (64, ntt_primes(64, 30, 2)), (4096, ntt_primes(4096, 31))]
BATCHINGS = [(2, 5), (8, 97), (1024, 12289), (4096, 40961)]
rings = pytest.mark.parametrize("n, primes", RINGS, ids=lambda value: str(value)[:12])


def product(a, b, wrap=None) -> list[int]:
    """Schoolbook multiplication in Python's integers; with ``wrap`` modulo x^wrap + 1."""
    result = [0] * (wrap or max(len(a) + len(b) - 1, 1))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            k = i + j
            result[k % wrap if wrap else k] += (-1 if wrap and k >= wrap else 1) * int(x) * int(y)
    return result


def test_the_papers_examples():
    assert expand(26, 2).tolist() == [0, 1, 0, 1, 1] and polynomial_text(expand(26, 2)) == "x^4 + x^3 + x"
    assert expand(26, 3).tolist() == [-1, 0, 0, 1] and polynomial_text(expand(26, 3)) == "x^3 - 1"
    assert evaluate(expand(26, 2), 2) == evaluate(expand(26, 3), 3) == 26


def test_digits_as_corrected():
    """Section 2.3's [-b/2, (b-1)/2] for even b ends between two integers; there are exactly b digits."""
    assert list(digits(4)) == [-2, -1, 0, 1] and list(digits(5)) == [-2, -1, 0, 1, 2]
    assert list(digits(2)) == [0, 1] and list(digits(3)) == [-1, 0, 1]


@settings(deadline=None)
@given(WHOLE, BASES)
def test_evaluation_undoes_expansion(u, b):
    found = expand(u, b)
    assert evaluate(found, b) == u
    allowed = digits(b) if b > 2 or u >= 0 else range(-1, 1)
    assert all(digit in allowed for digit in found.tolist())
    assert not len(found) or found[-1], "no leading zeros"


@settings(deadline=None)
@given(WHOLE, WHOLE, BASES)
def test_polynomials_compute_as_their_numbers_do(u, v, b):
    """The digits leave the balanced range on the way, which does not disturb decoding."""
    one, other = expand(u, b, 128), expand(v, b, 128)
    assert evaluate(one + other, b) == u + v
    assert evaluate(np.array(product(one, other), dtype=object), b) == u * v


@pytest.mark.parametrize(
    "polynomial, text",
    [
        ([], "0"),
        ([0, 0], "0"),
        ([-1], "-1"),
        ([0, -1], "-x"),
        ([5, -3, 0, 2], "2x^3 - 3x + 5"),
        ([-2, 0, -1], "-x^2 - 2"),
    ],
)
def test_text_of_a_polynomial(polynomial, text):
    assert polynomial_text(polynomial) == text


@settings(deadline=None)
@given(st.integers(-(10**40), 10**40), st.integers(1, 10**20))
def test_centred_is_the_nearest_representative(x, modulus):
    found = centred(x, modulus)
    assert (found - x) % modulus == 0 and -modulus < 2 * found <= modulus


def test_primes_and_roots():
    assert [p for p in range(60) if is_prime(p)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59]
    assert ntt_primes(4096, 16) == (40961,), "the paper's t: the only one of 16 bits"
    assert ntt_primes(8, 7, 2) == (113, 97) and bit_reversal(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    for n, p in ((8, 17), (1024, 12289), (4096, 40961)):
        psi = root_of_minus_one(n, p)
        assert pow(psi, n, p) == p - 1 and all(pow(smaller, n, p) != p - 1 for smaller in range(2, psi))


@rings
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_ring_multiplies_as_the_exact_twin(n, primes, data):
    ring, size = Ring(n, primes), 10**60
    sparse = st.dictionaries(st.integers(0, n - 1), st.integers(-size, size), max_size=12)
    one, other = (np.zeros(n, dtype=object) for _ in range(2))
    for polynomial in (one, other):
        for place, coefficient in data.draw(sparse).items():
            polynomial[place] = coefficient
    exact = np.zeros(n, dtype=object)
    for i in np.flatnonzero(one):
        rotated = np.roll(other, i)
        rotated[:i] = -rotated[:i]
        exact += one[i] * rotated
    found = ring.multiply(ring.reduce(one), ring.reduce(other))
    assert np.array_equal(ring.lift(found), centred(exact, ring.q))
    assert np.array_equal(ring.lift(ring.add(found, ring.negate(found))), np.zeros(n))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(10**40), 10**40), min_size=8, max_size=8), st.integers(-(10**50), 10**50))
def test_residues_are_the_polynomial(coefficients, factor):
    ring, polynomial = Ring(8, (17, 97, 113)), np.array(coefficients, dtype=object)
    assert np.array_equal(ring.lift(ring.reduce(polynomial)), centred(polynomial, ring.q))
    assert np.array_equal(ring.lift(ring.scale(ring.reduce(polynomial), factor)), centred(polynomial * factor, ring.q))


@rings
def test_transform_is_evaluation_at_the_roots(n, primes):
    ring, rng = Ring(n, primes), np.random.default_rng(1)
    a = np.stack([rng.integers(0, p, (3, n)) for p in primes], axis=1)  # three polynomials at once
    values = ring.transform(a)
    assert np.array_equal(ring.inverse(values), a)
    for row, p in enumerate(primes):
        psi = root_of_minus_one(n, p)
        for j in {0, 1, n // 2, n - 1}:
            x = pow(psi, 2 * int(bit_reversal(n)[j]) + 1, p)
            assert values[2, row, j] == evaluate(a[2, row], x) % p


@pytest.mark.parametrize("n, t", BATCHINGS)
def test_slots_compute_as_polynomials_do(n, t):
    rng, batching, ring, half = np.random.default_rng(2), Batching(n, t), Ring(n, (t,)), (t - 1) // 2
    x, y = rng.integers(-half, half + 1, (2, n))
    a, b = batching.encode(x), batching.encode(y)
    assert np.array_equal(batching.decode(a), x)
    assert np.array_equal(batching.decode(a + b), centred(x + y, t))
    times = ring.lift(ring.multiply(ring.reduce(a), ring.reduce(b)))
    assert np.array_equal(batching.decode(times), centred(x * y, t))
    assert np.array_equal(batching.decode(batching.encode(x[: n // 2])), np.append(x[: n // 2], np.zeros(n - n // 2)))
    assert np.array_equal(batching.encode(np.stack([x, y])), np.stack([a, b]))


def test_batching_is_lagranges_interpolation():
    """In the paper's words: the sum over slots of the value times the polynomial that is 1 there and 0 elsewhere."""
    n, t = 8, 97
    psi, values = root_of_minus_one(n, t), [5, -3, 0, 48, -48, 1, 2, 7]
    powers = [pow(3, i, 2 * n) for i in range(n // 2)]
    roots = [pow(psi, e, t) for e in powers + [2 * n - e for e in powers]]
    total = np.zeros(n, dtype=object)
    for root, value in zip(roots, values, strict=True):
        basis, scale = [1], 1
        for other in set(roots) - {root}:
            basis, scale = product(basis, [-other, 1]), scale * (root - other) % t
        total += value * pow(scale, -1, t) * np.array(basis, dtype=object)
    assert np.array_equal(Batching(n, t).encode(np.array(values)), centred(total, t))


@pytest.mark.parametrize("n, t", [(1024, 12289), (4096, 40961)])
def test_batching_is_seals(n, t):
    """The same plaintext polynomial, coefficient for coefficient, as from the library used in training."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(n)
    parameters.set_plain_modulus(t)
    parameters.set_coeff_modulus(seal.CoeffModulus.BFVDefault(n, seal.SEC_LEVEL_TYPE.TC128))
    encoder, plaintext = (
        seal.BatchEncoder(seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)),
        seal.Plaintext(),
    )
    values = np.random.default_rng(3).integers(-(t // 2), t // 2 + 1, n)
    encoder.encode(values.tolist(), plaintext)
    assert [plaintext[i] for i in range(n)] == (Batching(n, t).encode(values) % t).tolist()


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: expand(2.5, 3), ("2.5", "scale and round")),
        (lambda: expand(1, 1), ("base is 1",)),
        (lambda: digits(2.0), ("base is 2.0",)),
        (lambda: expand(26, 3, n=3), ("26 has 4 digits in base 3", "raise n or b")),
        (lambda: Batching(4096, 40960), ("t is 40960", "prime", "8192")),
        (lambda: Batching(4096, 12289), ("t is 12289", "8192")),
        (lambda: Batching(100, 40961), ("n is 100", "power of two")),
        (lambda: Batching(4096, 40961).encode(np.array([0, 20481])), ("slot 1 is 20481", "[-20480, 20480]", "raise t")),
        (lambda: Batching(4096, 40961).encode(np.array([[0, 1], [-20481, 0]])), ("slot 0 is -20481",)),
        (lambda: Batching(8, 97).encode(np.array([2**63], dtype=np.uint64)), ("slot 0 is 9223372036854775808",)),
        (lambda: Batching(8, 97).encode(np.array([0.5])), ("float64", "scale and round")),
        (lambda: Batching(8, 97).encode(3), ("array of integers",)),
        (lambda: Batching(8, 97).encode(np.zeros(9, dtype=int)), ("9 values for 8 slots",)),
        (lambda: Ring(8, ()), ("moduli ()",)),
        (lambda: Ring(8, (17, 17)), ("(17, 17)", "different")),
        (lambda: Ring(8, (17, 19)), ("modulus 19", "modulo 16")),
        (lambda: Ring(8, (33,)), ("modulus 33", "prime")),
        (lambda: Ring(8, (2**31 + 2**4 + 1,)), ("below 2^31",)),
        (lambda: Ring(2**16, (17,)), ("n is 65536", "32768")),
        (lambda: ntt_primes(4096, 16, 2), ("1 primes of 16 bits", "more bits")),
    ],
)
def test_bad_input_is_refused(refuses, call, said):
    with refuses(*said):
        call()
