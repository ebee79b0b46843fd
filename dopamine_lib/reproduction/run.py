"""The main job: settings times runs, with checkpoints, ``results.json``, ``figure1.png`` and a table.

Runs do not depend on each other, so processes of a ``pool`` share them out where the machine has the cores.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from dopamine_lib.errors import check_within
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.results import assemble, do_account, epoch_record, run_record, statement_for
from dopamine_lib.federation.run_folder import (
    check_out,
    claim,
    read_record,
    run_files,
    write_json,
    write_record,
    writing,
)
from dopamine_lib.federation.tidy import check_tensorboard, write_events, write_metrics
from dopamine_lib.federation.training import Training
from dopamine_lib.files import atomic_path
from dopamine_lib.machine import device_name, keep_freed_memory, ordinary_torch, threads
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint, save_model
from dopamine_lib.models.tables import TABLE_MODELS
from dopamine_lib.pictures import plain_style
from dopamine_lib.pool import WorkerPool, fitting_workers
from dopamine_lib.reproduction.estimate import Estimate

#: Settings of one's own first, then the paper's by how long they take, so that workers end at about the same time.
LONGEST_FIRST = ("FSCDP", "FPDP", "CDP", "F", "C")
#: The settings by how much they tell, where time may run out.
TELLING_FIRST = ("FSCDP", "C", "CDP", "FPDP", "F")
#: Models so small that a run takes one thread, and others run beside it.
ONE_THREAD = ("head", *TABLE_MODELS)
#: Seconds to wait for a run that another process holds: the worker of a killed process needs a moment to notice.
PATIENCE = 10.0
#: Is told how much has been done since it was last called: of one run epochs, of a whole job gradients.
Advance = Callable[[float], object]


def run_setting(
    experiment: Experiment,
    name: str,
    run: int,
    checkpoint: Path | None = None,
    advance: Advance = lambda epochs: None,
    deadline: float = math.inf,
) -> Training:
    """Train one run of one setting to its end, from its checkpoint where that exists.

    checkpoint  None to keep nothing
    deadline    by ``time.monotonic()``, which all processes of a machine share; the epoch in which it passes is the
                last, and is kept
    """
    training = experiment.training(name, run)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, training)
    advance(training.progress.epoch)

    def save() -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint, training)

    def after(epoch: int) -> bool:
        training.progress.history.append(epoch_record(experiment, training))
        advance(1)
        return time.monotonic() >= deadline

    training.run(save, after)
    if not training.done:
        save()
    return training


def finished_run(
    experiment: Experiment,
    name: str,
    run: int,
    out: Path,
    advance: Advance,
    deadline: float = math.inf,
    first: bool = False,
) -> dict:
    """The record of one run: read if it is finished, else trained to its end and written with the model.

    Where the deadline passes earlier, its "history" and "charged" so far, and "unfinished". A ``first`` run is begun
    even after it, so that every call comes further.
    """
    done, checkpoint, lock = run_files(out, name, run)
    if time.monotonic() >= deadline and not (first or done.exists() or checkpoint.exists()):
        return {"unfinished": True, "history": [], "charged": []}
    done.parent.mkdir(exist_ok=True)
    with FileLock(lock, timeout=PATIENCE):
        if done.exists():
            advance(experiment.options.setting(name).epochs)
        else:
            training = run_setting(experiment, name, run, checkpoint, advance, deadline)
            if not training.done:
                charged = [ledger.charged for ledger in training.ledgers]
                return {"unfinished": True, "history": training.progress.history, "charged": charged}
            record = run_record(experiment, training)
            statement = statement_for(experiment, name, record["charged"])
            training.task.load(training.server.model)
            save_model(
                out / f"{name}-{run}.safetensors",
                training.task.net,
                experiment.metadata(name, statement, training.thresholds),
            )
            write_record(done, record)
        checkpoint.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    return read_record(done)


def do_job(experiment: Experiment, out: Path, job: dict, advance: Advance, deadline: float = math.inf) -> dict:
    """One job of the pool: ``{"run": [name, run]}`` gives the run's record; the others are ``results.do_account``'s."""
    if "run" in job:
        name, run = job["run"]
        plan = experiment.plan(name)
        each = plan.setting.gradients(plan.population) / plan.setting.epochs
        return finished_run(
            experiment, name, run, out, lambda epochs: advance(epochs * each), deadline, job.get("first", False)
        )
    return do_account(experiment, job)


@contextlib.contextmanager
def shared_jobs(told: dict) -> Iterator[Callable[[dict, Advance], dict]]:
    """A worker of the pool: ``do_job`` for the introduction's experiment and folder, on one thread."""
    out = Path(told["out"])
    with threads(1):
        # its features are in the cache: the parent process has extracted them
        experiment = Experiment.load(Options.from_record(told["options"]), progress=False, device=told["device"])
        deadline = math.inf if told["deadline"] is None else told["deadline"]
        with writing(out):
            yield lambda job, advance: do_job(experiment, out, job, advance, deadline)


