"""The main job: settings times runs, with checkpoints, ``results.json``, ``figure1.png`` and a table.

Runs do not depend on each other, so processes of a ``pool`` share them out where the machine has the cores.
"""

import contextlib
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from dopamine_lib.federation.experiment import Experiment, Options
from dopamine_lib.federation.run_folder import check_out, claim, run_files, write_json, writing
from dopamine_lib.federation.settings import EPOCHS
from dopamine_lib.federation.statement import privacy_statement
from dopamine_lib.federation.training import Training
from dopamine_lib.files import atomic_path
from dopamine_lib.machine import keep_freed_memory, threads
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint, save_model
from dopamine_lib.pool import WorkerPool, fitting_workers
from dopamine_lib.privacy.accounting import ACCOUNTANTS

#: The settings by how long they take: so that workers end at about the same time.
LONGEST_FIRST = ("FSCDP", "FPDP", "CDP", "F", "C")
#: Seconds to wait for a run that somebody is in: the worker of a killed process needs a moment to notice.
PATIENCE = 10.0


def run_setting(
    experiment: Experiment, name: str, run: int, checkpoint: Path | None = None, advance=lambda epochs: None
) -> Training:
    """Train one run of one setting to its end, going on from its checkpoint where that exists.

    checkpoint  None to keep nothing
    advance     called with the number of epochs that have been done since it was last called
    """
    training = experiment.training(name, run)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, training)
    advance(training.progress.epoch)

    def save():
        if checkpoint is not None:
            save_checkpoint(checkpoint, training)

    with threads(1 if experiment.options.model == "head" else torch.get_num_threads()):
        for epoch in training.epochs(save):
            spent = training.epsilons("rdp_classic")
            training.progress.history.append(
                {
                    "epoch": epoch,
                    "accuracy": experiment.accuracy(training),
                    "epsilon_rdp_classic": float(np.mean(spent)) if spent else None,
                }
            )
            advance(1)
    return training


def run_record(experiment: Experiment, training: Training) -> dict:
    """What is kept of a finished run: its scores on the test images, its history and what was charged."""
    from sklearn.metrics import accuracy_score, cohen_kappa_score, recall_score

    truth, predicted = experiment.dataset.labels[experiment.test], experiment.predictions(training)
    grades = list(range(len(experiment.dataset.grades)))
    recall = recall_score(truth, predicted, labels=grades, average=None, zero_division=0)
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "quadratic_kappa": float(cohen_kappa_score(truth, predicted, weights="quadratic", labels=grades)),
        "recall_per_grade": recall.tolist(),
        "charged": [ledger.charged for ledger in training.ledgers],
        "aborted": training.progress.aborted,
        "history": training.progress.history,
    }


def _spread(values) -> dict:
    values = [float(value) for value in values]
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "runs": values,
    }


def setting_result(experiment: Experiment, name: str, records: list[dict], said: dict, spent: dict) -> dict:
    """The part of ``results.json`` that belongs to one setting.

    said  what ``promise`` says at the steps of the worst-off ledger;  spent  epsilons by number of steps
    """
    declared, options = experiment.setting(name), experiment.options
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
        "delta": options.delta,
        "noise_multiplier": declared.noise_multiplier,
        "sample_rate": declared.sample_rate,
        "steps": declared.steps,
        "test_accuracy": _spread(record["accuracy"] for record in records),
        "quadratic_kappa": _spread(record["quadratic_kappa"] for record in records),
        "recall_per_grade": np.mean([record["recall_per_grade"] for record in records], axis=0).tolist(),
        "choice": {key: None if value == math.inf else value for key, value in asdict(experiment.choice(name)).items()},
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


def statement_for(experiment: Experiment, name: str, steps: int) -> str:
    """The privacy statement of a setting after ``steps`` noisy steps of its worst-off hospital."""
    return privacy_statement(
        experiment.bound(name),
        steps=steps,
        patients=len(experiment.train),
        seeded=experiment.options.seed is not None,
        aggregation=experiment.options.aggregation,
    )


def promise(experiment: Experiment, name: str, steps: int) -> dict:
    """The statement of a setting after so many steps, and epsilons by adversary; None where nothing is private."""
    adversaries = experiment.bound(name).adversaries(steps) if experiment.setting(name).private else None
    return {"statement": statement_for(experiment, name, steps), "adversaries": adversaries}


def finished_run(experiment: Experiment, name: str, run: int, out: Path, advance) -> dict:
    """The record of one run: read if finished, else trained to its end and written with the model."""
    done, checkpoint, lock = run_files(out, name, run)
    done.parent.mkdir(exist_ok=True)
    with FileLock(lock, timeout=PATIENCE):
        if done.exists():
            advance(EPOCHS)
        else:
            training = run_setting(experiment, name, run, checkpoint, advance)
            record = run_record(experiment, training)
            statement = statement_for(experiment, name, max(record["charged"], default=0))
            training.task.load(training.server.model)
            save_model(out / f"{name}-{run}.safetensors", training.task.net, experiment.metadata(name, statement))
            write_json(done, record)
        checkpoint.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    return json.loads(done.read_text())


def do_job(experiment: Experiment, out: Path, job: dict, advance):
    """One job of the pool.

    ``{"run": [name, run]}`` gives its record, ``{"promise": [name, steps]}`` what ``promise`` says, and
    ``{"spent": [name, steps]}`` epsilons.
    """
    if "run" in job:
        return finished_run(experiment, *job["run"], out, advance)
    if "promise" in job:
        return promise(experiment, *job["promise"])
    name, steps = job["spent"]
    return experiment.bound(name).epsilons(steps)


