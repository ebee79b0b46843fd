"""Dopamine in one picture, drawn with Matplotlib's shapes: who holds what, and what goes over the wire."""

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dopamine_lib.pictures import BLUE

HOSPITAL, SERVER, PATIENT, CRYPTO_PROVIDER = "#cfe8d5", "#d6e4f5", "#fbe3d0", "#eadcf0"
SECRET, CLEAR = BLUE, "#555555"  # arrows that carry a hidden secret, and others


def dopamine_schematic(hospitals: int = 3) -> Figure:
    """Training (left) and private inference (right); ``hospitals`` boxes stand for all K of them."""
    figure = Figure(figsize=(11, 5.4))
    training, inference = figure.add_axes((0.01, 0.02, 0.57, 0.9)), figure.add_axes((0.6, 0.02, 0.39, 0.9))
    for axes, title in ((training, "Training: Algorithm 1, T rounds"), (inference, "Inference: one patient's scan")):
        axes.set(xlim=(0, 10), ylim=(0, 10))
        axes.set_title(title, fontsize=12)
        axes.axis("off")
    _training(training, hospitals)
    _inference(inference)
    return figure


def _training(axes, hospitals: int) -> None:
    _box(axes, 5, 8.3, 6.4, 1.9, SERVER, "Server\nadds up ciphertexts it cannot read\nand sends the encrypted sum back")
    width = 9.6 / hospitals
    for number in range(hospitals):
        x = 0.2 + width * (number + 0.5)
        name = "K" if number == hospitals - 1 else str(number + 1)
        does = "own patients only:\nsample, clip, sum,\nadd a share of noise\n" + r"$\mathcal{N}(0,\ \sigma^2 C^2 / K)$"
        _box(axes, x, 2.1, width - 0.6, 3.4, HOSPITAL, f"Hospital {name}\n{does}")
        towards = 5 + (x - 5) * 0.6
        _arrow(axes, (x - 0.25, 3.9), (towards - 0.25, 7.3), SECRET)
        _arrow(axes, (towards + 0.25, 7.3), (x + 0.25, 3.9), SECRET)
    axes.text(0.2 + width * (hospitals - 1), 2.1, "…", ha="center", va="center", fontsize=14)
    label = dict(ha="center", va="center", fontsize=9, color=SECRET, bbox=dict(facecolor="white", edgecolor="none"))
    axes.text(5, 6.2, "up: clipped, noised sum, encrypted (BFV)", **label)
    axes.text(5, 5.2, "down: the encrypted total; the hospitals decrypt it and step", **label)


def _inference(axes) -> None:
    _box(axes, 2.0, 8.3, 3.6, 1.9, PATIENT, "Patient\nhas a scan,\nwants a grade")
    _box(axes, 8.0, 8.3, 3.6, 1.9, SERVER, "Service provider\nhas the model")
    _box(
        axes,
        5,
        2.1,
        6.4,
        2.4,
        CRYPTO_PROVIDER,
        "Crypto-provider (a hospital)\ndeals correlated randomness,\nsees neither scan nor model",
    )
    _arrow(axes, (3.9, 8.3), (6.1, 8.3), SECRET, both=True)
    shares = "shares of scan\nand model: each alone\nis a random number"
    axes.text(5, 6.7, shares, ha="center", va="top", fontsize=9, color=SECRET)
    _arrow(axes, (4.0, 3.4), (2.0, 7.3), CLEAR)
    _arrow(axes, (6.0, 3.4), (8.0, 7.3), CLEAR)
    axes.text(5, 4.1, "triples", ha="center", fontsize=9, color=CLEAR)


def _box(axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.1", facecolor=colour, edgecolor=CLEAR))
    first, rest = text.split("\n", 1)
    lines = rest.count("\n") + 1
    axes.text(x, y + height / 2 - 0.3, first, ha="center", va="center", fontsize=10.5, weight="bold")
    axes.text(x, y - 0.25, rest, ha="center", va="center", fontsize=9, linespacing=1.35 if lines > 1 else 1)


def _arrow(axes, start, end, colour: str, both: bool = False) -> None:
    style = "<|-|>" if both else "-|>"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13, color=colour, linewidth=1.3))
