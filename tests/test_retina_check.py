"""The warning that a picture is not a photograph of the retina: for few fundus images, for nearly all others."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dopamine_lib.data.retina_check import WARNING, retina_warning
from dopamine_lib.data.synthetic import make_population

#: Fundus images in scikit-image's package: the first must pass; the second is a crop of a few vessels in grey.
FUNDUS = {"retina.jpg", "microaneurysms.png"}
#: Size and number of the synthetic patients that take longer.
LARGE = [(28, 1500), (64, 1500), (224, 60)]


def warned(images) -> float:
    """Share of the images, arrays or PIL's, that get the warning."""
    said = [retina_warning(image if isinstance(image, Image.Image) else Image.fromarray(image)) for image in images]
    assert set(said) <= {None, WARNING} and said
    return sum(text is not None for text in said) / len(said)


@pytest.fixture(scope="module")
def packaged() -> dict[str, Image.Image]:
    """Pictures from the packages scikit-image and scikit-learn, by name; nothing is downloaded."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = pytest.importorskip("skimage.data", reason="needs scikit-image: pip install scikit-image")
    folder = Path(data.__file__).parent
    pictures = {path.name: Image.open(path).convert("RGB") for path in sorted(folder.glob("*.[pj][np]g"))}
    samples = datasets.load_sample_images()
    names = (Path(name).name for name in samples.filenames)
    return pictures | {name: Image.fromarray(image) for name, image in zip(names, samples.images, strict=True)}


@pytest.fixture(scope="module")
def photographs(packaged):
    return {name: picture for name, picture in packaged.items() if name not in FUNDUS}


# --- fundus images: at most 2 % ---------------------------------------------------------------------------


def test_real_fundus_images_as_the_camera_takes_them(shared_data):
    with np.load(shared_data / "retinamnist.npz", allow_pickle=False) as file:
        images = np.concatenate([file[f"{part}_images"] for part in ("train", "val", "test")])
    assert images.shape == (1600, 28, 28, 3) and warned(images) <= 0.02  # 1.4 %: those with a white surround


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_real_fundus_images_with_the_blur_subtracted(shared_data, every):
    files = sorted((shared_data / "aptos2019" / "train_images").glob("*.jpg"))
    assert len(files) == 2931 and warned(Image.open(file) for file in files[::every]) == 0


#: Pictures whose field fills them: after the subtraction their corners are bright rims.
RIMS = "06024377d573 188a9323be03 1e742358e0b9 2d552318eb07 4134b290f5f3 6c315ad3d07f a3802934bad7".split()


@pytest.mark.parametrize("name", RIMS)
def test_a_bright_rim_is_no_reason_to_warn(shared_data, name):
    assert retina_warning(Image.open(shared_data / "aptos2019" / "train_images" / f"{name}.jpg")) is None


@pytest.mark.parametrize("population", ["private", "public"])
@pytest.mark.parametrize(
    "size, patients", [(28, 100), (64, 60), (224, 4), *(pytest.param(*p, marks=pytest.mark.slow) for p in LARGE)]
)
def test_synthetic_fundus_images(population, size, patients):
    assert warned(make_population(patients, size, 1, population)[0]) <= 0.02  # none


def test_the_fundus_image_of_scikit_image(packaged):
    retina = packaged["retina.jpg"]
    assert retina_warning(retina) is None
    for size in (28, 64, 224):
        assert retina_warning(retina.resize((size, size))) is None
    assert retina_warning(retina.resize((640, 480))) is None


# --- everything else --------------------------------------------------------------------------------------


def test_other_photographs_get_the_warning(photographs):
    assert len(photographs) >= 20 and warned(photographs.values()) >= 0.9  # all of them


@pytest.mark.parametrize("tint", [(1, 1, 1), (1, 0.6, 0.35), (1, 0.3, 0.2)], ids=["as it is", "orange", "red"])
def test_pieces_of_photographs_whatever_their_tint(photographs, tint):
    rng = np.random.default_rng(0)
    pieces = []
    for picture in photographs.values():
        for _ in range(10):
            side = int(rng.uniform(0.3, 1) * min(picture.size))
            x, y = (int(rng.integers(0, length - side + 1)) for length in picture.size)
            piece = picture.crop((x, y, x + side, y + side)).resize((64, 64))
            pieces.append((np.asarray(piece) * tint).astype(np.uint8))
    assert warned(pieces) >= 0.9


def test_flat_colours_and_noise_get_the_warning():
    rng = np.random.default_rng(0)
    colours = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 120, 30), (200, 30, 20), (*rng.integers(0, 256, 3),)]
    assert warned(Image.new("RGB", (64, 64), tuple(map(int, colour))) for colour in colours) == 1
    noise = rng.random((20, 64, 64, 1)) * np.array([255, 130, 60])
    assert warned(noise.astype(np.uint8)) == 1


def disc(field, surround) -> Image.Image:
    picture = Image.new("RGB", (200, 200), surround)
    ImageDraw.Draw(picture).ellipse((5, 5, 195, 195), fill=field)
    return picture


@pytest.mark.parametrize(
    "field, surround",
    [("blue", "black"), ("green", "black"), ("grey", "black"), ("white", "black"), ("orange", "white")],
)
def test_a_disc_of_other_colours_gets_the_warning(field, surround):
    assert retina_warning(disc(field, surround)) == WARNING


def test_the_check_sees_only_form_and_colour():
    # a drawn disc passes: the check knows nothing of vessels, and its text does not promise more
    assert retina_warning(disc("orange", "black")) is None


def test_a_picture_of_another_mode_raises_no_error():
    assert retina_warning(Image.new("L", (5, 900))) == WARNING
