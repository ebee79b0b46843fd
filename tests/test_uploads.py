"""Uploads: every kind of PNG and JPEG becomes the right picture, everything else is refused in one sentence."""

import io
import resource
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from dopamine_lib.data import decoding, uploads
from dopamine_lib.data.decoding import open_apart
from dopamine_lib.data.images import MAX_PIXELS, prepare, read_image
from dopamine_lib.data.uploads import MAX_UPLOAD, read_upload
from dopamine_lib.errors import InputError

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((48, 32)))


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, depth, colour_type, rows: bytes, *more) -> bytes:
    """A PNG file by hand, of a kind that Pillow does not write; ``more`` are further chunks (type, content)."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def grey_ramp():
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def sixteen_bits(channels: int) -> bytes:
    """A 16-bit PNG with the ramp in its upper bytes and other values in its lower bytes."""
    values = np.repeat(grey_ramp()[..., None] * np.uint16(256) + np.uint16(99), channels, axis=-1).astype(">u2")
    return png(16, 16, 16, 0 if channels == 1 else 2, b"".join(b"\0" + row.tobytes() for row in values))


def palette() -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(SMOOTH).quantize(16)
    return encoded(image), np.asarray(image.convert("RGB"))


# --- accepted and converted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, expected",
    [
        (encoded(SMOOTH), SMOOTH),
        (encoded(grey_ramp()), grey_ramp()),
        (sixteen_bits(1), grey_ramp()),
        (sixteen_bits(3), grey_ramp()),
        (encoded(Image.fromarray(grey_ramp() > 127)), np.where(grey_ramp() > 127, 255, 0)),
        palette(),
        (encoded(Image.merge("LA", [Image.fromarray(grey_ramp())] * 2)), grey_ramp().astype(int) ** 2 / 255),
        (encoded(np.dstack([SMOOTH, np.full((32, 48), 255, np.uint8)])), SMOOTH),
        (encoded(np.dstack([SMOOTH, np.zeros((32, 48), np.uint8)])), np.zeros_like(SMOOTH)),
    ],
    ids=["rgb", "grey", "grey 16", "rgb 16", "1 bit", "palette", "grey and alpha", "opaque", "transparent"],
)
def test_every_kind_of_png_becomes_the_right_picture(data, expected):
    image = read_upload(data, "eye.png")
    assert image.mode == "RGB"
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=-1)
    assert np.abs(np.asarray(image).astype(float) - expected).max() <= 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_becomes_the_right_picture(mode, options):
    original = Image.fromarray(SMOOTH).convert(mode)
    image = read_upload(encoded(original, "JPEG", quality=95, **options), "eye.jpg")
    assert image.mode == "RGB" and image.size == (48, 32)
    assert np.abs(np.asarray(image).astype(float) - np.asarray(original.convert("RGB"))).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_rotation_is_applied(orientation, kind):
    rotated = {
        1: SMOOTH,
        2: SMOOTH[:, ::-1],
        3: SMOOTH[::-1, ::-1],
        4: SMOOTH[::-1],
        5: SMOOTH.transpose(1, 0, 2),
        6: np.rot90(SMOOTH, -1),
        7: np.rot90(SMOOTH, 2).transpose(1, 0, 2),
        8: np.rot90(SMOOTH),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = np.asarray(read_upload(encoded(SMOOTH, kind, exif=exif), "eye")).astype(float)
    assert image.shape == rotated.shape and np.abs(image - rotated).mean() < 5


def test_the_first_frame_of_a_phones_picture_counts():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    image = read_upload(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), "phone.jpg")
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() < 3


def test_twenty_megabytes_are_accepted():
    pixels = RNG.integers(0, 256, (2600, 2700, 3), dtype=np.uint8)
    data = encoded(pixels, compress_level=0)
    assert 20e6 < len(data) < MAX_UPLOAD
    assert np.array_equal(np.asarray(read_upload(data, "large.png")), pixels)


def test_an_upload_is_read_like_a_file(tmp_path):
    data = encoded(np.asarray(Image.fromarray(SMOOTH).resize((300, 220))), "JPEG")
    (tmp_path / "eye.jpg").write_bytes(data)
    for view in (data, memoryview(data)):  # ipywidgets hands out a memoryview
        assert np.array_equal(prepare(read_upload(view, "eye.jpg"), 64), read_image(tmp_path / "eye.jpg", 64))


# --- refused ---------------------------------------------------------------------------------------------


def animation() -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    return encoded(frames[0], save_all=True, append_images=frames[1:])


TEXT_BOMB = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000)))


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "an empty file; choose"),
        (b"\0", "not a PNG or JPEG image; give"),
        (b"<html><script>alert(1)</script></html>", "not a PNG or JPEG image; give"),
        (b"%PDF-1.7 and so on", "not a PNG or JPEG image; give"),
        (encoded(SMOOTH, "GIF"), "not a PNG or JPEG image; give"),
        (encoded(SMOOTH, "BMP"), "not a PNG or JPEG image; give"),
        (encoded(SMOOTH, "TIFF"), "not a PNG or JPEG image; give"),
        (encoded(SMOOTH, "PPM"), "not a PNG or JPEG image; give"),
        (animation(), "an animation of 3 pictures"),
        (png(0, 16, 8, 2, b""), "not a"),
        (png(16, 0, 8, 2, b""), "not a"),
        (png(4000, 20, 8, 0, bytes(20 * 4001)), "10 times the other"),
        (png(16, 16, 8, 0, bytes(16 * 17), TEXT_BOMB), "not a readable"),
    ],
    ids=[
        *("empty", "one byte", "html", "pdf", "gif", "bmp", "tiff", "ppm", "animation", "no width", "no height"),
        *("a strip", "text bomb"),
    ],
)
def test_a_file_that_is_not_a_picture_gets_a_sentence(refuses, data, said):
    with refuses("eye.png: ", said):
        read_upload(data, "eye.png")


def test_too_many_bytes_are_refused_unread(refuses, monkeypatch):
    monkeypatch.setattr(uploads, "open_image", None)
    with refuses("eye.png: more than 32 MiB is too much; choose a smaller file"):
        read_upload(bytes(MAX_UPLOAD + 1), "eye.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_picture_is_refused(refuses, kind):
    data = encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    for length in np.linspace(1, 0.95 * len(data), 40, dtype=int):
        with refuses("eye: not a"):
            read_upload(data[:length], "eye")


@pytest.mark.parametrize("side", [7100, 10_000, 20_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(refuses, monkeypatch, side):
    bomb = png(side, side, 1, 0, bytes(1000))
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    with warnings.catch_warnings(), refuses("bomb.png: ", f"at most {MAX_PIXELS:,}"):
        warnings.simplefilter("error")  # and standard error stays empty
        read_upload(bomb, "bomb.png")
    assert not decoded


def test_the_spy_of_the_test_above_sees_a_decoder(monkeypatch):
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    with pytest.raises(InputError):
        read_upload(png(16, 16, 8, 0, bytes(16 * 17)), "a.png")
    assert decoded


def test_other_decoders_are_not_even_tried(refuses, monkeypatch):
    def decoder(*_):
        raise AssertionError("a decoder for another format was tried")

    Image.init()
    for kind, (_, accept) in Image.OPEN.items():
        if kind not in ("PNG", "JPEG"):
            monkeypatch.setitem(Image.OPEN, kind, (decoder, accept))
    for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "WEBP"):
        with refuses("not a PNG or JPEG image; give"):
            read_upload(encoded(SMOOTH, kind), "a.png")


@pytest.mark.parametrize(
    "name, shown",
    [
        ("", "the upload: "),
        ("\n\x1b[31m\u202e ", "[31m: "),
        ("eye\n\r.png", "eye.png: "),
        ("<b>eye</b>.png", "<b>eye</b>.png: "),
        ("a" * 500 + ".png", "a" * 40 + "..." + "a" * 13 + ".png: "),
    ],
)
def test_a_file_name_stays_on_one_short_line(refuses, name, shown):
    with refuses() as error:
        read_upload(b"x", name)
    assert str(error.value).startswith(shown)


VALID = [encoded(SMOOTH), encoded(SMOOTH, "JPEG"), sixteen_bits(3), palette()[0], animation()]


def outcome(data):
    """A picture or a sentence; anything else that is raised fails the test."""
    try:
        image = read_upload(data, "eye")
    except InputError as error:
        assert str(error).startswith("eye: ") and "\n" not in str(error)
        return "sentence"
    assert image.mode == "RGB" and np.asarray(image).size <= 3 * MAX_PIXELS
    return "picture"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=8), st.data())
def test_damage_never_does_worse_than_a_sentence(data, damage, more):
    damaged = bytearray(data)
    for at, change in damage:
        damaged[at % len(data)] ^= change
    outcome(bytes(damaged[: more.draw(st.integers(0, len(data)))]) + more.draw(st.binary(max_size=20)))


def test_both_outcomes_occur():
    assert outcome(VALID[0]) == "picture" and outcome(VALID[0][:100]) == "sentence"


def test_the_limit_leaves_room_for_a_camera():
    assert uploads.MAX_UPLOAD >= 20e6 and MAX_PIXELS >= 24e6


# decoding in a process of its own


def test_what_is_decoded_apart_is_the_same(tmp_path, refuses, noisy_python):
    data = encoded(SMOOTH, "JPEG")
    (tmp_path / "eye.jpg").write_bytes(data)
    here = np.asarray(read_upload(data, "eye.jpg"))
    for source in (io.BytesIO(data), tmp_path / "eye.jpg"):
        assert np.array_equal(np.asarray(open_apart(source, "eye.jpg")), here)
    assert np.array_equal(np.asarray(read_upload(data, "eye.jpg", open_apart)), here)
    with refuses("eye.png: not a PNG or JPEG image"):
        open_apart(io.BytesIO(b"nothing"), "eye.png")
    with refuses("no.png", "get the file again"):
        open_apart(tmp_path / "no.png")


def many_scans(repeats):
    """A progressive JPEG whose last refinement comes again and again: for each, the whole picture is gone through."""
    data = encoded(Image.new("L", (800, 800), 90), "JPEG", progressive=True, quality=50)
    start = data.rindex(b"\xff\xda")
    last = data[start:-2]
    return data[:-2] + repeats * last + data[-2:]


def test_a_picture_that_takes_more_time_than_any_photograph_is_given_up(monkeypatch, refuses):
    monkeypatch.setattr(decoding, "SECONDS", 1)
    assert open_apart(io.BytesIO(many_scans(3)), "eye.jpg").size == (800, 800)
    with refuses("eye.jpg: decoding it takes more than 1 s"):
        open_apart(io.BytesIO(many_scans(10_000)), "eye.jpg")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not keep to a limit on memory")
def test_a_picture_that_takes_more_memory_than_any_photograph_is_given_up(monkeypatch, refuses):
    bomb = encoded(Image.new("RGBA", (6000, 6000), (9, 9, 9, 9)))
    assert len(bomb) < 300_000
    monkeypatch.setattr(decoding, "MEMORY", 2**29)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refuses("bomb.png: ", "memory"):
        open_apart(io.BytesIO(bomb), "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB, in this process
