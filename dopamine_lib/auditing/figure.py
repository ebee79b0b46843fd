"""One picture: the accountants' upper bounds on epsilon beside the lower bound of an audit."""

from matplotlib.figure import Figure

from dopamine_lib.errors import InputError
from dopamine_lib.pictures import BLACK, BLUE, LIGHT_GREY, RED

MARKS = {"rdp_classic": ("|", "classic RDP"), "rdp": ("2", "improved RDP"), "prv": ("D", "PRV"), "pld": ("3", "PLD")}


def draw_bounds(rows: list[dict], *, title: str = "empirical and accounted epsilon") -> Figure:
    """One line per row, from the lower to the smallest upper bound: the true epsilon lies on it, but for bad luck.

    rows  dicts with "name", "lower" (an audit's bound, or None) and "claimed" (epsilon by accountant, or None)
    Raises InputError without rows.
    """
    if not rows:
        raise InputError("there is nothing to draw: give at least one row")
    rows = [
        row | {"claimed": {key: value for key, value in row["claimed"].items() if value is not None}} for row in rows
    ]
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        lower, least = row["lower"], min(row["claimed"].values())
        broken = lower is not None and lower > least
        axes.plot([lower or 0, least], [place, place], color=RED if broken else LIGHT_GREY, linewidth=5, zorder=1)
        for accountant, value in row["claimed"].items():
            axes.plot([value], [place], MARKS[accountant][0], color=BLUE, markersize=9, markeredgewidth=1.5)
        if lower is not None:
            axes.plot([lower], [place], "o", color=RED if broken else BLACK, markersize=7)
    for accountant in [key for key in MARKS if any(key in row["claimed"] for row in rows)]:
        mark, name = MARKS[accountant]
        axes.plot([], [], mark, color=BLUE, label=f"at most, accounted ({name})")
    axes.plot([], [], "o", color=BLACK, label="at least, audited")
    if any(row["lower"] is not None and row["lower"] > min(row["claimed"].values()) for row in rows):
        axes.plot([], [], "o", color=RED, label="at least, audited: more than was accounted")
    axes.set(xlabel="epsilon", title=title, xlim=(0, None))
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure
