"""Fundus images in files: reading a picture, and APTOS 2019 with everything that can be wrong in it."""

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from dopamine_lib.data import load, picture_files
from dopamine_lib.data.aptos import load_aptos
from dopamine_lib.data.cache import cache_dir
from dopamine_lib.data.images import MAX_BYTES, open_image, read_image, resize_all
from dopamine_lib.errors import InputError

# --- reading a picture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 500), (501, 300), (40, 57), (224, 300)])
def test_preprocessing_is_the_authors(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    theirs = transforms.Compose([transforms.Resize(265), transforms.CenterCrop(224)])
    assert np.array_equal(read_image(tmp_path / "a.png", 224), np.asarray(theirs(Image.fromarray(pixels))))


def test_an_image_of_the_right_size_stays_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 32), pixels)


def test_other_kinds_of_pictures_become_rgb(tmp_path):
    path = tmp_path / "a.png"
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    as_rgb = np.repeat(grey[..., None], 3, axis=-1)
    Image.fromarray(grey).save(path)
    assert np.array_equal(read_image(path, 16), as_rgb)
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(path)  # 16-bit
    assert np.array_equal(read_image(path, 16), as_rgb)
    opaque = np.full((16, 16, 1), 255, dtype=np.uint8)
    opaque[:8] = 0
    Image.fromarray(np.concatenate([as_rgb, opaque], axis=-1)).save(path)
    laid_over_black = read_image(path, 16)
    assert not laid_over_black[:8].any() and np.array_equal(laid_over_black[8:], as_rgb[8:])
    Image.fromarray(as_rgb).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert read_image(tmp_path / "a.jpg", 16).shape == (16, 16, 3)


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png", 16)
    assert upright[:8].all() and not upright[8:].any()


def test_resize_all_bounds_the_memory():
    with pytest.raises(InputError) as error:
        resize_all(np.broadcast_to(np.uint8(0), (70_000, 28, 28, 3)), 1024)
    largest = int(str(error.value).split()[-1])
    assert 70_000 * 3 * largest**2 <= MAX_BYTES < 70_000 * 3 * (largest + 1) ** 2


# --- APTOS 2019 ------------------------------------------------------------------------------------------


def duplicates(data) -> tuple[int, int, int]:
    """Groups of pixel-identical images, the images in them, and how many groups have more than one grade."""
    numbers, images = np.unique(data.person, return_counts=True)
    groups = [set(data.labels[data.person == number].tolist()) for number in numbers[images > 1]]
    return len(groups), int(images[images > 1].sum()), sum(len(grades) > 1 for grades in groups)


def test_aptos_on_the_real_images(shared_data, monkeypatch, check_dataset):
    data = load("aptos", shared_data / "aptos2019")
    check_dataset(data)
    assert data.images.shape == (2931, 224, 224, 3) and isinstance(data.images, np.memmap)
    assert abs(len(data.test) - 0.2 * 2931) < 120  # 5.5 standard deviations
    assert duplicates(data) == (92, 188, 20)
    assert data.sheet.patients is None  # four fifths of APTOS: a folder of its own
    original = Image.open(shared_data / "aptos2019" / "train_images" / "000c1434d8d7.jpg")
    assert data.labels[0] == 2 and np.array_equal(data.images[0], np.asarray(original))
    # nothing is decoded the second time; the split follows the seed
    monkeypatch.setattr(picture_files, "open_image", None)
    assert np.array_equal(load("aptos", shared_data / "aptos2019").test, data.test)
    assert not np.array_equal(load("aptos", shared_data / "aptos2019", seed=1).test, data.test)


def test_aptos_small_set_cached_by_content(make_aptos, tmp_path, monkeypatch, check_dataset):
    folder = make_aptos(tmp_path / "aptos")
    data = load_aptos(folder, size=16)
    check_dataset(data)
    assert data.person[0] == data.person[1] and len(np.unique(data.person)) == 59
    assert duplicates(data) == (1, 2, 1)
    assert np.array_equal(load_aptos(folder, size=20).test, data.test)  # whatever the image size
    decoded = []
    monkeypatch.setattr(picture_files, "open_image", lambda *args: decoded.append(args) or open_image(*args))
    load_aptos(folder, size=16)
    assert not decoded
    changed = folder / "train_images" / "eye7.png"
    Image.new("RGB", (20, 20)).save(changed)
    assert not load_aptos(folder, size=16).images[7].any() and len(decoded) == 60


