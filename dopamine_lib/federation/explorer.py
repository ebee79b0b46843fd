"""The plain functions behind chapter 4's explorer: one step of Algorithm 1 for a model of two weights, as a picture.

The patients' gradients are made up, so that they are points in a plane; clipping and noise are the library's.
"""

import functools
import math

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.errors import check_within
from dopamine_lib.pictures import BLUE, GREEN, GREY, RED

PATIENTS, DRAWS = 120, 300
#: What the sliders offer.
CLIPS, NOISES, RATES, HOSPITALS = (0.05, 8.0), (0.0, 20.0), (0.02, 1.0), (1, 12)


@functools.lru_cache(maxsize=1)
def gradients_in_a_plane() -> np.ndarray:
    """Gradients (PATIENTS, 2), made up: most are alike and of norm about 1, some are long and in another direction."""
    rng = np.random.default_rng(4)  # made-up data and pictures: nothing here hides anything
    usual = rng.normal((0.8, 0.5), 0.6, (PATIENTS * 9 // 10, 2))
    rare = rng.normal((-1.0, 3.5), 0.8, (PATIENTS - len(usual), 2))
    return np.concatenate([usual, rare])


def step_of(
    max_grad_norm: float = 1.5, noise_multiplier: float = 1.15, sample_rate: float = 0.3, hospitals: int = 3
) -> dict:
    """Lines 8 to 13 and the average of line 21, in two dimensions.

    Returns gradients and clipped (B, 2) of the sampled patients; true (2,), the mean gradient of all patients; expected
    (2,), what the step is on average; average (2,), the step of this sample without noise; noisy (DRAWS, 2), with it;
    clipped_share of all patients; noise_std of the average, sigma C / (q N). Raises InputError outside the sliders'
    bounds.
    """
    check_within("clipping norm", max_grad_norm, *CLIPS, "the gradients are about 1 long", low_open=False)
    check_within("noise multiplier", noise_multiplier, *NOISES, "the paper's is 1.15", low_open=False)
    check_within("sample rate", sample_rate, *RATES, "it is a probability", low_open=False)
    check_within("hospitals", hospitals, *HOSPITALS, "each has some of 120 patients", low_open=False)
    from dopamine_lib.privacy.dpsgd import noise_share  # torch takes a second to load

    gradients, rng = gradients_in_a_plane(), np.random.default_rng(7)
    factors = 1 / np.maximum(1, np.linalg.norm(gradients, axis=1) / max_grad_norm)  # line 11
    clipped = gradients * factors[:, None]
    present = rng.random(PATIENTS) < sample_rate  # line 8
    batch = sample_rate * PATIENTS  # the public expected batch
    share = noise_share(noise_multiplier, max_grad_norm, hospitals)  # line 13
    noise = rng.normal(0, 1, (HOSPITALS[1], DRAWS, 2))[:hospitals] * share
    average = clipped[present].sum(0) / batch
    return {
        "gradients": gradients[present],
        "clipped": clipped[present],
        "true": gradients.mean(0),
        "expected": clipped.mean(0),
        "average": average,
        "noisy": average + noise.sum(0) / batch,
        "clipped_share": float(np.mean(factors < 1)),
        "noise_std": share * math.sqrt(hospitals) / batch,
    }


def draw_step(
    max_grad_norm: float = 1.5, noise_multiplier: float = 1.15, sample_rate: float = 0.3, hospitals: int = 3
) -> Figure:
    """The sampled gradients and the circle they are cut to (left); where the averaged step lands (right)."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    seen = step_of(max_grad_norm, noise_multiplier, sample_rate, hospitals)
    figure = Figure(figsize=(7.6, 3.6))
    left, right = figure.add_axes((0.06, 0.1, 0.41, 0.74)), figure.add_axes((0.56, 0.1, 0.41, 0.74))
    left.add_collection(LineCollection([((0, 0), tuple(g)) for g in seen["gradients"]], colors=GREY, linewidths=0.7))
    left.add_collection(LineCollection([((0, 0), tuple(g)) for g in seen["clipped"]], colors=BLUE, linewidths=1.2))
    left.add_patch(Circle((0, 0), max_grad_norm, fill=False, edgecolor=RED))
    left.set(xlim=(-3.5, 3.5), ylim=(-1.7, 5.3), xticks=(-2, 0, 2), yticks=(0, 2, 4))
    share = f"clipped: {seen['clipped_share']:.0%} of all"
    left.set_title(f"{len(seen['gradients'])} patients sampled\n{share}", fontsize=10)
    right.plot(*seen["noisy"].T, ".", color=GREY, markersize=2.5, label="with noise, 300 draws")
    for name, marker, colour in (("true", "*", GREEN), ("expected", "s", RED), ("average", "o", BLUE)):
        label = {"true": "mean of all patients", "expected": "mean, clipped", "average": "this sample, clipped"}[name]
        right.plot(*seen[name], marker, color=colour, markersize=8, label=label)
    right.set(xlim=(-0.1, 1.3), ylim=(-0.1, 1.3), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    right.set_title(f"the averaged step\nnoise: {seen['noise_std']:.3g} a direction", fontsize=10)
    right.legend(loc="upper left", fontsize=8)
    for axes in (left, right):
        axes.set_aspect("equal")
    return figure
