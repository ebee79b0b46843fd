"""Photograph drawn eyes: colours, age, camera and light turn the spots of ``fundus`` into pictures.

Each eye is rendered twice, with and without its lesions, through the same camera and with the same noise. The
picture with lesions then gets, channel by channel, exactly the histogram of the one without, and very nearly its
histograms of grey and of colour differences. So mean, contrast, percentiles, entropy or saturation say nothing of
the grade, which shows only in small details and their positions.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, ndtri

import dopamine_lib.data.fundus as fundus


def _colour(red: float, green: float, blue: float) -> np.ndarray:
    return np.array([red, green, blue])[:, None, None]


#: Relative absorption of light by blood, which is dark in green and blue.
BLOOD = _colour(0.38, 1.0, 0.9)

#: Colours of the parts that reflect light.
DISC, CUP, VEIL = _colour(0.98, 0.80, 0.50), _colour(1.0, 0.93, 0.72), _colour(0.62, 0.45, 0.30)
EXUDATE, COTTON = _colour(1.0, 0.93, 0.42), _colour(1.0, 0.96, 0.86)
DRUSEN, GLARE = _colour(0.95, 0.72, 0.36), _colour(0.92, 0.95, 1.0)

#: From red, green and blue to grey and two colour differences, an orthonormal matrix: its transpose inverts it.
OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])

#: The random numbers that a patient's eye and camera take at most.
NUMBERS = 2400


@dataclass(frozen=True)
class Camera:
    """A camera's share of the patients, and its optics.

    field     radius of the field of view (low, high) in half image widths; above 1 the edge is cropped
    blur      blur of the optics (low, high) in radii of the field
    noise     standard deviation of a pixel, where white is 1
    cast      gain of red, green and blue
    vignette  loss of light at the edge, from 0 to 1
    chroma    smearing of colour by compression, from 0 to 1
    """

    name: str
    share: float
    field: tuple[float, float]
    blur: tuple[float, float]
    noise: float
    cast: tuple[float, float, float]
    vignette: float
    chroma: float


#: The hospitals' cameras, from a good table-top instrument to a hand-held one.
PRIVATE_CAMERAS = (
    Camera("A", 0.44, (0.92, 0.98), (0.000, 0.010), 0.012, (1.00, 1.00, 1.00), 0.15, 0.0),
    Camera("B", 0.28, (0.98, 1.10), (0.006, 0.016), 0.016, (1.06, 0.92, 0.80), 0.30, 0.5),
    Camera("C", 0.18, (0.84, 0.92), (0.008, 0.018), 0.020, (0.90, 1.00, 1.12), 0.20, 0.5),
    Camera("D", 0.10, (0.90, 1.04), (0.020, 0.034), 0.040, (1.08, 0.95, 0.68), 0.45, 1.0),
)

#: The cameras of the public population for pre-training: similar, but none of the above.
PUBLIC_CAMERAS = (
    Camera("P", 0.40, (0.90, 1.00), (0.000, 0.012), 0.014, (1.04, 0.97, 0.92), 0.20, 0.0),
    Camera("Q", 0.25, (0.86, 0.94), (0.004, 0.014), 0.020, (0.94, 1.04, 1.06), 0.10, 0.5),
    Camera("R", 0.20, (1.00, 1.14), (0.010, 0.020), 0.024, (1.10, 0.90, 0.72), 0.35, 0.5),
    Camera("S", 0.15, (0.92, 1.06), (0.018, 0.032), 0.034, (0.98, 1.00, 0.86), 0.40, 1.0),
)


def photograph(
    generators: list[np.random.Generator],
    grade: np.ndarray,
    age: np.ndarray,
    left: np.ndarray,
    cameras: tuple[Camera, ...],
    camera: np.ndarray,
    size: int,
) -> np.ndarray:
    """Draw and photograph N eyes: uint8 (N, size, size, 3).

    generators  N seeded NumPy generators, one per patient: a picture depends on its own generator alone
    grade       int (N,), 0 to 4
    age         int (N,), from 0 (young) to 2 (old)
    left        bool (N,), whether it is a left eye, which has its disc on the left
    camera      int (N,), index into ``cameras``
    """
    draws = fundus.Draws(np.stack([g.random(NUMBERS) for g in generators]))
    of = {name: np.array([getattr(c, name) for c in cameras])[camera] for name in Camera.__annotations__}
    haze = draws.uniform(0, 0.10 + 0.14 * age)
    view = fundus.View(
        size,
        x=(size - 1) / 2 + draws.uniform(-0.02, 0.02) * size,
        y=(size - 1) / 2 + draws.uniform(-0.02, 0.02) * size,
        radius=draws.uniform(of["field"][:, 0], of["field"][:, 1]) * size / 2,
        blur=np.hypot(draws.uniform(of["blur"][:, 0], of["blur"][:, 1]), 0.03 * haze),
    )
    healthy, diseased = _eye(draws, grade, age, view)

    tint = of["cast"] * np.exp(0.10 * ndtri(draws.uniform(0.01, 0.99, 3)))
    tint = tint * (1 - np.array([0.0, 0.05, 0.16]) * age[:, None])  # the lens yellows with age
    exposure = draws.uniform(0.75, 1.1)[:, None] * tint
    gamma = _over_pixels(draws.uniform(0.85, 1.2))
    x, y = view.grid()
    edge = x**2 + y**2
    tilt = _over_pixels(draws.uniform(-0.14, 0.14)) * x + _over_pixels(draws.uniform(-0.14, 0.14)) * y
    light = (1 + tilt) * (1 - _over_pixels(of["vignette"]) * edge)
    light = light[:, None] * _over_pixels(exposure)
    noise = np.stack([g.standard_normal((3, size, size)) for g in generators])
    noise *= _over_pixels((of["noise"] * (1 + haze))[:, None])

    def develop(eye: np.ndarray) -> np.ndarray:
        _lay(eye, _over_pixels(haze), VEIL)
        eye *= light
        _smear_colour(eye, of["chroma"])
        eye += noise
        return eye

    picture, reference, field = develop(diseased), develop(healthy), edge < 1
    turned = match_histogram(_mix(OPPONENT, picture), _mix(OPPONENT, reference), field)
    picture = match_histogram(_mix(OPPONENT.T, turned), reference, field)
    picture = np.clip(picture, 0, 1) ** gamma[:, None]
    surround = 0.01 + 0.3 * np.abs(noise)
    picture -= surround
    picture *= expit((1 - np.sqrt(edge)) * _over_pixels(view.radius) / 0.4)[:, None]
    picture += surround
    picture[left] = picture[left, ..., ::-1]
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def match_histogram(picture: np.ndarray, reference: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Give each channel of ``picture`` within the field exactly the values of ``reference``, in picture's order.

    picture, reference  (N, C, H, W)
    field               bool (N, H, W); outside it the result (N, C, H, W) is 0

    >>> picture, reference = np.array([[[[1, 3, 2]]]]), np.array([[[[10, 20, 30]]]])
    >>> match_histogram(picture, reference, np.ones((1, 1, 3), dtype=bool)).astype(int).tolist()
    [[[[10, 30, 20]]]]
    """
    outside = np.broadcast_to(~field[:, None], picture.shape).reshape(*picture.shape[:2], -1)
    values, wanted = (np.where(outside, np.inf, a.reshape(outside.shape)) for a in (picture, reference))
    wanted.sort(axis=-1)
    order = values.argsort(axis=-1)  # noise leaves no ties within the field
    np.put_along_axis(values, order, wanted, axis=-1)
    values[outside] = 0
    return values.reshape(picture.shape)