@contextlib.contextmanager
def shared_jobs(told: dict):
    """A worker of the pool: ``do_job`` for the introduction's experiment and folder, on one thread."""
    options, out = told["options"] | {"settings": tuple(told["options"]["settings"])}, Path(told["out"])
    with threads(1), writing(out):
        # its features are in the cache: the process that asks has extracted them
        experiment = Experiment(Options(**options), progress=False)
        yield lambda job, advance: do_job(experiment, out, job, advance)


def reproduce(
    options: Options, out, *, resume: bool = False, progress: bool = True, workers: int | None = None
) -> dict:
    """Run the settings and write ``results.json``, ``figure1.png`` and the models into ``out``; return the results.

    workers  processes that train at the same time; 1 for this one alone, None for what suits the machine. They
             change no number: every run draws from streams of its own.
    Raises InputError for bad options, missing data, or an ``out`` that holds another run.
    """
    from dopamine_lib.reproduction.figure1 import figure1

    if options.model != "head":
        keep_freed_memory()
    out, began = Path(out), time.perf_counter()
    runs = [(name, run) for run in range(options.runs) for name in sorted(options.settings, key=LONGEST_FIRST.index)]
    asked = json.loads(json.dumps(asdict(options)))
    check_out(out, asked, resume)
    if workers is None:  # a larger model keeps every core busy by itself
        unfinished = sum(not run_files(out, *run)[0].exists() for run in runs)
        workers = fitting_workers(unfinished) if options.model == "head" else 1
    with contextlib.ExitStack() as stack:
        pool = None
        if workers > 1:  # they load their libraries while this process reads the data
            pool = stack.enter_context(WorkerPool(shared_jobs, workers))
        experiment = Experiment(options, progress=progress)
        if pool is not None:
            pool.introduce({"options": asked, "out": str(out)})
        # a file of the same name with other weights is another experiment
        asked["weights_sha256"] = experiment.weights.sha256
        stack.enter_context(writing(out))
        stack.enter_context(claim(out, asked, resume))
        bar = stack.enter_context(
            tqdm(total=len(runs) * EPOCHS, desc=f"{len(runs)} runs", unit="epoch", disable=None if progress else True)
        )

        def do(jobs: list[dict]) -> list:
            return pool.run(jobs, bar.update) if pool else [do_job(experiment, out, job, bar.update) for job in jobs]

        records = dict(zip(runs, do([{"run": run} for run in runs]), strict=True))
        results = _results(experiment, asked, records, do)
        results["seconds"] = round(time.perf_counter() - began, 1)
        write_json(out / "results.json", results)
        with atomic_path(out / "figure1.png") as temporary:
            figure1(results).savefig(temporary, dpi=150)
    return results


def _results(experiment: Experiment, asked: dict, records: dict[tuple, dict], do) -> dict:
    """``results.json``, from the records of the runs by (setting, run); ``do`` has jobs done."""
    options, weights = experiment.options, experiment.weights
    of = {name: [records[name, run] for run in range(options.runs)] for name in options.settings}
    charged = {name: {steps for record in own for steps in record["charged"]} for name, own in of.items()}
    worst = [(name, max(steps, default=experiment.setting(name).steps)) for name, steps in charged.items()]
    pairs = [(name, steps) for name, own in charged.items() for steps in sorted(own)]
    answers = iter(do([{"promise": pair} for pair in worst] + [{"spent": pair} for pair in pairs]))
    promises = {name: next(answers) for name, _ in worst}
    spent = {name: {} for name in of}
    for name, steps in pairs:
        spent[name][steps] = next(answers)
    settings = {name: setting_result(experiment, name, own, promises[name], spent[name]) for name, own in of.items()}
    return {
        "data": options.data,
        "model": options.model,
        "weights": weights.source,
        "weights_sha256": weights.sha256,
        "delta": options.delta,
        "patients": {"train": len(experiment.train), "test": len(experiment.test)},
        "hospitals": experiment.sizes,
        "randomness": "operating system" if options.seed is None else f"seeded with {options.seed}: for teaching only",
        "options": asked,
        "settings": settings,
    }


def table(results: dict) -> str:
    """The results as a table for the terminal, beside the accuracies of the paper's Figure 1."""
    from dopamine_lib.reproduction.figure1 import paper_figure1

    published = paper_figure1()
    lines = [
        f"{'setting':8} {'accuracy':>14} {'kappa':>6}   {'epsilon':>7} {'improved':>8} {'PRV':>6}   {'paper':>6}",
        f"{'':8} {'%':>14} {'':>6}   {'classic':>7} {'':>8} {'':>6}   {'%':>6}",
    ]
    for name, result in results["settings"].items():
        accuracy, bound = result["test_accuracy"], result["epsilon"]
        numbers = ["-" if bound is None or bound[key] is None else f"{bound[key]:.2f}" for key in ACCOUNTANTS]
        percent, kappa = (
            f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:4.1f}",
            result["quadratic_kappa"]["mean"],
        )
        lines.append(
            f"{name:8} {percent:>14} {kappa:6.2f}   {numbers[0]:>7} {numbers[1]:>8} {numbers[2]:>6}"
            f"   {published[name][-10:].mean():6.1f}"
        )
    lines.append(
        f"{results['data']}, {results['model']} ({results['weights']}), delta = {results['delta']:g}; "
        "paper: APTOS-2019, mean of its last ten epochs"
    )
    return "\n".join(lines)
