"""What a finished run leaves: its record, and ``results.json``, put together for one process and for MPI alike."""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files

import numpy as np

from dopamine_lib.data import PATIENTS
from dopamine_lib.data.dataset import GRADES
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.release import release
from dopamine_lib.federation.settings import EPOCHS, SETTINGS
from dopamine_lib.federation.statement import privacy_statement
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.accounting import ACCOUNTANTS


def epoch_record(experiment: Experiment, training: Training) -> dict:
    """An epoch's entry in the history: accuracy on the test images, and epsilon spent, as a mean over hospitals."""
    spent = training.epsilons("rdp_classic")
    return {
        "epoch": training.progress.epoch,
        "accuracy": experiment.accuracy(training),
        "epsilon_rdp_classic": float(np.mean(spent)) if spent else None,
    }


def run_record(experiment: Experiment, training: Training) -> dict:
    """What is kept of a finished run: its scores on the test images, its history and what was charged.

    Balanced accuracy is the mean recall of the classes that the test images have.
    """
    from sklearn.metrics import accuracy_score, cohen_kappa_score, recall_score

    truth, predicted = experiment.dataset.labels[experiment.test], experiment.predictions(training)
    grades = list(range(len(experiment.dataset.grades)))
    recall = recall_score(truth, predicted, labels=grades, average=None, zero_division=0)
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "balanced_accuracy": float(recall[np.unique(truth)].mean()),
        "quadratic_kappa": float(cohen_kappa_score(truth, predicted, weights="quadratic", labels=grades)),
        "recall_per_grade": recall.tolist(),
        "charged": [ledger.charged for ledger in training.ledgers],
        "aborted": training.progress.aborted,
        "history": training.progress.history,
    }


def statement_for(experiment: Experiment, name: str, charged: Sequence[int], *, apart: bool = False) -> str:
    """The privacy statement of a setting whose ledgers were charged these noisy steps.

    apart  whether every party was a process of its own
    """
    plan, options = experiment.plan(name), experiment.options
    return privacy_statement(
        plan.bound,
        charged=charged,
        patients=plan.population,
        counted=experiment.counted,
        seeded=options.seed is not None,
        data=options.data,
        persons=experiment.dataset.sheet.persons,
        model=options.model,
        replaced=len(experiment.replaced),
        aggregation=options.aggregation,
        apart=apart,
    )


def do_account(experiment: Experiment, job: dict, *, apart: bool = False) -> dict:
    """One job of accounting, after the steps charged to the ledgers of a run, or of several.

    {"worst": [name, charged]}   the statement, and epsilons by adversary (None without privacy)
    {"spent": [name, steps]}     epsilons by accountant
    {"folder": {name: [charged, …]}}  what all runs of all settings spend together: ``release``
    """
    if "spent" in job:
        name, steps = job["spent"]
        return experiment.plan(name).bound.epsilons(steps)
    if "folder" in job:
        bounds = {name: experiment.plan(name).bound for name in job["folder"]}
        return release(bounds, job["folder"], seeded=experiment.options.seed is not None)
    name, charged = job["worst"]
    plan, in_clear = experiment.plan(name), apart and experiment.options.aggregation == "plain"
    adversaries = plan.bound.adversaries(max(charged), in_clear) if plan.setting.private else None
    return {"statement": statement_for(experiment, name, charged, apart=apart), "adversaries": adversaries}


def assemble(
    experiment: Experiment,
    asked: dict,
    records: dict[str, list[dict]],
    account: Callable[[list[dict]], Iterable],
    *,
    begun: dict[str, list[dict]] | None = None,
    randomness: str = "operating system",
) -> dict:
    """``results.json``, from the records of each setting's runs.

    asked       the options as plain data
    account     does jobs of ``do_account``, in order
    begun       "charged" and "history" of runs that have not come to their end: the folder spends for them, too
    randomness  where it came from in an unseeded run
    Numbers of training patients are the declared ones; "counted" says whether that is their count.
    """
    options, begun = experiment.options, begun or {}
    records = {name: own for name, own in records.items() if own}
    charged = {name: [record["charged"] for record in own] for name, own in records.items()}
    every = {name: sum(own, []) for name, own in charged.items()}
    pairs = [(name, steps) for name, own in every.items() for steps in sorted(set(own))]
    folder = {
        name: charged.get(name, []) + [record["charged"] for record in begun.get(name, [])] for name in options.settings
    }
    jobs = [
        {"folder": {name: own for name, own in folder.items() if own}},
        *({"worst": pair} for pair in every.items()),
        *({"spent": pair} for pair in pairs),
    ]
    folder, *answers = account(jobs)
    said, spent = dict(zip(records, answers, strict=False)), {name: {} for name in records}
    for (name, steps), answer in zip(pairs, answers[len(records) :], strict=True):
        spent[name][steps] = answer
    return {
        "data": options.data,
        "model": options.model,
        "parameters": experiment.plan(next(iter(records))).d,
        "group_norm_for_batch_norm": list(experiment.replaced),
        "weights": experiment.weights.source,
        "weights_sha256": experiment.weights.sha256,
        "delta": options.delta,
        "grades": list(experiment.dataset.grades),
        "inputs": len(experiment.dataset.inputs),
        "persons": PATIENTS.get(options.data, experiment.dataset.sheet.persons),
        "patients": {"train": sum(experiment.sizes), "test": len(experiment.test), "counted": experiment.counted},
        "hospitals": list(experiment.sizes),
        "randomness": randomness if options.seed is None else f"seeded with {options.seed}: for teaching only",
        "options": asked,
        "folder": folder,
        "settings": {
            name: _setting_result(experiment, name, own, said[name], spent[name]) for name, own in records.items()
        },
        "unfinished": [
            {"setting": name, "charged": record["charged"], "history": record["history"]}
            for name, own in begun.items()
            for record in own
        ],
    }


