"""From a model file to what the provider serves: plan, integer weights and the names of the grades."""

import torch

from dopamine_lib.data import MAX_SIZE, MIN_SIZE
from dopamine_lib.errors import InputError
from dopamine_lib.inference.network.calibration import calibration_images
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.models.checkpoints import load_model
from dopamine_lib.models.networks import to_input


def load(weights, backbone=None, size: int | None = None):
    """Plan, integer weights and grades of a model that ``reproduce`` wrote, for images of ``size`` pixels.

    backbone  for a ``head``: file of the SqueezeNet it stands on; the embedded one by default
    size      the model's own by default
    Raises InputError for a file that is no such model and for a size out of bounds.
    """
    torch.set_num_threads(1)
    net, metadata = load_model(weights, backbone)
    try:
        preprocessing = metadata["preprocessing"]
        own_size, mean, std = (preprocessing[key] for key in ("size", "mean", "std"))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{weights} does not say how its images are prepared; give a model written by reproduce"
        ) from error
    size = own_size if size is None else size
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"size {size} is out of bounds; choose {MIN_SIZE} to {MAX_SIZE} pixels")
    images = to_input(calibration_images(size), mean, std)
    plan, integers = compile_model(net, size, images, tuple(mean), tuple(std))
    return plan, integers, metadata["grades"]
