"""What all pictures share: one palette, figures of equal make, and sliders above a picture."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

if TYPE_CHECKING:
    import ipywidgets
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import Image

#: Colours that stay apart for colour-blind readers (Okabe and Ito, 2008), and greys. RED is what they call vermilion.
BLACK, BLUE, RED, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
LIGHT_GREY, GREY, DARK_GREY = "#bbbbbb", "#999999", "#777777"
#: Dots per inch of an explorer's picture, of which a screen shows 100.
FINE = 144
#: For up to eight groups or lines, in this order.
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
#: A setting has one colour in every picture.
SETTING_COLOURS = {"C": BLACK, "CDP": BLUE, "F": GREY, "FPDP": RED, "FSCDP": GREEN}


@contextlib.contextmanager
def plain_style() -> Iterator[None]:
    """Draw as matplotlib does by itself, for files: a user's ``matplotlibrc`` may ask for a LaTeX that is not there."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def setting_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each setting: its own in every picture, or one that none of the paper's five has.

    >>> setting_colours(["FSCDP", "mine"]) == {"FSCDP": GREEN, "mine": PURPLE}
    True
    """
    others = itertools.cycle((PURPLE, ORANGE, SKY, LIGHT_GREY, DARK_GREY))
    return {name: SETTING_COLOURS[name] if name in SETTING_COLOURS else next(others) for name in names}


def shades(count: int) -> list[str]:
    """A colour for each of ``count`` grades, from light to dark, so that print without colours keeps their order.

    >>> shades(5)[0], shades(5)[-1]
    ('#fee838', '#00224e')
    """
    scale = matplotlib.colormaps["cividis"].reversed()
    return [matplotlib.colors.to_hex(scale(place)) for place in np.linspace(0, 1, count)]


def panels(
    count: int = 1, width: float = 4.6, height: float = 3.2, *, grid: bool = False
) -> tuple[Figure, np.ndarray[Axes]]:
    """An empty figure of ``count`` panels in a row, each of this width and height in inches, and its axes (count,).

    >>> figure, (left, right) = panels(2)
    >>> left.set_title("before"), right.set_title("after")
    (Text(0.5, 1.0, 'before'), Text(0.5, 1.0, 'after'))
    """
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    if grid:
        for one in axes:
            one.grid(alpha=0.3)
    return figure, axes


def explorer_panel(height: float = 0.73) -> tuple[Figure, Axes]:
    """A small figure with fixed margins, because a layout engine would draw everything twice.

    height  of the axes, as a share of the figure's
    """
    figure = Figure(figsize=(5.5, 3.2))
    return figure, figure.add_axes((0.12, 0.16, 0.85, height))


def ticks(axis: Axis, *values: float) -> None:
    """Plain labels at these values alone of a logarithmic axis; labels are what takes the time of a small picture."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_minor_locator(NullLocator())


def png(figure: Figure, dpi: int = 72) -> bytes:
    """The picture as a PNG file, drawn once (Jupyter's own display measures, then draws again)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 6 if dpi < FINE else 1})
    return buffer.getvalue()


def describe(figure: Figure) -> str:
    """A figure in words, for those who do not see it: its label, or what is written on its axes and in its legends.

    >>> figure, (axes,) = panels()
    >>> _ = axes.plot([0, 1], [0, 1], label="spent"), axes.set(xlabel="steps", ylabel="epsilon", title="budget")
    >>> describe(figure)
    'A picture. Panel "budget": epsilon against steps; shown: spent.'
    """
    if figure.get_label():
        return figure.get_label()
    words = [_panel_in_words(axes) for axes in figure.axes]
    bare = words.count("Panel.")
    others = f"{bare} {'panel' if bare == 1 else 'panels'} with nothing written on {'it' if bare == 1 else 'them'}."
    return " ".join(["A picture.", *(said for said in words if said != "Panel."), *[others] * bool(bare)])


def as_image(figure: Figure) -> Image:
    """The picture for a notebook, small enough for one with many, with ``describe`` as its alternative text."""
    from IPython.display import Image

    return Image(png(figure), alt=describe(figure))


def _panel_in_words(axes: Axes) -> str:
    across, up = axes.get_xlabel(), axes.get_ylabel()
    named = [name for name in axes.get_legend_handles_labels()[1] if name]
    title = f' "{axes.get_title()}"' if axes.get_title() else ""
    said = " against ".join(filter(None, (up, across)))
    shown = f"; shown: {', '.join(dict.fromkeys(named))}" if named else ""
    return " ".join(f"Panel{title}{': ' * bool(said)}{said}{shown}.".split())


def load_ipython_extension(shell: InteractiveShell) -> None:
    """``%load_ext dopamine_lib.pictures`` is ``%matplotlib inline``, and gives each figure ``describe`` to read aloud.

    It stands as the picture's alternative text in the notebook's own output.
    """
    shell.run_line_magic("matplotlib", "inline")
    formatters = shell.display_formatter.formatters
    drawn = formatters["image/png"].lookup_by_type(Figure)

    def described(figure: Figure) -> tuple:
        picture = drawn(figure)
        data, metadata = picture if isinstance(picture, tuple) else (picture, {})
        return data, {**metadata, "alt": describe(figure)}

    formatters["image/png"].for_type(Figure, described)
    formatters["text/plain"].for_type(Figure, lambda figure, printer, cycle: printer.text(describe(figure)))


def explorer(draw: Callable[..., Figure], **sliders: ipywidgets.ValueWidget) -> ipywidgets.VBox:
    """Sliders above the picture that ``draw(**values)`` returns, redrawn when a slider is let go.

    Nothing here has a tooltip: JupyterLab shows no Image, and no box, that has one (ipywidgets 8.1).
    """
    import ipywidgets

    image = ipywidgets.Image(format="png")

    def redraw(_=None):
        figure = draw(**{name: slider.value for name, slider in sliders.items()})
        image.value, image.width = png(figure, FINE), str(round(figure.get_figwidth() * 100))

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*sliders.values(), image])
