"""From picture files to arrays: one way for every data set and for a scan that a patient uploads."""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dopamine_lib.errors import InputError
from dopamine_lib.progress import progress_bar

#: A fundus camera takes up to about 16 million pixels; a file that claims more than this is a decompression bomb.
MAX_PIXELS = 50_000_000
#: A short side is enlarged, so a picture one pixel wide would grow without bound.
MAX_RATIO = 10
#: The most memory that a data set may take after resizing.
MAX_BYTES = 4 * 2**30


def read_image(path: str | Path, size: int) -> np.ndarray:
    """A PNG or JPEG file as the model sees it: ``open_image``, then ``prepare``. Raises InputError as they do."""
    return prepare(open_image(path), size)


def open_image(source: str | Path | BinaryIO, name: str = "") -> Image.Image:
    """A PNG or JPEG file as an upright RGB image with 8 bits a channel.

    The camera's EXIF rotation is applied; grey, CMYK and palettes become RGB; 16-bit channels keep their upper 8 bits;
    transparency is laid over black (a fundus image's background). Colour profiles are ignored.

    source  a path or an open binary file
    name    its name in messages, by default the path
    Raises InputError for a file that is missing, damaged, animated, of another kind, or too large.
    """
    name = name or str(source)
    try:
        with Image.open(source, formats=("PNG", "JPEG")) as image:
            _refuse_shape(name, *image.size)
            # a JPEG of several pictures (a phone's MPO) begins with the photograph
            if image.format == "PNG" and image.is_animated:
                raise InputError(f"{name}: an animation of {image.n_frames} pictures; save one of them as a PNG file")
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a PNG or JPEG image; give a file of one of these kinds") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: too many pixels; give a picture of at most {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise InputError(f"{name}: there is not enough memory to decode it; save it smaller, as a JPEG") from None
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: not a readable PNG or JPEG image ({reason}); get the file again") from None


def _refuse_shape(name: str, width: int, height: int) -> None:
    """Refuse a picture that would fill the memory, before it is decoded or enlarged."""
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width}x{height} pixels are too many; give a picture of at most {MAX_PIXELS:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(f"{name}: {width}x{height} pixels; one side may be at most {MAX_RATIO} times the other")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255, which makes nearly every pixel white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


def prepare(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image as the paper's authors prepared theirs: uint8 (size, size, 3).

    The shorter side is resized to ``size * 265 / 224`` pixels, then the centre is cropped; an image of exactly
    ``size`` by ``size`` pixels stays as it is.

    >>> prepare(Image.new("RGB", (300, 200), "black"), 64).shape
    (64, 64, 3)
    """
    if image.size == (size, size):
        return np.asarray(image)
    # torchvision's Resize(265) and CenterCrop(224), scaled to ``size``
    shorter = round(size * 265 / 224)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def resize_all(images: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 (N, H, W, 3) bilinearly to (N, size, size, 3); the same array if it has that size already.

    Raises InputError where the result would take more than ``MAX_BYTES``.
    """
    if images.shape[1:3] == (size, size):
        return images
    if len(images) * size * size * 3 > MAX_BYTES:
        largest = math.isqrt(MAX_BYTES // (3 * len(images)))
        raise InputError(
            f"size {size}: {len(images)} images of that size take more than {MAX_BYTES // 2**30} GiB of "
            f"memory; choose a size of at most {largest}"
        )
    resized = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for i, image in enumerate(progress_bar(images, title="resizing", unit="image")):
        resized[i] = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return resized
