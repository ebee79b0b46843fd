"""Chapter 4's explorer: its step is Algorithm 1's, and it answers at once."""

import itertools
import math

import numpy as np
import pytest

from dopamine_lib.federation import explorer
from dopamine_lib.federation.explorer import PATIENTS, step_of


def test_gradients_are_cut_to_the_circle_and_keep_their_direction():
    seen = step_of(0.7)
    norms, cut = (np.linalg.norm(seen[key], axis=1) for key in ("gradients", "clipped"))
    assert np.allclose(cut, np.minimum(norms, 0.7)) and 0 < seen["clipped_share"] < 1
    assert np.allclose((seen["gradients"] * seen["clipped"]).sum(1), norms * cut)


def test_without_clipping_and_sampling_the_step_is_the_mean_gradient():
    seen = step_of(8.0, 0.0, 1.0)
    assert np.allclose(seen["average"], seen["true"]) and np.allclose(seen["noisy"], seen["true"])
    assert seen["clipped_share"] == 0 and np.array_equal(seen["expected"], seen["true"])
    biased = step_of(0.2, 0.0, 1.0)
    assert np.linalg.norm(biased["average"] - biased["true"]) > 0.3, "a short clip turns and shortens it"


@pytest.mark.parametrize("hospitals", [1, 3, 12])
def test_the_shares_make_up_sigma_c_however_many_hospitals_there_are(hospitals):
    """600 numbers per case: the true deviation leaves the band with probability 1e-6; a wrong share is far out."""
    c, sigma, rate = 1.5, 2.0, 0.25
    seen = step_of(c, sigma, rate, hospitals)
    assert seen["noise_std"] == pytest.approx(sigma * c / (rate * PATIENTS))
    spread = np.std(seen["noisy"] - seen["average"]) / seen["noise_std"]
    band = 4.9 / math.sqrt(2 * 600)
    assert abs(spread - 1) < band < abs(12**0.25 - 1), "the line's own variance, sigma^2 C^2 / sqrt(K), would show"


def test_the_explorer_answers_at_once(reacts):
    settings = list(itertools.product((0.1, 1.0, 8.0), (0.0, 1.15, 10.0)))
    assert len(set(reacts(explorer.draw_step, settings))) == 9


@pytest.mark.parametrize(
    "values, said",
    [
        ({"max_grad_norm": 0.0}, "clipping norm is 0"),
        ({"noise_multiplier": -1.0}, "noise multiplier is -1"),
        ({"sample_rate": 1.5}, "sample rate is 1.5"),
        ({"hospitals": 13}, "hospitals is 13"),
    ],
)
def test_bad_input_is_refused(refuses, values, said):
    with refuses(said):
        step_of(**values)
