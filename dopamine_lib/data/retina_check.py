"""Does a picture look like a photograph of the retina at all? A model grades a picture of a cat, too.

Two kinds of picture are known: as the camera takes it, a bright red-orange field in a dark surround; and after
subtraction of a Gaussian blur (as APTOS 2019 is often distributed), a patterned field in a flat grey surround, or one
that fills the picture, where the subtraction leaves bright rims in the corners. The check sees only the form and
colour of a thumbnail. It warns and does not refuse, and it is not a test of quality.
"""

import numpy as np
from PIL import Image

WARNING = (
    "This does not look like a photograph of the retina (a round, red-orange field in a dark surround): "
    "the model will name a grade all the same, and that grade will mean nothing."
)
SIDE = 28
_AXIS = (np.arange(SIDE) + 0.5) * 2 / SIDE - 1
#: Distance of each pixel of the thumbnail from its middle; the sides are at 1, the corners at 1.4.
_DISTANCE = np.hypot(_AXIS[:, None], _AXIS)
_FIELD = _DISTANCE < 0.7
_CORNERS = (slice(None, 3), slice(-3, None))


def retina_warning(image: Image.Image) -> str | None:
    """A warning for a picture that does not look like a fundus photograph, None for one that does."""
    thumbnail = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=float)
    known = _as_taken(thumbnail) or _blur_subtracted(thumbnail) or _blur_subtracted_to_the_rim(thumbnail)
    return None if known else WARNING


def _corners(thumbnail: np.ndarray) -> np.ndarray:
    """The four corners of a (28, 28, 3) thumbnail: (4, 9, 3)."""
    return np.stack([thumbnail[rows, columns].reshape(9, 3) for rows in _CORNERS for columns in _CORNERS])


def _as_taken(thumbnail: np.ndarray) -> bool:
    """A field with more red than green and blue, and every corner much darker than it."""
    field = thumbnail[_FIELD]
    red, green, blue = field.mean(axis=0)
    surround = _corners(thumbnail).mean(axis=(1, 2)).max()
    return bool(red > 1.1 * blue and red > green and surround < 0.4 * field.mean())


def _blur_subtracted(thumbnail: np.ndarray) -> bool:
    """Corners of one mid-grey, and a field whose average is near that grey too."""
    corners = _corners(thumbnail)
    return bool(
        np.abs(corners.mean(axis=1) - 128).max() < 8
        and corners.std(axis=1).max() < 6
        and np.abs(thumbnail[_FIELD].mean(axis=0) - 128).max() < 40
        and thumbnail[_FIELD].std() > 1
    )


def _blur_subtracted_to_the_rim(thumbnail: np.ndarray) -> bool:
    """Each sixteenth of the picture near mid-grey on average, and the field a little warmer: other textures are not."""
    blocks = thumbnail.reshape(4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(1, 3))
    red, green, blue = thumbnail[_FIELD].mean(axis=0)
    return bool(
        np.abs(blocks - 128).max() < 32
        and blocks.std(axis=(0, 1)).max() < 8
        and 1 < thumbnail[_FIELD].std() < 20
        and red > blue + 2
        and red >= green >= blue - 1
    )
