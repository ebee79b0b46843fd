"""Draw stylised colour photographs of the back of the eye, many at once.

From random numbers and a grade come the anatomy (disc, macula, vessel tree), findings that are not diabetic (drusen,
dust, reflections, pigment) and the lesions of diabetic retinopathy. Patients, cameras and data sets come later
(``photograph``, ``synthetic``), and the pictures teach methods, not ophthalmology.

Everything round is a Gaussian spot, and vessels are chains of spots. Blur by the optics and by the pixel's own
area then only widens each spot, so a patient looks the same at every image size. Lengths are in units of the
radius of the field of view, with the origin in its middle, x to the right and y downwards.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

#: The bounds (low, high) between which a value is drawn.
Range = tuple[float, float]

#: Patch half-widths in pixels: spots of similar size are painted together.
HALF_WIDTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

#: Standard deviation in pixels of the blur by the pixel's own area.
PIXEL_BLUR = 0.35

#: Counts (fewest, most) by grade: microaneurysms, haemorrhages, clusters of exudates, cotton-wool spots, tufts of
#: new vessels. Grade 4 adds new vessels to the lesions of grade 2 or 3.
LESIONS = {
    "microaneurysms": ((0, 0), (3, 8), (6, 16), (12, 26), (6, 22)),
    "haemorrhages": ((0, 0), (0, 0), (2, 6), (12, 22), (2, 14)),
    "exudates": ((0, 0), (0, 0), (0, 3), (0, 4), (0, 3)),
    "cotton_wool": ((0, 0), (0, 0), (0, 0), (1, 4), (0, 2)),
    "new_vessels": ((0, 0), (0, 0), (0, 0), (0, 0), (2, 4)),
}


class Draws:
    """Uniform random numbers, handed out in order: (N, K), K for each of N patients."""

    def __init__(self, numbers: np.ndarray):
        self.numbers, self.used = numbers, 0

    def uniform(self, low: ArrayLike, high: ArrayLike, *shape: int) -> np.ndarray:
        """The next numbers of every patient between ``low`` and ``high``: (N, *shape).

        Raises ValueError where the numbers run out.
        """
        count = int(np.prod(shape, dtype=int))
        if self.used + count > self.numbers.shape[1]:
            raise ValueError(f"{self.numbers.shape[1]} random numbers per patient are too few")
        taken = self.numbers[:, self.used : self.used + count].reshape(-1, *shape)
        self.used += count
        return low + (high - low) * taken

    def present(self, fewest: ArrayLike, most: ArrayLike, slots: int) -> np.ndarray:
        """Which of ``slots`` things each patient has, a number uniform from ``fewest`` to ``most``: bool (N, slots)."""
        count = np.floor(self.uniform(fewest, np.asarray(most) + 1))
        return np.arange(slots) < count[:, None]


@dataclass(frozen=True)
class View:
    """The framing of N photographs: centre x, y (N,) and radius (N,) of the field in pixels, blur (N,) in radii."""

    size: int
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    blur: np.ndarray

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The position of every pixel in units of the field's radius: x (N, 1, size) and y (N, size, 1)."""
        pixels = np.arange(self.size)
        x = (pixels - self.x[:, None]) / self.radius[:, None]
        y = (pixels - self.y[:, None]) / self.radius[:, None]
        return x[:, None, :], y[:, :, None]


@dataclass(frozen=True)
class Spots:
    """P Gaussian spots for each of N pictures, (N, P) each.

    x, y    their middle
    radius  their standard deviation
    amount  their height at the middle; 0 for no spot
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    amount: np.ndarray

    @staticmethod
    def join(*parts: "Spots") -> "Spots":
        """The spots of several groups as one group."""
        fields = ("x", "y", "radius", "amount")
        return Spots(*(np.concatenate([getattr(p, f) for p in parts], axis=1) for f in fields))


def paint(spots: Spots, view: View) -> np.ndarray:
    """The sum of the spots as seen in ``view``: float64 (N, size, size)."""
    size, scale = view.size, view.radius[:, None]
    x, y = view.x[:, None] + scale * spots.x, view.y[:, None] + scale * spots.y
    drawn = spots.radius * scale
    seen = np.sqrt(drawn**2 + (view.blur[:, None] * scale) ** 2 + PIXEL_BLUR**2)
    amount = spots.amount * (drawn / seen) ** 2  # blur keeps the integral of a spot
    inside = (spots.x**2 + spots.y**2 < 1.1) & (np.abs(amount) > 1e-3)
    image, spot = np.nonzero(inside)
    x, y, seen, amount = (a[image, spot] for a in (x, y, seen, amount))
    bucket = np.searchsorted(HALF_WIDTHS, 2.5 * seen)
    canvas = np.zeros(len(inside) * size * size)
    for b in np.unique(bucket):
        mine = bucket == b
        offsets = np.arange(-HALF_WIDTHS[b], HALF_WIDTHS[b] + 1)
        columns, across = _profile(x[mine], seen[mine], offsets, size)
        rows, down = _profile(y[mine], seen[mine], offsets, size)
        down *= amount[mine][:, None]
        rows += image[mine][:, None] * size
        index = rows[:, :, None] * size + columns[:, None, :]
        weight = down[:, :, None] * across[:, None, :]
        canvas += np.bincount(index.ravel(), weight.ravel(), minlength=len(canvas))
    return canvas.reshape(-1, size, size)


def _profile(middle: np.ndarray, sigma: np.ndarray, offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel numbers around ``middle`` and the Gaussian there, 0 outside the picture."""
    pixels = np.rint(middle).astype(np.int64)[:, None] + offsets
    height = np.exp(-0.5 * ((pixels - middle[:, None]) / sigma[:, None]) ** 2)
    height[(pixels < 0) | (pixels >= size)] = 0
    return np.clip(pixels, 0, size - 1), height


