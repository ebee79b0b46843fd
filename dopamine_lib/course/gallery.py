"""The pictures in ``figures/``, all drawn again by one command: ``python -m dopamine_lib gallery OUT``.

Each is drawn by a function that other parts of the kit use too. The patient's page is photographed by its own test.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from dopamine_lib.auditing.explorer import draw_allowed
from dopamine_lib.course.schematic import dopamine_schematic
from dopamine_lib.data import load
from dopamine_lib.data.pictures import contact_sheet
from dopamine_lib.encryption.explorer import draw_sum
from dopamine_lib.errors import InputError
from dopamine_lib.federation.explorer import draw_step
from dopamine_lib.federation.options import Options
from dopamine_lib.files import atomic_path, parse_json
from dopamine_lib.inference.explorer import draw_message
from dopamine_lib.pictures import plain_style
from dopamine_lib.privacy.explorer import draw_budget, draw_calibration
from dopamine_lib.progress import progress_bar
from dopamine_lib.reproduction.figure1 import figure1
from dopamine_lib.reproduction.run import reproduce

#: The README's picture; it takes a run of the five settings.
FIGURE1 = "figure1.png"
MAX_BYTES = 200_000
#: File name and the function, without arguments, that draws it.
PICTURES: dict[str, Callable[[], Figure]] = {
    "schematic.png": dopamine_schematic,
    "synthetic_eyes.png": lambda: contact_sheet(load("synthetic"), columns=4),
    "noise_calibration.png": draw_calibration,
    "privacy_budget.png": draw_budget,
    "ciphertext_noise.png": lambda: draw_sum(100, 22, 12),
    "one_private_step.png": draw_step,
    "masked_message.png": draw_message,
    "what_epsilon_allows.png": draw_allowed,
}


def draw_gallery(out: str | PathLike, results: str | PathLike | None = None) -> Iterator[Path]:
    """Draw every picture into the folder ``out`` and yield its path.

    results  a folder that ``reproduce`` wrote, for Figure 1; without one the five settings are trained for it
    Raises InputError if ``results`` has no results, or ``out`` cannot be made.
    """
    out, found = Path(out), None if results is None else _read(Path(results) / "results.json")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}); name another folder") from None
    for name, draw in progress_bar(PICTURES.items(), title="gallery", unit="picture"):
        with plain_style():
            path = save(draw(), out / name)
        yield path
    if found is None:
        with tempfile.TemporaryDirectory(prefix="dopamine-gallery-") as folder:
            found = reproduce(Options(), folder)
    with plain_style():
        path = save(figure1(found), out / FIGURE1)
    yield path


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG of 256 colours, which is a third of the size and looks the same; returns ``path``."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    with Image.open(drawn) as picture, atomic_path(path) as temporary:
        picture.convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
    return path


def _read(path: Path) -> dict:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read; give --results a folder that reproduce wrote") from None