def _setting_result(experiment: Experiment, name: str, records: list[dict], said: dict, spent: dict) -> dict:
    """The part of ``results.json`` that belongs to one setting.

    said   statement and adversaries at the steps of the worst-off ledger;  spent  epsilons by number of steps
    """
    plan = experiment.plan(name)
    declared = plan.setting
    charged = [steps for record in records for steps in record["charged"]]
    history = []
    for epoch in zip(*(record["history"] for record in records), strict=False):
        accuracy = _spread(record["accuracy"] for record in epoch)
        classic = [record["epsilon_rdp_classic"] for record in epoch]
        history.append(
            {
                "epoch": epoch[0]["epoch"],
                "accuracy_mean": accuracy["mean"],
                "accuracy_std": accuracy["std"],
                "epsilon_rdp_classic": float(np.mean(classic)) if declared.private else None,
            }
        )
    result = {
        "epsilon": None,
        "delta": plan.delta,
        "noise_multiplier": declared.noise_multiplier,
        "sample_rate": declared.sample_rate,
        "steps": declared.steps,
        "test_accuracy": _spread(record["accuracy"] for record in records),
        "balanced_accuracy": _spread(record["balanced_accuracy"] for record in records),
        "quadratic_kappa": _spread(record["quadratic_kappa"] for record in records),
        "recall_per_grade": np.mean([record["recall_per_grade"] for record in records], axis=0).tolist(),
        "choice": plan.choice.record(),
        "history": history,
        "statement": said["statement"],
    }
    if declared.private:
        result["epsilon"] = {key: _mean([spent[steps][key] for steps in charged]) for key in ACCOUNTANTS}
        if not declared.shared_noise:
            result["epsilon_worst"] = spent[max(charged)]
        result["adversaries"] = said["adversaries"]
        result["aborted_rounds"] = [record["aborted"] for record in records]
    return result


def _mean(values: list) -> float | None:
    return None if None in values else float(np.mean(values))


def _spread(values: Iterable[float]) -> dict:
    values = [float(value) for value in values]
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "runs": values,
    }


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
    own. Below stands what the folder spends as a whole.
    """
    published = paper_figure1() if on_the_papers_task(results) else {}
    lines = [
        f"{'setting':8} {'accuracy':>14} {'balanced':>8} {'kappa':>6}   {'epsilon':>7} {'improved':>8} {'PRV':>6} "
        f"{'PLD':>6}   {'paper' if published else '':>6}",
        f"{'':8} {'%':>14} {'%':>8} {'':>6}   {'classic':>7} {'':>8} {'':>6} {'':>6}   {'%' if published else '':>6}",
    ]
    for name, result in results["settings"].items():
        accuracy = result["test_accuracy"]
        percent = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:4.1f}"
        balanced, kappa = 100 * result["balanced_accuracy"]["mean"], result["quadratic_kappa"]["mean"]
        paper = f"{published[name][-10:].mean():.1f}" if published else ""
        worst = _numbers(result.get("epsilon_worst", result["epsilon"]))
        lines.append(f"{name:8} {percent:>14} {balanced:8.1f} {kappa:6.2f}   {worst}   {paper:>6}".rstrip())
        if "epsilon_worst" in result:
            lines[-1] += "   worst hospital"
            lines.append(f"{'':30} {'':>8}   {_numbers(result['epsilon'])}   {'':>6}   mean over hospitals")
    for record in results.get("unfinished", []):
        reached = record["history"][-1:] or [{"epoch": 0, "accuracy": math.nan}]
        lines.append(
            f"{record['setting']:8} {100 * reached[0]['accuracy']:7.1f}          "
            f"after {reached[0]['epoch']} of {EPOCHS} epochs; --resume goes on"
        )
    folder = results["folder"]
    if folder["epsilon_private"] is not None:
        begun = [record["setting"] for record in results.get("unfinished", [])]
        private = ", ".join(
            name for name, own in SETTINGS.items() if own.private and name in [*results["settings"], *begun]
        )
        lines.append(f"{'together':30} {'':>8}   {_numbers(folder['epsilon_private'])}   all runs of {private}")
    lines.append(
        f"{results['data']}, {results['model']} ({results['weights']}), delta = {results['delta']:g}"
        + ("; paper: APTOS-2019, mean of its last ten epochs" if published else "")
    )
    return "\n".join([*lines, "this folder: " + folder["verdict"]])


def _numbers(bound: dict[str, float | None] | None) -> str:
    """Epsilon in the table's columns, one for each accountant."""
    numbers = [(bound or {}).get(key) for key in ACCOUNTANTS]
    cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
    return f"{cells[0]:>7} {cells[1]:>8} {cells[2]:>6} {cells[3]:>6}"
