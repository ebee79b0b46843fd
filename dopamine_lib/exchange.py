"""An exchange between parties as a picture: a line for each party, an arrow for each message, time running down.

What is written on arrows and lines comes from whoever runs the protocol; here it is only laid out. Messages that look
random to their receiver are dashed, so the picture reads in black and white, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.pictures import BLACK, BLUE, GREY, LIGHT_GREY

#: Height in inches of a line of text, and of what stands around the lines of one event.
LINE, MARGIN = 0.15, 0.15
#: The colour of steps before the one that is looked at.
EARLIER = "#555555"


@dataclass(frozen=True)
class Event:
    """What happens in one place of an exchange.

    step    the step of the protocol that it belongs to, from 1
    sender  a party
    text    what is sent, or what the party does; may have several lines
    to      who receives it; () where the party works by itself
    hidden  whether it looks random to whoever receives it
    """

    step: int
    sender: str
    text: str
    to: tuple[str, ...] = ()
    hidden: bool = False


def draw_exchange(parties: Sequence[str], events: Sequence[Event], step: int, *, width: float = 7.6) -> Figure:
    """The events up to a step; later ones are left blank, and stay where they will be.

    width  in inches
    The picture describes itself in words: ``figure.get_label()``. Raises InputError for a step that no event has, or an
    event of a party that is not there.

    >>> events = [Event(1, "A", "adds a mask"), Event(2, "A", "x + r", to=("B",), hidden=True)]
    >>> draw_exchange(["A", "B"], events, step=2).get_label()
    'An exchange between A and B. 1: A adds a mask. 2: A to B, hidden: x + r.'
    """
    check_within("step", step, 1, max(event.step for event in events), "the exchange has no more", low_open=False)
    if strangers := {name for event in events for name in (event.sender, *event.to)} - set(parties):
        raise InputError(f"{', '.join(sorted(strangers))} takes part in no exchange of {', '.join(parties)}: add it")
    rows = _rows(events)
    heights = [MARGIN + LINE * max(event.text.count("\n") + 1 for event in row) for row in rows]
    height = sum(heights) + 0.5
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    place = {name: width * (i + 0.5) / len(parties) for i, name in enumerate(parties)}
    for name, x in place.items():
        axes.text(x, 0.22, name, ha="center", va="center", fontsize=10, weight="bold")
        axes.plot((x, x), (0.42, height - 0.06), color=LIGHT_GREY, linewidth=1, zorder=0)
    below = 0.45
    for row, tall in zip(rows, heights, strict=True):
        for event in row:
            if event.step <= step:
                _draw(axes, event, place, below, tall, BLACK if event.step == step else EARLIER)
        below += tall
    told = " ".join(f"{event.step}: {_in_words(event)}." for event in events if event.step <= step)
    figure.set_label(f"An exchange between {', '.join(parties[:-1])} and {parties[-1]}. {told}")
    return figure


def _rows(events: Sequence[Event]) -> list[list[Event]]:
    """Parties that work by themselves in one step do so side by side; every message has a row of its own."""
    rows: list[list[Event]] = []
    for event in events:
        last = rows[-1] if rows else []
        beside = last and not event.to and all(not e.to and e.step == event.step for e in last)
        if beside and event.sender not in {e.sender for e in last}:
            last.append(event)
        else:
            rows.append([event])
    return rows


def _draw(axes: Axes, event: Event, place: dict[str, float], below: float, tall: float, colour: str) -> None:
    """One event between the heights ``below`` and ``below + tall``, which run down the page."""
    x = place[event.sender]
    text, middle = f"{event.step}.  {event.text}", x
    box = dict(facecolor="white", edgecolor=GREY if not event.to else "none", pad=1.5)
    for other in event.to:
        y = below + tall - 0.03
        style = dict(arrowstyle="-|>", color=BLUE if event.hidden else colour, linewidth=1.3, shrinkA=0, shrinkB=0)
        style["linestyle"] = (0, (4, 2)) if event.hidden else "-"
        axes.annotate("", (place[other], y), (x, y), arrowprops=style)
    if event.to:
        ends = [x, *(place[other] for other in event.to)]
        middle = (min(ends) + max(ends)) / 2
    centre = below + tall / 2 - (0.05 if event.to else 0)
    axes.text(middle, centre, text, ha="center", va="center", fontsize=8, color=colour, bbox=box, linespacing=1.2)


def _in_words(event: Event) -> str:
    text = " ".join(event.text.split())
    if not event.to:
        return f"{event.sender} {text}"
    return f"{event.sender} to {' and '.join(event.to)}{', hidden' * event.hidden}: {text}"