@ordinary_torch()
def reproduce(
    options: Options,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    workers: int | None = None,
    device: str = "cpu",
    minutes: float | None = None,
    tensorboard: bool = False,
) -> dict:
    """Run the settings; write ``results.json``, ``metrics.csv``, ``figure1.png`` and the models into ``out``.

    Returns the results.
    workers  processes that train at the same time; 1 for this one alone, None for what suits the machine. They
             change no number: every run draws from streams of its own.
    device   where networks train, as ``machine.find_device`` names it. It changes numbers by rounding only
    minutes  time for training: what tells most goes first, and the epoch in which the time is over is the last.
             ``resume`` goes on; until then "unfinished" lists the runs that were begun
    tensorboard  also write ``metrics.csv``'s rows into ``out``/events for TensorBoard
    Raises InputError for bad options, missing data or packages, or an ``out`` that holds another run.
    """
    from dopamine_lib.reproduction.figure1 import figure1

    if tensorboard:
        check_tensorboard()
    if options.model not in ONE_THREAD:
        keep_freed_memory()
    check_within("minutes", 1.0 if minutes is None else minutes, 0, 1e6, "leave it out for as long as it takes")
    out, began = Path(out), time.perf_counter()
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    order = LONGEST_FIRST if minutes is None else TELLING_FIRST
    in_order = sorted(options.settings, key=lambda name: name in order and order.index(name))
    runs = [(name, run) for run in range(options.runs) for name in in_order]
    asked = options.record()
    # how many hospitals the data names is not known yet
    check_out(out, {key: value for key, value in asked.items() if key != "hospitals" or value}, resume)
    if workers is None:  # a larger model keeps every core busy by itself
        unfinished = sum(not run_files(out, *run)[0].exists() for run in runs)
        workers = fitting_workers(unfinished) if options.model in ONE_THREAD else 1
    with contextlib.ExitStack() as stack:
        pool = None
        if workers > 1:  # they load their libraries while this process reads the data
            pool = stack.enter_context(WorkerPool(shared_jobs, workers))
        experiment = Experiment.load(options, progress=progress, device=device)
        if progress:
            print(experiment.in_words, file=sys.stderr, flush=True)
        # refuses what would end without a bound, before anything is trained
        plans = {name: experiment.plan(name) for name in options.settings}
        if pool is not None:
            until = None if minutes is None else deadline
            pool.introduce({"options": asked, "out": str(out), "device": device, "deadline": until})
        asked["hospitals"] = experiment.options.hospitals
        # a file of the same name with other weights is another experiment
        asked["weights_sha256"] = experiment.weights.sha256
        stack.enter_context(writing(out))
        stack.enter_context(claim(out, asked, resume))
        total = options.runs * sum(plan.setting.gradients(plan.population) for plan in plans.values())
        bar = stack.enter_context(Estimate(total, f"{len(runs)} run{'s' if len(runs) > 1 else ''}", progress))

        def do(jobs: list[dict]) -> list:
            if pool:
                return pool.run(jobs, bar.update)
            return [do_job(experiment, out, job, bar.update, deadline) for job in jobs]

        records = dict(zip(runs, do([{"run": run, "first": run == runs[0]} for run in runs]), strict=True))
        finished, begun = ({name: [] for name in options.settings} for _ in range(2))
        for (name, _), record in sorted(records.items(), key=lambda item: item[0][1]):
            if "unfinished" not in record:
                finished[name].append(record)
            elif record["history"] or any(record["charged"]):
                begun[name].append(record)
        results = assemble(experiment, asked, finished, do, begun=begun)
        results |= {"device": device_name(experiment.device), "seconds": round(time.perf_counter() - began, 1)}
        write_json(out / "results.json", results)
        write_metrics(out / "metrics.csv", records)
        if tensorboard:
            write_events(out / "events", records)
        with plain_style(), atomic_path(out / "figure1.png") as temporary:
            figure1(results).savefig(temporary, dpi=150)
    return results
