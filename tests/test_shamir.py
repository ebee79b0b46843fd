"""Shares of a secret: t reconstruct it, t - 1 reveal nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dopamine_lib.encryption import shamir


@given(st.binary(min_size=32, max_size=32), st.integers(1, 7), st.integers(0, 3), st.randoms())
def test_any_t_shares_reconstruct_the_secret(secret, t, more, random):
    shares = shamir.share(secret, range(t + more), t)
    chosen = random.sample(sorted(shares), t)
    assert shamir.reconstruct({i: shares[i] for i in chosen}, t) == secret
    assert shamir.reconstruct(shares, t) == secret


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_fewer_than_t_shares_fit_every_secret(secret, other):
    """For t - 1 shares and any other secret there is a share that completes them to it: they reveal nothing."""
    shares = shamir.share(secret, range(3), 3)
    weights = shamir._weights((0, 1, 2))
    known = sum(weights[i] * int.from_bytes(shares[i]) for i in (0, 1))
    third = (int.from_bytes(other) - known) * pow(weights[2], -1, shamir.PRIME) % shamir.PRIME
    assert shamir.reconstruct({**shares, 2: third.to_bytes(33)}, 3) == other


def test_the_first_share_of_equal_secrets_is_spread_evenly():
    """Chi-square over 16 classes, 1 false alarm in 1,000; a polynomial without random coefficients fails."""

    def p_value(share):
        firsts = [share()[0][1] >> 4 for _ in range(2000)]
        return stats.chisquare(np.bincount(firsts, minlength=16)).pvalue

    assert p_value(lambda: shamir.share(bytes(32), range(3), 2)) > 1e-3
    assert p_value(lambda: shamir.share(bytes(32), range(3), 1)) < 1e-3  # threshold 1: the secret itself


def test_the_prime_is_the_smallest_over_256_bits():
    """Fermat's test: conclusive for the smaller numbers, which fail it; with four bases for the prime."""

    def passes(n):
        return all(pow(base, n - 1, n) == 1 for base in (2, 3, 5, 7))

    assert passes(shamir.PRIME) and not any(map(passes, range(2**256 + 1, shamir.PRIME)))


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: shamir.share(b"short", range(3), 2), "5 bytes"),
        (lambda: shamir.share(bytes(32), [1, 1], 2), "different"),
        (lambda: shamir.share(bytes(32), range(3), 4), "threshold is 4"),
        (lambda: shamir.reconstruct({0: bytes(33)}, 2), "there are 1 shares"),
        (lambda: shamir.reconstruct({0: bytes(32), 1: bytes(33)}, 2), "damaged"),
        (lambda: shamir.reconstruct({0: b"\xff" * 33, 1: bytes(33)}, 2), "damaged"),
    ],
)
def test_impossible_shares_are_refused(refuses, call, said):
    with refuses(said):
        call()
