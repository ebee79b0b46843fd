"""The public images that set the scales of a private network: synthetic eyes, and pictures nothing like an eye.

An overflow inside a secret image goes unnoticed, so the ranges are taken over what is likely and over extremes, and
``network`` leaves room beyond them. No patient's image is used.
"""

import numpy as np

from dopamine_lib.data.images import resize_all
from dopamine_lib.data.synthetic import MAX_SIZE, MIN_SIZE, make_population

EYES = 8


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