def _eye(draws: fundus.Draws, grade: np.ndarray, age: np.ndarray, view: fundus.View) -> tuple[np.ndarray, np.ndarray]:
    """Reflected light of each eye without and with its lesions: two arrays (N, 3, size, size)."""
    finer = 1 if view.size <= 96 else 3
    disc_x, disc_y = draws.uniform(0.50, 0.62), draws.uniform(-0.08, 0.08)
    disc_radius = draws.uniform(0.12, 0.16)
    macula_x, macula_y = disc_x - draws.uniform(0.52, 0.62), disc_y + draws.uniform(0.02, 0.10)
    x, y = view.grid()

    tissue = np.array([0.74, 0.36, 0.16]) * np.exp(0.12 * ndtri(draws.uniform(0.01, 0.99, 3)))
    choroid = fundus.paint(
        fundus.Spots(
            *fundus.scatter(draws, 30, reach=1.04), draws.uniform(0.08, 0.25, 30), draws.uniform(-0.16, 0.16, 30)
        ),
        view,
    )
    macula_width = _over_pixels(draws.uniform(0.10, 0.17))
    distance = np.hypot(x - _over_pixels(macula_x), y - _over_pixels(macula_y))
    pigment = _over_pixels(draws.uniform(0.25, 0.55)) * np.exp(-0.5 * (distance / macula_width) ** 2)
    pigment += fundus.paint(_pigment_spots(draws), view)
    ground = _over_pixels(tissue) * np.exp(choroid - pigment)[:, None]

    soft = _over_pixels(np.sqrt(0.012**2 + view.blur**2 + (0.3 / view.radius) ** 2))
    oval = _over_pixels(draws.uniform(0.85, 1.0))
    distance = np.hypot((x - _over_pixels(disc_x)) / oval, y - _over_pixels(disc_y))
    _lay(ground, 0.9 * expit((_over_pixels(disc_radius) - distance) / soft), DISC)
    cup = _over_pixels(draws.uniform(0.3, 0.6) * disc_radius)
    _lay(ground, 0.7 * expit((cup - distance) / (2 * soft)), CUP)

    # findings that are not diabetic, equally frequent in every grade
    drusen_groups = draws.present(0, 1 + age, 3)
    drusen = fundus.clusters(draws, drusen_groups, 7, 0.22, (0.014, 0.034), (0.2, 0.55), reach=0.5)
    _lay(ground, fundus.paint(drusen, view), DRUSEN)
    glare = fundus.sprinkle(draws, draws.present(0, 4, 4), (0.02, 0.10), (0.1, 0.45))
    dust = fundus.sprinkle(draws, draws.present(0, 6, 6), (0.012, 0.035), (0.15, 0.5))
    beaded = (grade == 3) & (draws.uniform(0, 1) < 0.8)
    vessels = fundus.paint(fundus.vessel_tree(draws, disc_x, disc_y, beaded, finer), view)
    glare, dust = fundus.paint(glare, view), np.exp(-fundus.paint(dust, view))[:, None]

    blood, exudates, cotton = _lesions(draws, grade, disc_x, disc_y, view, finer)
    diseased = ground.copy()
    _lay(diseased, cotton, COTTON)
    diseased *= np.exp(-(vessels * (1 - cotton) + blood)[:, None] * BLOOD)
    _lay(diseased, exudates, EXUDATE)
    healthy = ground
    healthy *= np.exp(-vessels[:, None] * BLOOD)
    for eye in (healthy, diseased):
        eye *= dust
        _lay(eye, glare, GLARE)
    return healthy, diseased


