"""What a stranger's browser sends: bytes in, a picture that is safe to show and to grade out, or one sentence.

    image = read_upload(data, "eye.jpg")        # PIL, RGB, upright
    pixels = prepare(image, 64)                 # dopamine_lib.data.images: as the model sees it

The decoding itself is ``data.images.open_image``, the same for a data set, for ``infer`` and for an upload.
"""

import io
import warnings

from PIL import Image

from dopamine_lib.data.images import open_image
from dopamine_lib.errors import InputError

#: A fundus photograph has 0.1 to 10 MB. What serves the page must let a message of this size through as well:
#: the WebSockets of Jupyter and Voila end at 10 MiB unless told otherwise (websocket_max_message_size).
MAX_UPLOAD = 32 * 2**20


def read_upload(data: bytes, name: str = "") -> Image.Image:
    """The uploaded picture, RGB and upright, whatever kind of PNG or JPEG it was.

    name  what the browser calls the file; only used in messages, shortened and without control characters, but not
          escaped: whoever writes it into HTML does that
    Raises InputError, a sentence for the person who uploaded, for a file that is empty, above ``MAX_UPLOAD``
    bytes, above ``data.images.MAX_PIXELS`` pixels (read from its header, before anything is decoded), damaged,
    animated, or neither PNG nor JPEG.
    """
    name = _shown(name)
    if not len(data):
        raise InputError(f"{name}: an empty file; choose a PNG or JPEG photograph")
    if len(data) > MAX_UPLOAD:
        raise InputError(
            f"{name}: {len(data) / 2**20:.1f} MiB are too much; choose a file of at most {MAX_UPLOAD >> 20} MiB"
        )
    with warnings.catch_warnings():
        # Pillow warns on standard error of what is refused here anyway
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return open_image(io.BytesIO(data), name)


def _shown(name: str) -> str:
    """A file name fit for one line: printable, at most 60 characters."""
    name = "".join(character for character in name if character.isprintable()).strip()
    return (name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}") or "the upload"
