"""What a finished run leaves: its record, and ``results.json``, put together for one process and for MPI alike."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.metrics import SCORES, group_accuracy, left_out
from dopamine_lib.federation.options import own_accountant
from dopamine_lib.federation.release import release
from dopamine_lib.federation.statement import privacy_statement
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.accounting import ACCOUNTANTS, epsilon


def epoch_record(experiment: Experiment, training: Training) -> dict:
    """An epoch's entry in the history: scores on the test images, and epsilon spent, as a mean over hospitals."""
    spent, scores = training.epsilons("rdp_classic"), experiment.scores(training)
    del scores["recall_per_grade"]  # of the last epoch alone: a history is written once an epoch
    epsilon = float(np.mean(spent)) if spent else None
    return {"epoch": training.progress.epoch, **scores, "epsilon_rdp_classic": epsilon}


def run_record(experiment: Experiment, training: Training) -> dict:
    """What is kept of a finished run: its scores on the test images, its history and what was charged."""
    predicted = experiment.predictions(training)
    return {
        **experiment.scores(training),
        "group_accuracy": group_accuracy(experiment.dataset, experiment.test, predicted),
        "charged": [ledger.charged for ledger in training.ledgers],
        "aborted": training.progress.aborted,
        "operating_point": experiment.operating_point(training),
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
        table=bool(experiment.dataset.inputs),
        model=options.model,
        replaced=len(experiment.replaced),
        aggregation=options.aggregation,
        apart=apart,
        own=name in (options.own or {}),
        optimizer=options.optimizer,
        operating_point=plan.operating_point,
        by_own=by_own_accountant(experiment, name, charged),
    )


def by_own_accountant(experiment: Experiment, name: str, charged: Sequence[int]) -> tuple[str, float | None] | None:
    """An accountant of one's own, and its epsilon for the worst-off ledger; None where none was named, or no bound."""
    plan, accountant = experiment.plan(name), experiment.options.accountant
    function = own_accountant(accountant) if plan.bound.holds else None
    return function and (accountant, epsilon(plan.bound.events(max(charged)), plan.delta, function))


def do_account(experiment: Experiment, job: dict, *, apart: bool = False) -> dict:
    """One job of accounting, after the steps charged to the ledgers of a run, or of several.

    {"worst": [name, charged]}   the statement, and epsilons by adversary (None without a bound) and by one's own
                                 accountant
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
    return {
        "statement": statement_for(experiment, name, charged, apart=apart),
        "adversaries": plan.bound.adversaries(max(charged), in_clear) if plan.bound.holds else None,
        "own_accountant": by_own_accountant(experiment, name, charged),
    }


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
        "parameters": experiment.plan(options.settings[0]).d,
        "group_norm_for_batch_norm": list(experiment.replaced),
        "weights": experiment.weights.source,
        "weights_sha256": experiment.weights.sha256,
        "delta": options.delta,
        "grades": list(experiment.dataset.grades),
        "inputs": len(experiment.dataset.inputs),
        "persons": experiment.dataset.sheet.persons,
        "groups_left_out": left_out(experiment.dataset, experiment.test),
        "patients": {"train": sum(experiment.sizes), "test": len(experiment.test), "counted": experiment.counted},
        "hospitals": list(experiment.sizes),
        "randomness": randomness if options.seed is None else f"seeded with {options.seed}: for teaching only",
        "options": asked,
        "folder": folder,
        "settings": {
            name: _setting_result(experiment, name, own, said[name], spent[name]) for name, own in records.items()
        },
        "unfinished": [
            {
                "setting": name,
                "epochs": experiment.plan(name).setting.epochs,
                "charged": record["charged"],
                "history": record["history"],
            }
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
        accuracy = spread(record["accuracy"] for record in epoch)
        classic = [record["epsilon_rdp_classic"] for record in epoch]
        history.append(
            {
                "epoch": epoch[0]["epoch"],
                "accuracy_mean": accuracy["mean"],
                "accuracy_std": accuracy["std"],
                "epsilon_rdp_classic": float(np.mean(classic)) if plan.bound.holds else None,
            }
        )
    scores = {key: spread(record[key] for record in records) for key in SCORES if all(key in r for r in records)}
    groups = [record.get("group_accuracy", {}) for record in records]  # the same in all: they are of the test images
    result = {
        "epsilon": None,
        "delta": plan.delta,
        "noise_multiplier": declared.noise_multiplier,
        "sample_rate": declared.sample_rate,
        "rounds": declared.rounds,
        "steps": declared.steps,
        "test_accuracy": scores.pop("accuracy"),
        **scores,
        "recall_per_grade": [_mean(own) for own in zip(*(r["recall_per_grade"] for r in records), strict=True)],
        "group_accuracy": {
            key: spread(own[key] for own in groups) for key in groups[0] if all(key in g for g in groups)
        },
        "choice": plan.choice.record(),
        "history": history,
        "statement": said["statement"],
    }
    points = [record.get("operating_point") for record in records]
    if plan.operating_point is not None and all(points):
        result["operating_point"] = {
            what: {key: spread(own[what][key] for own in points) for key in points[0][what]} for what in points[0]
        }
    if plan.bound.holds:
        result["epsilon"] = {key: _mean([spent[steps][key] for steps in charged]) for key in ACCOUNTANTS}
        if not declared.shared_noise:
            result["epsilon_worst"] = spent[max(charged)]
        result["adversaries"] = said["adversaries"]
        if said["own_accountant"] is not None:
            result["own_accountant"] = dict(zip(("name", "epsilon"), said["own_accountant"], strict=True))
        result["aborted_rounds"] = [record["aborted"] for record in records]
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def spread(values: Iterable[float | None]) -> dict:
    """Mean and standard deviation of a score over runs, and each run's; without the first two if one is undefined.

    >>> spread([0.5, 0.75])["mean"]
    0.625
    """
    runs = list(values)
    if None in runs:
        return {"mean": None, "std": None, "runs": runs}
    return {"mean": float(np.mean(runs)), "std": float(np.std(runs, ddof=1)) if len(runs) > 1 else 0.0, "runs": runs}
