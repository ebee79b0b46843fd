"""The main job: settings times runs, with checkpoints, ``results.json``, ``figure1.png`` and a table."""

import contextlib
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dopamine_lib.checkpoints import load_checkpoint, save_checkpoint, save_model
from dopamine_lib.errors import InputError
from dopamine_lib.experiment import Experiment, Options
from dopamine_lib.federation.settings import EPOCHS
from dopamine_lib.federation.statement import privacy_statement
from dopamine_lib.federation.training import Training
from dopamine_lib.files import atomic_path
from dopamine_lib.privacy.accounting import ACCOUNTANTS


@contextlib.contextmanager
def threads(count: int):
    """Run with so many torch threads: a small model is faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_setting(experiment: Experiment, name: str, run: int, *, checkpoint: Path | None = None, bar=None) -> Training:
    """Train one run of one setting to its end, going on from ``checkpoint`` where that exists."""
    training = experiment.training(name, run)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, training)
    if bar is not None:
        bar.update(training.progress.epoch)
    save = (lambda: save_checkpoint(checkpoint, training)) if checkpoint is not None else (lambda: None)
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
            if bar is not None:
                bar.update()
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


def setting_result(experiment: Experiment, name: str, records: list[dict]) -> dict:
    """The part of ``results.json`` that belongs to one setting."""
    declared, options, bound = experiment.setting(name), experiment.options, experiment.bound(name)
    charged = [steps for record in records for steps in record["charged"]]
    spent = {steps: bound.epsilons(steps) for steps in set(charged)}
    worst = max(charged, default=declared.steps)
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
        "statement": statement_for(experiment, name, worst),
    }
    if declared.private:
        result["epsilon"] = {key: _mean([spent[steps][key] for steps in charged]) for key in ACCOUNTANTS}
        if not declared.shared_noise:
            result["epsilon_worst"] = spent[worst]
        result["adversaries"] = bound.adversaries(worst)
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


def _write_json(path: Path, value) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _check_out(out: Path, asked: dict, resume: bool) -> None:
    """Raise InputError where ``out`` holds another run, or this one without ``--resume``."""
    note = out / "options.json"
    if not note.exists():
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file; choose a directory")
        return
    if not resume:
        raise InputError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    try:
        begun = json.loads(note.read_text())
    except ValueError as error:
        raise InputError(f"{note} cannot be read; choose another --out") from error
    for key in asked:
        if begun.get(key) != asked[key]:
            raise InputError(
                f"{out} was begun with {key} = {begun.get(key)}, not {asked[key]}; resume with the same options"
            )


@contextlib.contextmanager
def _claim(out: Path, asked: dict, resume: bool):
    """Keep ``out`` for this process: two that resume one run would spend its budget twice."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            _check_out(out, asked, resume)
            for torn in [*out.glob(".*-*.*"), *out.glob("runs/.*-*.*")]:  # what a killed process was writing
                torn.unlink()
            _write_json(out / "options.json", asked)
            yield
    except Timeout as error:
        raise InputError(f"another process is at work in {out}; wait for it, or choose another --out") from error
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}); choose another directory") from error


def _finished_run(experiment: Experiment, name: str, run: int, out: Path, bar) -> dict:
    """The record of one run: read if it is finished, else trained to its end and written with its model."""
    done, checkpoint = (out / "runs" / f"{name}-{run}{suffix}" for suffix in (".json", ".safetensors"))
    if done.exists():
        bar.update(EPOCHS)
        return json.loads(done.read_text())
    training = run_setting(experiment, name, run, checkpoint=checkpoint, bar=bar)
    record = run_record(experiment, training)
    statement = statement_for(experiment, name, max(record["charged"], default=0))
    training.task.load(training.server.model)
    save_model(out / f"{name}-{run}.safetensors", training.task.net, experiment.metadata(name, statement))
    _write_json(done, record)
    checkpoint.unlink(missing_ok=True)
    return record


def reproduce(options: Options, out, *, resume: bool = False, progress: bool = True) -> dict:
    """Run the settings and write ``results.json``, ``figure1.png`` and the models into ``out``; return the results.

    Raises InputError for bad options, missing data, or an ``out`` that holds another run.
    """
    from dopamine_lib.figures import figure1

    out, began = Path(out), time.perf_counter()
    asked = json.loads(json.dumps(asdict(options)))
    _check_out(out, asked, resume)
    experiment = Experiment(options, progress=progress)
    # a file of the same name with other weights is another experiment
    asked["weights_sha256"] = experiment.weights.sha256
    results = {
        "data": options.data,
        "model": options.model,
        "weights": experiment.weights.source,
        "weights_sha256": experiment.weights.sha256,
        "delta": options.delta,
        "patients": {"train": len(experiment.train), "test": len(experiment.test)},
        "hospitals": [len(own) for own in experiment.patients],
        "randomness": "operating system" if options.seed is None else f"seeded with {options.seed}: for teaching only",
        "options": asked,
        "settings": {},
    }
    total = len(options.settings) * options.runs * EPOCHS
    with _claim(out, asked, resume), tqdm(total=total, unit="epoch", disable=None if progress else True) as bar:
        for name in options.settings:
            records = []
            for run in range(options.runs):
                bar.set_description(f"{name}, run {run + 1} of {options.runs}")
                records.append(_finished_run(experiment, name, run, out, bar))
            results["settings"][name] = setting_result(experiment, name, records)
        results["seconds"] = round(time.perf_counter() - began, 1)
        _write_json(out / "results.json", results)
        with atomic_path(out / "figure1.png") as temporary:
            figure1(results).savefig(temporary, dpi=150)
    return results


def table(results: dict) -> str:
    """The results as a table for the terminal, beside the accuracies of the paper's Figure 1."""
    from dopamine_lib.figures import paper_figure1

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
