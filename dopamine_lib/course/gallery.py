"""The pictures in ``figures/``, all drawn again by one command: ``python -m dopamine_lib gallery OUT``.

Each is a plain function that other parts of the kit use too. The patient's page is photographed by its own test.
"""

import io
import json
import tempfile
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.files import atomic_path

#: The README's one; it takes a run of the five settings.
FIGURE1 = "figure1.png"
MOST_BYTES = 200_000


def _schematic():
    from dopamine_lib.course.schematic import dopamine_schematic

    return dopamine_schematic()


def _eyes():
    from dopamine_lib.data import load
    from dopamine_lib.data.pictures import contact_sheet

    return contact_sheet(load("synthetic"), columns=4)


def _calibration():
    from dopamine_lib.privacy.explorer import draw_calibration

    return draw_calibration(1.0, 1e-4)


def _budget():
    from dopamine_lib.privacy.explorer import draw_budget

    return draw_budget()


def _ciphertexts():
    from dopamine_lib.encryption.explorer import draw_sum

    return draw_sum(100, 22, 12)


def _step():
    from dopamine_lib.federation.explorer import draw_step

    return draw_step()


def _message():
    from dopamine_lib.inference.explorer import draw_message

    return draw_message(0, 1)


def _allowed():
    from dopamine_lib.auditing.explorer import draw_allowed

    return draw_allowed()


#: File name and the function, without arguments, that draws it.
PICTURES = {
    "schematic.png": _schematic,
    "synthetic_eyes.png": _eyes,
    "noise_calibration.png": _calibration,
    "privacy_budget.png": _budget,
    "ciphertext_noise.png": _ciphertexts,
    "one_private_step.png": _step,
    "masked_message.png": _message,
    "what_epsilon_allows.png": _allowed,
}


def draw_gallery(out, results=None):
    """Draw every picture into the folder ``out`` and yield its path.

    results  a folder that ``reproduce`` wrote, for Figure 1; without one the five settings are trained for it
    Raises InputError if there are no results in it, or ``out`` cannot be made.
    """
    out, found = Path(out), None if results is None else _read(Path(results) / "results.json")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}); name another folder") from None
    for name, draw in PICTURES.items():
        yield save(draw(), out / name)
    yield save(_figure1(found), out / FIGURE1)


def save(figure, path: Path) -> Path:
    """Write a Figure as a PNG of 256 colours, which is a third of the size and looks the same; returns ``path``."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    with Image.open(drawn) as picture, atomic_path(path) as temporary:
        picture.convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
    return path


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read; give --results a folder that reproduce wrote") from None


def _figure1(results: dict | None):
    from dopamine_lib.reproduction.figure1 import figure1

    if results is None:
        from dopamine_lib.federation.experiment import Options
        from dopamine_lib.reproduction.run import reproduce

        with tempfile.TemporaryDirectory(prefix="dopamine-gallery-") as folder:
            results = reproduce(Options(), folder)
    return figure1(results)
