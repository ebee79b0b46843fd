"""Who trusts whom in the five settings: who holds the images, and what protects a patient from whom, as a picture.

Every epsilon is the library's own (``Bound.adversaries``) at the paper's size: 2,930 patients, ten hospitals.
"""

import functools
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dopamine_lib.errors import InputError
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.pictures import BLACK, DARK_GREY

HOSPITALS, EACH = 10, 293
#: Against whom a patient is protected, or not.
PARTIES = ("whoever gets the model", "server or curator", "another hospital")
#: What a server may be shown of FSCDP's messages.
SHOWN = ("totals alone", "every message")


class View(NamedTuple):
    """What a party can learn of a patient: everything, whatever the updates tell, or what epsilon bounds."""

    kind: str  # "images", "no bound" or "bound"
    epsilon: float | None = None


@functools.lru_cache(maxsize=16)
def views(setting: str, shown: str = SHOWN[0]) -> dict[str, View]:
    """What each party of ``PARTIES`` can learn of a patient in a setting, by the classic accountant at delta = 1e-4.

    shown  what the server is shown in FSCDP: secure aggregation shows it "totals alone"
    A hospital's patients are protected against *another* hospital; their own holds their images in every federated
    setting, and a curator holds everybody's in the central ones. Raises InputError for an unknown setting or ``shown``.

    >>> [round(view.epsilon, 1) for view in views("FSCDP").values()]
    [10.8, 10.8, 11.9]
    >>> round(views("FSCDP", "every message")["server or curator"].epsilon)
    232
    """
    if setting not in SETTINGS or shown not in SHOWN:
        raise InputError(
            f"'{setting}', '{shown}' is unknown; choose one of {', '.join(SETTINGS)}, and of {', '.join(SHOWN)}"
        )
    record = SETTINGS[setting]
    sizes = (EACH,) * HOSPITALS if record.federated else (EACH * HOSPITALS,)
    plan = Plan(record, CHOICES["squeezenet"][setting], sizes=sizes, d=725_061)
    if not record.private:
        found = dict.fromkeys(PARTIES, View("no bound"))
    else:
        bounds = plan.bound.adversaries(max(plan.charged()), in_clear=shown == SHOWN[1])
        found = {
            name: View("bound", one and one["rdp_classic"]) for name, one in zip(PARTIES, bounds.values(), strict=True)
        }
    return found if record.federated else found | {"server or curator": View("images")}


def draw_trust(shown: str = SHOWN[0]) -> Figure:
    """A row for each setting: who has the images, what protects a patient. Raises InputError as ``views``."""
    figure = Figure(figsize=(8.6, 2.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 8.6), ylim=(2.9, 0))
    axes.set_axis_off()
    heads = ("images are with", *PARTIES)
    for x, name in zip((0.9, 2.9, 4.8, 6.7), heads, strict=True):
        axes.text(x + 0.85, 0.2, name, ha="center", va="center", fontsize=8.5, weight="bold")
    told = []
    for row, (name, record) in enumerate(SETTINGS.items()):
        y, holder = 0.4 + 0.5 * row, "each hospital" if record.federated else "one curator"
        axes.text(0.1, y + 0.2, name, va="center", fontsize=10, weight="bold")
        axes.text(1.75, y + 0.2, holder, ha="center", va="center", fontsize=8)
        seen = views(name, shown)
        for x, view in zip((2.9, 4.8, 6.7), seen.values(), strict=True):
            _draw(axes, x, y, view)
        told.append(f"{name}, images with {holder}: " + ", ".join(f"{who} {_text(v)}" for who, v in seen.items()))
    figure.set_label("What protects a patient from each party. " + "; ".join(told) + ".")
    return figure


def _text(view: View) -> str:
    return {"images": "has the images", "no bound": "no bound"}.get(view.kind) or f"epsilon {view.epsilon:.3g}"


def _draw(axes, x: float, y: float, view: View) -> None:
    """Black where the images are, hatched without a bound; with one, the darker the larger epsilon is."""
    grey = 0.0 if view.kind == "images" else 1.0 if view.kind == "no bound" else max(0.55, 1 - view.epsilon / 60)
    hatch = "////" if view.kind == "no bound" else None
    axes.add_patch(Rectangle((x, y), 1.7, 0.4, facecolor=str(grey), edgecolor=DARK_GREY, hatch=hatch, linewidth=0.8))
    box = dict(facecolor="white", edgecolor="none", pad=1) if hatch else None
    colour = "white" if view.kind == "images" else BLACK
    axes.text(x + 0.85, y + 0.2, _text(view), ha="center", va="center", fontsize=8.5, color=colour, bbox=box)
