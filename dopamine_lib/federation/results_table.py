"""The results as a table for the terminal, beside what the paper's Figure 1 shows."""

import csv
import math
from importlib.resources import files

import numpy as np

from dopamine_lib.data.dataset import GRADES
from dopamine_lib.federation.metrics import SCREENING
from dopamine_lib.privacy.accounting import ACCOUNTANTS


def paper_figure1() -> dict[str, np.ndarray]:
    """Figure 1's upper panel, read off the paper's picture: ``epoch`` and, per setting, accuracy in % (99,)."""
    with files("dopamine_lib").joinpath("assets/figure1_accuracy.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def on_the_papers_task(results: dict) -> bool:
    """Whether the results are of the five grades of diabetic retinopathy, so that Figure 1 may stand beside them."""
    return tuple(results.get("grades", GRADES)) == GRADES


def table(results: dict) -> str:
    """The results as a table for the terminal, beside the accuracies of the paper's Figure 1 where these are grades.

    Epsilon is that of the worst-off hospital's patients; where hospitals differ, their mean follows in a line of its
    own, and then what the folder spends as a whole. Below stand the scores that accuracy hides.
    """
    published = paper_figure1() if on_the_papers_task(results) else {}
    names = [*results["settings"], *(record["setting"] for record in results.get("unfinished", []))]
    wide = max(8, *map(len, names))
    lines = [
        f"{'setting':{wide}} {'accuracy':>14} {'balanced':>8} {'kappa':>6}   {'epsilon':>7} {'improved':>8} {'PRV':>6} "
        f"{'PLD':>6}   {'paper' if published else '':>6}",
        f"{'':{wide}} {'%':>14} {'%':>8} {'':>6}   {'classic':>7} {'':>24}   {'%' if published else '':>6}",
    ]
    for name, result in results["settings"].items():
        accuracy = result["test_accuracy"]
        over_runs = f" ± {100 * accuracy['std']:4.1f}" if len(accuracy["runs"]) > 1 else ""
        percent = f"{100 * accuracy['mean']:.1f}{over_runs}"
        balanced, kappa = _cell(result, "balanced_accuracy", 8, 100), _cell(result, "quadratic_kappa", 6)
        paper = f"{published[name][-10:].mean():.1f}" if name in published else ""
        worst = _numbers(result.get("epsilon_worst", result["epsilon"]))
        lines.append(f"{name:{wide}} {percent:>14} {balanced} {kappa}   {worst}   {paper:>6}".rstrip())
        if "epsilon_worst" in result:
            lines[-1] += "   worst hospital"
            lines.append(f"{'':{wide}} {'':>30}   {_numbers(result['epsilon'])}   {'':>6}   mean over hospitals")
    for record in results.get("unfinished", []):
        reached = record["history"][-1:] or [{"epoch": 0, "accuracy": math.nan}]
        lines.append(
            f"{record['setting']:{wide}} {100 * reached[0]['accuracy']:7.1f}          "
            f"after {reached[0]['epoch']} of {record['epochs']} epochs; --resume goes on"
        )
    folder = results["folder"]
    if folder["epsilon_private"] is not None:
        noised = [name for name, result in results["settings"].items() if result["epsilon"] is not None]
        noised += [record["setting"] for record in results.get("unfinished", []) if record["charged"]]
        private = ", ".join(dict.fromkeys(noised))
        lines.append(f"{'together':{wide}} {'':>30}   {_numbers(folder['epsilon_private'])}   all runs of {private}")
    for name, result in results["settings"].items():
        if own := result.get("own_accountant"):
            number = "no bound" if own["epsilon"] is None else f"epsilon {own['epsilon']:.2f}"
            lines.append(f"{name:{wide}} by {own['name']}, which is not checked here: {number}")
    lines += _scores_table(results["settings"], wide)
    for name, result in results["settings"].items():
        for what, found in result.get("operating_point", {}).items():
            sensitivity, specificity = (_cell(found, key, 0, 100) for key in ("sensitivity", "specificity"))
            lines.append(
                f"{name:{wide}} {what.replace('_', '-')}, called beyond severity {_cell(found, 'threshold', 0)}: "
                f"sens. {sensitivity} %, spec. {specificity} %"
            )
    if results.get("groups_left_out"):
        lines.append(f"groups without a score of their own: {'; '.join(results['groups_left_out'])}")
    lines.append(
        f"{results['data']}, {results['model']} ({results['weights']}), delta = {results['delta']:g}"
        + ("; paper: APTOS-2019, mean of its last ten epochs" if published else "")
    )
    return "\n".join([*lines, "this folder: " + folder["verdict"]])


def _scores_table(settings: dict, wide: int) -> list[str]:
    """Lines with AUROC and what screening is for: of the settings that have them, and none where no setting has."""
    screened = [what for what in SCREENING if any(f"{what}_auroc" in result for result in settings.values())]
    titles = "".join(f"   {what.replace('_', '-'):>21}" for what in screened)
    lines = [
        f"{'setting':{wide}} {'AUROC':>6}{titles}",
        f"{'':{wide}} {'':>6}" + f"   {'sens. %':>7} {'spec. %':>7} {'AUROC':>5}" * len(screened),
    ]
    for name, result in settings.items():
        if "auroc" in result:
            line = f"{name:{wide}} {_cell(result, 'auroc', 6)}"
            for what in screened:
                shares = " ".join(_cell(result, f"{what}_{score}", 7, 100) for score in ("sensitivity", "specificity"))
                line += f"   {shares} {_cell(result, f'{what}_auroc', 5)}"
            lines.append(line)
    return [line.rstrip() for line in lines if line.strip()] if len(lines) > 2 else []


def _cell(result: dict, score: str, width: int, unit: int = 1) -> str:
    """A score's mean as a cell of the table, in per cent where ``unit`` is 100; "-" where it is undefined."""
    mean = result[score]["mean"] if score in result else None
    return f"{'-' if mean is None else format(unit * mean, '.1f' if unit == 100 else '.2f'):>{width}}"


def _numbers(bound: dict[str, float | None] | None) -> str:
    """Epsilon in the table's columns, one for each accountant."""
    numbers = [(bound or {}).get(key) for key in ACCOUNTANTS]
    cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
    return f"{cells[0]:>7} {cells[1]:>8} {cells[2]:>6} {cells[3]:>6}"
