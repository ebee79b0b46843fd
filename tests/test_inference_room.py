"""How much of the ring's room pictures take that no scale was set on: photographs, extremes, and made ones."""

import numpy as np
import pytest
import torch

from dopamine_lib import data
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.plan import evaluate
from dopamine_lib.inference.network.serving import calibration_images, extremes, load
from dopamine_lib.models.networks import HALF, IMAGENET, backbone, build, load_weights, to_input
from dopamine_lib.page.served_model import SERVED


def room_used(plan, weights, pictures):
    return max(max(evaluate(plan, weights, plan.to_input(picture))[1].values()) for picture in pictures)


def test_pictures_unlike_any_calibrated_on_leave_room():
    start = load_weights()
    plan, weights = compile_model(backbone(start), 64, to_input(calibration_images(64), start.mean, start.std), *HALF)
    unseen = np.concatenate(
        [extremes(64, seed=9), np.random.default_rng(9).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)]
    )
    assert room_used(plan, weights, unseen) < 0.75


@pytest.mark.slow
def test_real_eyes_leave_room_with_large_activations(shared_data):
    start = load_weights(shared_data / "squeezenet1_1_features_imagenet.npz")
    calibration = to_input(calibration_images(224), start.mean, start.std)
    plan, weights = compile_model(backbone(start), 224, calibration, *IMAGENET)
    eyes = data.load("aptos", shared_data / "aptos2019", size=224).images[::60]
    assert room_used(plan, weights, eyes) < 0.75
    assert room_used(plan, weights, extremes(224, seed=9)) < 0.75


def driven(net, start, size, steps=40):
    """A picture made by gradient ascent to drive the net's largest output as far up as it goes."""
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, size, size, requires_grad=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (start.mean, start.std))
    ascent = torch.optim.Adam([pixels], lr=0.05)
    for _ in range(steps):
        ascent.zero_grad()
        (-net((pixels - mean) / std).amax()).backward()
        ascent.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    return (pixels.detach()[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def test_a_picture_made_to_leave_the_ring_does_and_only_it():
    """What the README says is not defended; noise that nobody optimised stays far below."""
    start = load_weights()
    net = build("squeezenet", 5, start, 0).eval()
    plan, weights = compile_model(net, 64, to_input(calibration_images(64), start.mean, start.std), *HALF)
    made = driven(net.features[:10], start, 64)
    assert room_used(plan, weights, [made]) > 1.5
    shuffled = np.random.default_rng(0).permutation(made.reshape(-1, 3)).reshape(made.shape)
    assert room_used(plan, weights, [shuffled]) < 0.75


@pytest.mark.slow
def test_photographs_of_other_sets_leave_room_with_the_served_model(shared_data):
    """The figures of the README: 147 of APTOS-2019 and 200 of RetinaMNIST, enlarged."""
    plan, weights, _ = load(SERVED)
    eyes = data.load("aptos", shared_data / "aptos2019", size=64).images[::20]
    small = data.load("retinamnist", shared_data, size=64)
    used = [room_used(plan, weights, pictures) for pictures in (eyes, small.images[small.test[:200]])]
    assert len(eyes) + 200 == 347 and max(used) < 0.29
