"""Chapter 3's explorer: its counts follow from the noise, and it answers at once."""

import itertools

import numpy as np
import pytest

from dopamine_lib.encryption import explorer
from dopamine_lib.encryption.ring import ntt_primes


def test_where_decryption_fails():
    """A coefficient is wrong exactly where its true noise passes q/2; a single wrong one spoils the slots."""
    failed = 0
    for q_bits, count in itertools.product((18, 20, 22, 24), (1, 3, 10, 100)):
        seen = explorer.sum_of(count, q_bits)
        assert seen["wrong_coefficients"] == np.mean(np.abs(seen["noise"]) > 0.5)
        assert (seen["wrong_slots"] > 0.9) == (seen["wrong_coefficients"] > 0)
        assert (seen["budget"] < 0.3) == (np.abs(seen["noise"]).max() > 0.4)
        failed += seen["wrong_coefficients"] > 0
    assert 0 < failed < 16


def test_every_slider_value_has_its_primes():
    (q_low, q_high), (t_low, t_high) = explorer.Q_BITS, explorer.T_BITS
    assert all(len(ntt_primes(explorer.N, bits, 20)) == 20 for bits in range(q_low, q_high + 1))
    assert all(ntt_primes(explorer.N, bits) for bits in range(t_low, t_high + 1))


def test_the_explorer_answers_at_once(reacts):
    settings = list(itertools.product((1, 10, 100), (19, 23, 27)))
    assert len(set(reacts(explorer.draw_sum, settings))) == 9


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: explorer.sum_of(101), ("number of ciphertexts is 101",)),
        (lambda: explorer.sum_of(1, 40), ("bits of q is 40",)),
        (lambda: explorer.sum_of(1, 26, 3), ("bits of t is 3",)),
    ],
)
def test_bad_input_is_refused(refuses, call, said):
    with refuses(*said):
        call()
