"""From a model file to what the provider serves, and the public images that set the scales of its network.

The images are synthetic eyes and pictures nothing like an eye. An overflow inside a secret image spoils its answer, so
the ranges cover likely pictures and extreme ones, and ``compiler`` leaves room beyond them. No patient's image is used.
A table's row of p numbers is a picture of p channels and one pixel; the public ones are drawn in all directions.
"""

from pathlib import Path

import numpy as np
import torch

from dopamine_lib.data import MAX_SIZE, MIN_SIZE
from dopamine_lib.data.images import resize_all
from dopamine_lib.data.synthetic import make_population
from dopamine_lib.errors import InputError
from dopamine_lib.files import parse_json
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.plan import Plan, Weights
from dopamine_lib.inference.protocols.opening import SCORES
from dopamine_lib.models.checkpoints import load_model, load_network
from dopamine_lib.models.networks import HALF, to_input
from dopamine_lib.models.tables import TABLE_MODELS
from dopamine_lib.models.weights import read_state

EYES, ROWS = 8, 512


def load(
    weights: str | Path,
    backbone: str | Path | None = None,
    size: int | None = None,
    answer: str = SCORES,
    model: str | None = None,
) -> tuple[Plan, Weights, list[str]]:
    """Plan, integer weights and grades of a model, for images of ``size`` pixels or a table's rows (``row_inputs``).

    backbone  for a ``head``: file of its SqueezeNet; the embedded one by default
    size      the model's own by default
    answer    what the patient is told: the ``SCORES``, under noise, or the ``GRADE`` alone
    model     for weights that ``reproduce`` did not write: one of torchvision's networks, or ``module:function``
    Raises InputError for a file that is no such model and for a size out of bounds.
    """
    torch.set_num_threads(1)
    if model is None:
        net, metadata = load_model(weights, backbone, tables=True)
    else:
        if backbone is not None:
            raise InputError(f"--backbone is {backbone}, but {model} is a whole network and no head: leave it out")
        net, metadata = load_network(weights, model, size)
    if metadata.get("architecture") in TABLE_MODELS:
        return _load_rows(net, metadata, weights, size, answer)
    try:
        preprocessing = metadata["preprocessing"]
        own_size, mean, std = (preprocessing[key] for key in ("size", "mean", "std"))
        if np.shape([mean, std]) != (2, 3) or not np.isfinite([mean, std]).all() or int(own_size) != own_size:
            raise ValueError("three numbers each, and a whole one")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{weights} does not say how its images are prepared; give a model written by reproduce"
        ) from error
    size = own_size if size is None else size
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"size {size} is out of bounds; choose {MIN_SIZE} to {MAX_SIZE} pixels")
    images = to_input(calibration_images(size), mean, std)
    plan, integers = compile_model(net, size, images, tuple(mean), tuple(std), answer)
    return plan, integers, metadata["grades"]


def row_inputs(weights: str | Path) -> dict | None:
    """What a file of ``reproduce``'s declares of a row's inputs, for ``data.table.encoded_rows``; None for images."""
    return parse_json(read_state(Path(weights))[1]["preprocessing"]).get("declared")


def thresholds(weights: str | Path) -> dict[str, float]:
    """Severities beyond which a disease is called, by its name, as a file of ``reproduce``'s has them; {} for none.

    Raises InputError where the file has something else there.
    """
    metadata = read_state(Path(weights))[1]
    found, most = parse_json(metadata.get("thresholds", "{}")), len(parse_json(metadata["grades"])) - 1
    if not isinstance(found, dict) or not all(
        isinstance(beyond, int | float) and 0 <= beyond <= most for beyond in found.values()
    ):
        raise InputError(
            f"{weights}: its thresholds are not a number for each disease, 0 to {most}; give a model of reproduce's"
        )
    return found


def _load_rows(
    net: torch.nn.Module, metadata: dict, weights: str | Path, size: int | None, answer: str
) -> tuple[Plan, Weights, list[str]]:
    """``load`` for a model of a table's rows."""
    inputs, declared = (metadata["preprocessing"].get(key) for key in ("inputs", "declared"))
    if not isinstance(declared, dict) or not declared:
        raise InputError(
            f"{weights} does not say how a patient becomes {len(inputs)} numbers; train it again, on a CSV file with a "
            "data sheet"
        )
    if size is not None:
        raise InputError(f"size is {size}, but {weights} is a model of a table's rows; leave it out")
    rows, ((half,), (spread,)) = calibration_rows(len(inputs)), ((one[0],) for one in HALF)
    net = torch.nn.Sequential(torch.nn.Flatten(), *(net if isinstance(net, torch.nn.Sequential) else [net]))
    plan, integers = compile_model(
        net, 1, torch.from_numpy(rows), (half,) * len(inputs), (spread,) * len(inputs), answer
    )
    return plan, integers, metadata["grades"]


def calibration_rows(inputs: int, seed: int = 0) -> np.ndarray:
    """float32 (N, inputs, 1, 1), of norm 1: every input alone, both ways, and ``ROWS`` directions at random.

    >>> calibration_rows(29).shape
    (570, 29, 1, 1)
    """
    drawn = np.random.default_rng(seed).standard_normal((ROWS, inputs))
    rows = np.concatenate([np.eye(inputs), -np.eye(inputs), drawn / np.linalg.norm(drawn, axis=1, keepdims=True)])
    return rows.astype(np.float32)[:, :, None, None]


def calibration_images(size: int, seed: int = 0) -> np.ndarray:
    """uint8 (N, size, size, 3): eight public synthetic eyes and the ``extremes``."""
    drawn = min(max(size, MIN_SIZE), MAX_SIZE)
    eyes = resize_all(make_population(EYES, drawn, seed, "public", threads=1)[0], size)
    return np.concatenate([eyes, extremes(size, seed)])


def extremes(size: int, seed: int = 0) -> np.ndarray:
    """uint8 (16, size, size, 3): noise, stripes both ways, checkerboards, fine to coarse; white, plain colours."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((size, size))
    pictures = []
    for width in (1, 3, 8):
        blocks = rng.integers(0, 2, (-(-size // width), -(-size // width), 3))
        pictures.append(blocks[rows // width, columns // width])
        for pattern in (rows // width, columns // width, rows // width + columns // width):
            pictures.append(np.repeat(pattern[..., None] % 2, 3, axis=2))
    for colour in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        pictures.append(np.broadcast_to(colour, (size, size, 3)))
    return (np.stack(pictures) * 255).astype(np.uint8)