def curve(
    x: np.ndarray,
    y: np.ndarray,
    heading: np.ndarray,
    turn: np.ndarray,
    length: np.ndarray,
    sway: np.ndarray,
    phase: np.ndarray,
    points: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paths that start at (x, y) and turn by ``turn`` radians in all, swaying on the way.

    Arguments are (N, P), angles in radians; returns x, y and heading, each (N, P, points).
    """
    t = np.linspace(0, 1, points)
    x, y, heading, turn, length, sway, phase = (a[..., None] for a in (x, y, heading, turn, length, sway, phase))
    heading = heading + turn * t + sway * np.sin(2 * np.pi * (1.5 * t + phase))
    step = length / points
    return x + np.cumsum(np.cos(heading), -1) * step, y + np.cumsum(np.sin(heading), -1) * step, heading


def chain(x: np.ndarray, y: np.ndarray, radius: np.ndarray, density: np.ndarray, finer: int) -> Spots:
    """Spots along paths (N, P, points), so close that they merge into lines of that optical density.

    finer  the number of spots for each point of a path
    """
    if finer > 1:
        old = np.arange(x.shape[-1])
        new = np.linspace(0, old[-1], finer * len(old))
        left = np.minimum(new.astype(int), old[-1] - 1)
        part = new - left
        x, y, radius, density = (
            a[..., left] * (1 - part) + a[..., left + 1] * part
            for a in (x, y, np.broadcast_to(radius, x.shape), np.broadcast_to(density, x.shape))
        )
    spacing = np.hypot(np.diff(x, axis=-1), np.diff(y, axis=-1))
    spacing = np.concatenate([spacing[..., :1], spacing], axis=-1)
    amount = density * spacing / (radius * np.sqrt(2 * np.pi))
    flat = (len(x), -1)
    return Spots(*(np.broadcast_to(a, x.shape).reshape(flat) for a in (x, y, radius, amount)))


def vessel_tree(draws: Draws, disc_x: np.ndarray, disc_y: np.ndarray, beaded: np.ndarray, finer: int) -> Spots:
    """Arteries and veins from the disc along the arcades, with two generations of branches: spots of blood.

    disc_x, disc_y  (N,), the disc, to the right of the macula
    beaded          bool (N,), whether the veins are beaded
    """
    eyes, trunks = len(disc_x), 8
    temporal = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
    below = np.array([1, 1, -1, -1, 1, 1, -1, -1])
    vein = np.array([0, 1, 0, 1, 0, 1, 0, 1], dtype=bool)
    start = np.where(temporal, draws.uniform(1.65, 2.2, trunks), draws.uniform(0.3, 1.1, trunks))
    turn = np.where(temporal, draws.uniform(0.6, 1.5, trunks), draws.uniform(-0.4, 0.5, trunks))
    length = np.where(temporal, draws.uniform(1.3, 1.7, trunks), draws.uniform(0.5, 0.8, trunks))
    caliber = draws.uniform(0.8, 1.25, 1) * np.where(vein, 0.021, 0.015)
    strength = draws.uniform(0.7, 1.15, 1) * np.where(vein, 0.85, 0.6)
    x, y, heading = curve(
        np.broadcast_to(disc_x[:, None], (eyes, trunks)),
        np.broadcast_to(disc_y[:, None], (eyes, trunks)),
        *(start * below, turn * below, length),
        *(draws.uniform(-0.3, 0.3, trunks), draws.uniform(0, 1, trunks)),
        points=56,
    )
    t = np.linspace(0, 1, 56)
    beads = 1 + 0.5 * np.sin(2 * np.pi * 11 * t) * (beaded[:, None] & vein)[..., None]
    parts = [chain(x, y, caliber[..., None] * (1 - 0.45 * t) * beads, strength[..., None], finer)]
    for children, points, reach in ((3, 20, (0.3, 0.65)), (2, 10, (0.12, 0.35))):
        shape = (x.shape[1], children)
        where = (draws.uniform(0.12, 0.9, *shape) * x.shape[2]).astype(int)
        side = np.where(draws.uniform(0, 1, *shape) < 0.5, -1, 1)
        x, y, heading = (np.take_along_axis(a, where, axis=2).reshape(eyes, -1) for a in (x, y, heading))
        many = x.shape[1]
        heading = heading + (side * draws.uniform(0.4, 1.0, *shape)).reshape(eyes, -1)
        caliber, strength = (np.repeat(a, children, axis=1) * 0.72 for a in (caliber, strength))
        x, y, heading = curve(
            *(x, y, heading, draws.uniform(-0.7, 0.7, many), draws.uniform(*reach, many)),
            *(draws.uniform(-0.4, 0.4, many), draws.uniform(0, 1, many)),
            points=points,
        )
        taper = 1 - 0.5 * np.linspace(0, 1, points)
        parts.append(chain(x, y, caliber[..., None] * taper, strength[..., None], finer))
    return Spots.join(*parts)


def scatter(draws: Draws, slots: int, reach: float = 0.92, inner: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Positions spread evenly over the ring from radius ``inner`` to ``reach``: x and y, (N, slots)."""
    distance = np.sqrt(draws.uniform(inner**2, reach**2, slots))
    angle = draws.uniform(0, 2 * np.pi, slots)
    return distance * np.cos(angle), distance * np.sin(angle)


def sprinkle(draws: Draws, present: np.ndarray, radius: Range, amount: Range) -> Spots:
    """Single spots at random places, where ``present`` (N, slots)."""
    slots = present.shape[1]
    x, y = scatter(draws, slots)
    return Spots(x, y, draws.uniform(*radius, slots), draws.uniform(*amount, slots) * present)


def clusters(
    draws: Draws,
    present: np.ndarray,
    members: int,
    spread: float,
    radius: Range,
    amount: Range,
    reach: float = 0.8,
    inner: float = 0.0,
) -> Spots:
    """Groups of ``members`` spots within ``spread`` of a random place, where ``present`` (N, groups)."""
    groups = present.shape[1]
    x, y = scatter(draws, groups, reach, inner)
    angle = draws.uniform(0, 2 * np.pi, groups, members)
    away = spread * np.sqrt(draws.uniform(0, 1, groups, members))
    amount = draws.uniform(*amount, groups, members) * present[..., None]
    radius = draws.uniform(*radius, groups, members)
    flat = (len(present), -1)
    x, y = x[..., None] + away * np.cos(angle), y[..., None] + away * np.sin(angle)
    return Spots(*(a.reshape(flat) for a in (x, y, radius, amount)))


def new_vessels(draws: Draws, present: np.ndarray, disc_x: np.ndarray, disc_y: np.ndarray, finer: int) -> Spots:
    """Tufts of fine curled vessels, where ``present`` (N, tufts), the first perhaps at the disc: spots of blood."""
    tufts, strands = present.shape[1], 7
    x, y = scatter(draws, tufts, reach=0.75)
    at_disc = draws.uniform(0, 1) < 0.5
    x[:, 0], y[:, 0] = np.where(at_disc, disc_x, x[:, 0]), np.where(at_disc, disc_y, y[:, 0])
    shape = (tufts, strands)
    heading = draws.uniform(0, 2 * np.pi, *shape)
    side = np.where(draws.uniform(0, 1, *shape) < 0.5, -1, 1)
    x, y = (np.broadcast_to(a[..., None], (len(x), *shape)) for a in (x, y))
    length = draws.uniform(0.25, 0.45, *shape)
    sway, phase = draws.uniform(0.3, 0.9, *shape), draws.uniform(0, 1, *shape)
    turn = side * draws.uniform(3.0, 6.5, *shape)
    x, y, _ = curve(x, y, heading, turn, length, sway, phase, points=22)
    flat = (len(present), tufts * strands, 22)
    density = np.broadcast_to(0.8 * present[..., None, None], (*x.shape[:3], 22))
    return chain(x.reshape(flat), y.reshape(flat), np.full(flat, 0.012), density.reshape(flat), finer)


def boats(draws: Draws, present: np.ndarray, view: View) -> np.ndarray:
    """Preretinal haemorrhages, pools of blood with a level top, where ``present`` (N,): (N, size, size)."""
    x, y = view.grid()
    middle_x, middle_y = scatter(draws, 1, reach=0.6)
    width, depth = draws.uniform(0.16, 0.3), draws.uniform(0.1, 0.18)
    soft = np.hypot(0.015, view.blur)[:, None, None]
    x, y = x - middle_x[..., None], y - middle_y[..., None]
    round_ = np.sqrt((x / width[:, None, None]) ** 2 + (y / depth[:, None, None]) ** 2)
    pool = expit((1 - round_) * depth[:, None, None] / soft) * expit((y + 0.02) / soft)
    return pool * (draws.uniform(0.9, 1.4) * present)[:, None, None]
