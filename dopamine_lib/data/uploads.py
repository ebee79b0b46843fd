"""Uploads from an unknown browser: from bytes to a picture that is safe to show and to grade, or to one sentence.

    image = read_upload(data, "eye.jpg")        # PIL, RGB, upright
    pixels = prepare(image, 64)                 # dopamine_lib.data.images: as the model sees it

Decoding is done by ``data.images.open_image``, the same for a data set, for ``infer`` and for an upload; for the last
two in a process of its own (``data.decoding``).
"""

import io
import warnings
from collections.abc import Callable

from PIL import Image

from dopamine_lib.data.images import open_image
from dopamine_lib.errors import InputError

#: A fundus photograph has 0.1 to 10 MB. The page's server must let a message of this size through as well: the
#: WebSockets of Jupyter and Voila end at 10 MiB unless configured otherwise (websocket_max_message_size).
MAX_UPLOAD = 32 * 2**20


def read_upload(data: bytes, name: str = "", opening: Callable[..., Image.Image] = open_image) -> Image.Image:
    """The uploaded picture, RGB and upright, from any kind of PNG or JPEG.

    name     the browser's name for the file; used only in messages, shortened and without control characters, but not
             escaped for HTML
    opening  ``images.open_image``, or ``decoding.open_apart`` for what a stranger may have made
    Raises InputError, with a sentence for the person who uploaded, for a file that is empty, larger than
    ``MAX_UPLOAD`` bytes or ``data.images.MAX_PIXELS`` pixels (read from its header, before anything is decoded),
    damaged, animated, or neither PNG nor JPEG.
    """
    name = _shown(name)
    if not len(data):
        raise InputError(f"{name}: an empty file; choose a PNG or JPEG photograph")
    if len(data) > MAX_UPLOAD:
        raise InputError(f"{name}: more than {MAX_UPLOAD >> 20} MiB is too much; choose a smaller file")
    with warnings.catch_warnings():
        # refused here, so Pillow need not warn of it
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return opening(io.BytesIO(data), name)


def _shown(name: str) -> str:
    """A file name that fits in one line: printable, at most 60 characters."""
    name = "".join(character for character in name if character.isprintable()).strip()
    return (name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}") or "the upload"