def _pigment_spots(draws: fundus.Draws) -> fundus.Spots:
    """Brown patches and freckles of the choroid, which are not blood."""
    patches = fundus.sprinkle(draws, draws.present(0, 4, 4), (0.05, 0.12), (0.1, 0.35))
    freckles = fundus.sprinkle(draws, draws.present(0, 5, 5), (0.015, 0.03), (0.15, 0.45))
    return fundus.Spots.join(patches, freckles)


def _lesions(
    draws: fundus.Draws, grade: np.ndarray, disc_x: np.ndarray, disc_y: np.ndarray, view: fundus.View, finer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lesions of diabetic retinopathy by grade: blood (optical density), exudates and cotton wool (cover)."""

    def present(name: str, slots: int) -> np.ndarray:
        fewest, most = np.array(fundus.LESIONS[name]).T
        return draws.present(fewest[grade], most[grade], slots)

    clarity = draws.uniform(0.7, 1.2)[:, None]  # contrast of this patient's lesions
    aneurysms = fundus.sprinkle(draws, present("microaneurysms", 26), (0.018, 0.028), (0.9, 1.5))
    blots = fundus.clusters(draws, present("haemorrhages", 22), 4, 0.045, (0.022, 0.036), (0.4, 0.8), reach=0.9)
    tufts = fundus.new_vessels(draws, present("new_vessels", 4), disc_x, disc_y, finer)
    exudates = fundus.clusters(draws, present("exudates", 4), 9, 0.13, (0.012, 0.022), (0.5, 1.0), reach=0.6)
    cotton = fundus.clusters(draws, present("cotton_wool", 4), 3, 0.05, (0.035, 0.055), (0.35, 0.6), inner=0.3)
    pool = fundus.boats(draws, (grade == 4) & (draws.uniform(0, 1) < 0.4), view)
    blood = fundus.paint(fundus.Spots.join(aneurysms, blots), view) * clarity[..., None]
    blood = blood + fundus.paint(tufts, view) + pool
    return blood, *(np.minimum(fundus.paint(s, view) * clarity[..., None], 1) for s in (exudates, cotton))


def _mix(matrix: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The channels of ``picture`` (N, 3, H, W) mixed by the rows of a 3x3 matrix."""
    return np.stack([sum(row[c] * picture[:, c] for c in range(3)) for row in matrix], axis=1)


def _over_pixels(values: np.ndarray) -> np.ndarray:
    """An array with two more axes of length one, to apply to every pixel."""
    return values[..., None, None]


def _lay(light: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    """Cover ``light`` (N, 3, H, W) in place with a colour, to the degree ``cover`` (N, H, W) from 0 to 1."""
    cover = np.minimum(cover, 1)[:, None]
    light *= 1 - cover
    light += cover * colour


def _smear_colour(light: np.ndarray, strength: np.ndarray) -> None:
    """Blur the colour, not the brightness, of ``light`` (N, 3, H, W) in place, as compression does; strength (N,)."""
    grey = 0.3 * light[:, :1] + 0.6 * light[:, 1:2] + 0.1 * light[:, 2:]
    colour = light - grey
    padded = np.pad(colour, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    smooth = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    smooth = (smooth[..., :-2] + 2 * smooth[..., 1:-1] + smooth[..., 2:]) / 16
    smooth -= colour
    smooth *= _over_pixels(strength[:, None])
    light += smooth
