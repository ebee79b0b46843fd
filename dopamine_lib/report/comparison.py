"""``compare``: folders that ``reproduce`` wrote, side by side in one table and one picture.

Numbers are taken as the folders state them; ``report`` does each one's accounting again.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dopamine_lib.errors import InputError
from dopamine_lib.federation.metrics import SCORES, worst_group
from dopamine_lib.files import atomic_path
from dopamine_lib.pictures import GREY, PALETTE, SETTING_COLOURS, panels, plain_style
from dopamine_lib.report.verification import options_of, read_results, well_formed

#: What the picture shows of each row, against epsilon.
WORST = "worst_group_accuracy"
SHOWN = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", WORST: "worst subgroup's accuracy"}
#: Options that a row's name leaves out: they choose rows, say how often they were repeated, or where things lie.
UNTOLD = ("settings", "runs", "data_dir", "own")
MARKERS = "osD^vP*X<>"
#: Widths of the table's columns after the setting.
SIZES = (7, 12, 12, 6, 6, 8, 8, 12)


@dataclass(frozen=True)
class Row:
    """One setting of one folder.

    results  the folder's name: the options in which it differs from the others, as "epsilon=1", else its path
    epsilon  of one run, of the worst-off hospital's patients: the least of the accountants' bounds, each of which
             holds; None without privacy
    means    over runs, by ``SCORES`` and "worst_group_accuracy", without what is undefined or not stated
    deviations  standard deviations, likewise
    worst    the group of test images that fares worst, as "camera: B"; None where no group is recorded
    """

    results: str
    setting: str
    epsilon: float | None
    delta: float
    runs: int
    means: dict[str, float]
    deviations: dict[str, float]
    worst: str | None


def compare(paths: Sequence[str | Path]) -> list[Row]:
    """The settings of all folders, or of their ``results.json``, in the order given.

    Raises InputError for a folder given twice, and for one without results of ``reproduce``.
    """
    read = [read_results(path) for path in paths]
    if len({folder.resolve() for _, folder in read}) < len(read):
        raise InputError("a folder is given twice; give each one once")
    options = []
    for path, (results, _) in zip(paths, read, strict=True):
        try:
            options.append(options_of(results).record())
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    rows = []
    for path, (results, _), name in zip(paths, read, _names(paths, options), strict=True):
        with well_formed(str(path)):
            rows += [_row(name, setting, result) for setting, result in results["settings"].items()]
    return rows


def _names(paths: Sequence[str | Path], options: list[dict]) -> list[str]:
    """What tells each folder's options from the others', as "epsilon=1"; its path where these do not tell it apart."""
    differing = [key for key in options[0] if key not in UNTOLD and any(own[key] != options[0][key] for own in options)]
    told = [", ".join(f"{key}={'-' if own[key] is None else own[key]}" for key in differing) for own in options]
    return [own if own and told.count(own) == 1 else str(path) for path, own in zip(paths, told, strict=True)]


def _row(name: str, setting: str, result: dict) -> Row:
    worst = worst_group(result.get("group_accuracy", {}))
    stated = {"accuracy": result["test_accuracy"]} | {key: result[key] for key in SCORES if key in result}
    if worst is not None:
        stated[WORST] = result["group_accuracy"][worst]
    means, deviations = (
        {key: float(stated[key][kind]) for key in stated if stated[key][kind] is not None} for kind in ("mean", "std")
    )
    spent = result.get("epsilon_worst", result["epsilon"])
    epsilon = None if spent is None else min(value for value in spent.values() if value is not None)
    runs = len(result["test_accuracy"]["runs"])
    return Row(name, setting, epsilon, result["delta"], runs, means, deviations, worst)


def table(rows: Sequence[Row]) -> str:
    """The rows for the terminal; "-" for what is undefined, or not in a folder of an older version."""
    width = max(len("results"), *(len(row.results) for row in rows))

    def line(results, setting, *cells):
        return f"{results:{width}} {setting:8}" + "".join(
            f" {cell:>{size}}" for cell, size in zip(cells, SIZES, strict=True)
        )

    lines = [
        line("results", "setting", "epsilon", "accuracy", "balanced", "kappa", "AUROC", "sight-", "threat.", "worst"),
        line("", "", "", "%", "%", "", "", "sens. %", "spec. %", "subgroup, %"),
    ]
    for row in rows:
        lines.append(
            line(
                row.results,
                row.setting,
                "-" if row.epsilon is None else f"{row.epsilon:.2f}",
                _percent(row, "accuracy", spread=True),
                _percent(row, "balanced_accuracy", spread=True),
                *(f"{row.means[key]:.2f}" if key in row.means else "-" for key in ("quadratic_kappa", "auroc")),
                _percent(row, "sight_threatening_sensitivity"),
                _percent(row, "sight_threatening_specificity"),
                _percent(row, WORST, spread=True),
            )
            + (f"  {row.worst}" if row.worst else "")
        )
    return "\n".join(lines)


def _percent(row: Row, score: str, spread: bool = False) -> str:
    if score not in row.means:
        return "-"
    return f"{100 * row.means[score]:.1f}" + (
        f" ± {100 * row.deviations[score]:4.1f}" if spread and row.runs > 1 else ""
    )


def picture(rows: Sequence[Row]) -> Figure:
    """Accuracy, balanced accuracy and the worst subgroup's accuracy against epsilon; without privacy a dashed line.

    A setting has a colour, a folder a marker; bars are standard deviations over runs.
    """
    figure, axes = panels(len(SHOWN), 4.2, 3.6, grid=True)
    settings, folders = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("setting", "results"))
    colours = {name: SETTING_COLOURS.get(name, PALETTE[k % len(PALETTE)]) for k, name in enumerate(settings)}
    markers = {name: MARKERS[k % len(MARKERS)] for k, name in enumerate(folders)}
    for one, (score, title) in zip(axes, SHOWN.items(), strict=True):
        for setting, colour in colours.items():
            own = [row for row in rows if row.setting == setting and score in row.means]
            private = sorted((row for row in own if row.epsilon is not None), key=lambda row: row.epsilon)
            one.plot([row.epsilon for row in private], [100 * row.means[score] for row in private], color=colour)
            for row in private:
                at, bar = 100 * row.means[score], 100 * row.deviations[score]
                one.errorbar(row.epsilon, at, bar, color=colour, marker=markers[row.results], capsize=2)
            for row in own:
                if row.epsilon is None:
                    one.axhline(100 * row.means[score], color=colour, linestyle="--", linewidth=0.9)
        if any(row.epsilon is not None for row in rows):
            one.set_xscale("log")
            one.xaxis.set_major_formatter("{x:g}")
            one.xaxis.set_minor_formatter("{x:g}")
        if not any(score in row.means for row in rows):
            one.text(0.5, 0.5, "not recorded", ha="center", transform=one.transAxes)
        one.set(title=f"{title}, %", xlabel=r"$\varepsilon$ of one run")
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if len(folders) > 1:
        handles += [
            Line2D([], [], color=GREY, linestyle="", marker=marker, label=name) for name, marker in markers.items()
        ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def write_comparison(rows: Sequence[Row], out: str | Path) -> list[Path]:
    """Write ``compare.csv``, a line for each row, and ``compare.png`` into ``out``; return their paths.

    Raises InputError where they cannot be written.
    """
    out, scores = Path(out), (*SCORES, WORST)
    try:
        with atomic_path(out / "compare.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            columns = [column for score in scores for column in (score, f"{score}_std")]
            writer.writerow(["results", "setting", "epsilon", "delta", "runs", *columns, "worst_group"])
            for row in rows:
                cells = [kind.get(score) for score in scores for kind in (row.means, row.deviations)]
                writer.writerow([row.results, row.setting, row.epsilon, row.delta, row.runs, *cells, row.worst])
        with plain_style(), atomic_path(out / "compare.png") as temporary:
            picture(rows).savefig(temporary, dpi=150)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another folder with --out") from error
    return [out / "compare.csv", out / "compare.png"]