def _write(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def _table(*rows):
    return _write("train.csv", "\n".join(["id_code,diagnosis", *rows]).encode())


def _truncate(folder):
    path = folder / "train_images" / "eye3.png"
    path.write_bytes(path.read_bytes()[:-300])


def _picture(width, height):
    return lambda folder: Image.new("1", (width, height)).save(folder / "train_images" / "eye3.png")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "train.csv").unlink(), "train.csv: no such file"),
        (_write("train.csv", b""), "no column id_code or image; found nothing"),
        (_write("train.csv", b"id_code,grade\neye0,1\n"), "no column diagnosis or level; found 'id_code', 'grade'"),
        (_write("train.csv", b"id_code,diagnosis\n\xff,1\n"), "train.csv: not a UTF-8 CSV file"),
        (_table(), "train.csv: no rows"),
        (_table("eye0,5"), "line 2: diagnosis '5' is not a grade; use an integer from 0 to 4"),
        (_table("eye0,1", "eye1,-1"), "line 3: diagnosis '-1'"),
        (_table("eye0,2.5"), "diagnosis '2.5'"),
        (_table("eye0,mild"), "diagnosis 'mild'"),
        (_table("eye0"), "diagnosis ''"),
        (_table("eye0,1", "eye0,1"), "line 3: id_code 'eye0' occurs twice"),
        (_table("../eye0,1"), "id_code '../eye0' is not a file name"),
        (_table("..,1"), "id_code '..'"),
        (_table("/etc/eye,1"), "id_code '/etc/eye'"),
        (_table(r"a\eye0,1"), r"id_code 'a\\eye0'"),
        (_table(",1"), "id_code ''"),
        (_table("eye0,1", "eye99,1"), "eye99: no image with suffix .png, .jpg, .jpeg"),
        (
            lambda folder: (folder / "train_images").rename(folder / "images"),
            "no such folder, nor train; found 'images'",
        ),
        (
            lambda folder: (folder / "train.csv").rename(folder / "grades.csv"),
            "no such file, nor trainLabels.csv; found",
        ),
        (_table("eye0,1", "eye1,1"), "2 images of 1 persons are too few"),
        (_write("train_images/eye3.png", b"not a picture"), "eye3.png: not a PNG or JPEG image; give"),
        (_write("train_images/eye3.png", b""), "eye3.png: not a PNG or JPEG image; give"),
        (_truncate, "eye3.png: not a readable PNG or JPEG image"),
        (_picture(8000, 8000), "eye3.png: 8000x8000 pixels are too many"),
        (
            _picture(20_000, 20_000),
            "eye3.png: too many pixels; give a picture of at most 50,000,000 pixels",
        ),
        (_picture(1, 50), "eye3.png: 1x50 pixels; one side may be at most 10 times the other"),
    ],
)
def test_aptos_bad_input(damage, said, make_aptos, tmp_path, monkeypatch, refuses):
    monkeypatch.setenv("DOPAMINE_CACHE", str(tmp_path / "cache"))
    folder = make_aptos(tmp_path / "aptos")
    damage(folder)
    with refuses(said):
        load_aptos(folder, size=16)
    # only the pictures of readable sets are cached, and always completely
    assert [path.suffix for path in sorted(cache_dir().iterdir())] in ([], [".npy", ".sha256"])


def _dialect(encoding="utf-8", **replaced):
    def change(folder):
        text = (folder / "train.csv").read_text()
        for old, new in replaced.get("words", ()):
            text = text.replace(old, new)
        (folder / "train.csv").write_bytes(text.encode(encoding))

    return change


def _nest(folder):
    inner = folder / "aptos2019-blindness-detection"
    inner.mkdir()
    (folder / "train.csv").rename(inner / "train.csv")
    (inner / "train_images").mkdir()
    (folder / "train_images").rename(inner / "train_images" / "train_images")
    (folder / ".DS_Store").write_bytes(b"x"), (folder / "__MACOSX").mkdir()


def _as_eyepacs(folder):
    (folder / "train.csv").rename(folder / "trainLabels.csv")
    text = (folder / "trainLabels.csv").read_text().replace("id_code,diagnosis", "image,level")
    (folder / "trainLabels.csv").write_text(text)
    (folder / "train_images").rename(folder / "train")


def _capitals(folder):
    for path in [*(folder / "train_images").iterdir()]:
        path.rename(path.with_suffix(path.suffix.upper()))


@pytest.mark.parametrize(
    "change",
    [
        _dialect(words=[(",", ";")]),
        _dialect(words=[(",", "\t")]),
        _dialect(words=[(",", ", ")]),
        _dialect(words=[("\n", "\r\n")]),
        _dialect(words=[("\n", "\r")]),
        _dialect(words=[(",", ";"), ("0\n", "0,0\n"), ("2\n", "2,0\n")]),
        _dialect(words=[("2\n", "2.0\n"), ("3\n", "3. \n"), ("4\n", "4 \n")]),
        _dialect(words=[("id_code,diagnosis", "ID_CODE , Diagnosis")]),
        _dialect(words=[("id_code,", ",id_code,"), ("\neye", "\n0,eye")]),
        _dialect(words=[("eye59,4\n", "eye59,4\n,\n  \n\n,\n")]),
        *(_dialect(words=[(",0\n", f"{suffix},0\n")]) for suffix in (".png", ".JPG")),
        *map(_dialect, ("utf-8-sig", "utf-16")),
        _nest,
        _as_eyepacs,
        _capitals,
    ],
    ids="semicolons tabs spaces crlf cr 2,0 2.0 header index blank png JPG bom utf-16 nested eyepacs capitals".split(),
)
def test_a_folder_as_people_have_it_gives_the_same_data(change, make_aptos, tmp_path):
    folder = make_aptos(tmp_path / "aptos")
    expected = load_aptos(folder, size=16)
    change(folder)
    data = load_aptos(folder, size=16)
    assert np.array_equal(data.labels, expected.labels) and np.array_equal(data.images, expected.images)


def test_the_table_itself_is_not_its_folder(make_aptos, tmp_path, refuses):
    with refuses("train.csv is a file; give the folder"):
        load_aptos(make_aptos(tmp_path / "aptos") / "train.csv")


@pytest.mark.parametrize("suffix", [".npy", ".sha256"])
def test_a_damaged_cache_is_made_again(make_aptos, tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("DOPAMINE_CACHE", str(tmp_path / "cache"))
    folder = make_aptos(tmp_path / "aptos")
    expected = np.array(load_aptos(folder, size=16).images)
    (file,) = (tmp_path / "cache").glob(f"pictures-*{suffix}")
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(load_aptos(folder, size=16).images, expected)


def test_aptos_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="no such folder; get the data with"):
        load_aptos(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the folder is empty; get the data with"):
        load_aptos(tmp_path)
    (tmp_path / "train.csv").write_text("id_code,diagnosis\neye0,1\n")
    with pytest.raises(InputError, match="train_images: no such folder"):
        load_aptos(tmp_path)
