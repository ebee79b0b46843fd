"""The main job: settings times runs, with checkpoints, ``results.json``, ``figure1.png`` and a table.

Runs do not depend on each other, so processes of a ``pool`` share them out where the machine has the cores.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

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
from dopamine_lib.federation.settings import EPOCHS
from dopamine_lib.federation.training import Training
from dopamine_lib.files import atomic_path
from dopamine_lib.machine import keep_freed_memory, ordinary_torch, threads
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint, save_model
from dopamine_lib.pool import WorkerPool, fitting_workers

#: The settings by how long they take, so that workers end at about the same time.
LONGEST_FIRST = ("FSCDP", "FPDP", "CDP", "F", "C")
#: Seconds to wait for a run that another process holds: the worker of a killed process needs a moment to notice.
PATIENCE = 10.0
#: Is told the number of epochs that have been done since it was last called.
Advance = Callable[[int], object]


def run_setting(
    experiment: Experiment, name: str, run: int, checkpoint: Path | None = None, advance: Advance = lambda epochs: None
) -> Training:
    """Train one run of one setting to its end, from its checkpoint where that exists.

    checkpoint  None to keep nothing
    """
    training = experiment.training(name, run)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, training)
    advance(training.progress.epoch)

    def save() -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint, training)

    def after(epoch: int) -> None:
        training.progress.history.append(epoch_record(experiment, training))
        advance(1)

    return training.run(save, after)


def finished_run(experiment: Experiment, name: str, run: int, out: Path, advance: Advance) -> dict:
    """The record of one run: read if it is finished, else trained to its end and written with the model."""
    done, checkpoint, lock = run_files(out, name, run)
    done.parent.mkdir(exist_ok=True)
    with FileLock(lock, timeout=PATIENCE):
        if done.exists():
            advance(EPOCHS)
        else:
            training = run_setting(experiment, name, run, checkpoint, advance)
            record = run_record(experiment, training)
            statement = statement_for(experiment, name, record["charged"])
            training.task.load(training.server.model)
            save_model(out / f"{name}-{run}.safetensors", training.task.net, experiment.metadata(name, statement))
            write_record(done, record)
        checkpoint.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    return read_record(done)


def do_job(experiment: Experiment, out: Path, job: dict, advance: Advance) -> dict:
    """One job of the pool: ``{"run": [name, run]}`` gives the run's record; the others are ``results.do_account``'s."""
    if "run" in job:
        return finished_run(experiment, *job["run"], out, advance)
    return do_account(experiment, job)


@contextlib.contextmanager
def shared_jobs(told: dict) -> Iterator[Callable[[dict, Advance], dict]]:
    """A worker of the pool: ``do_job`` for the introduction's experiment and folder, on one thread."""
    out = Path(told["out"])
    with threads(1):
        # its features are in the cache: the parent process has extracted them
        experiment = Experiment.load(Options.from_record(told["options"]), progress=False)
        with writing(out):
            yield lambda job, advance: do_job(experiment, out, job, advance)


@ordinary_torch()
def reproduce(
    options: Options, out: str | Path, *, resume: bool = False, progress: bool = True, workers: int | None = None
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
    asked = options.record()
    check_out(out, asked, resume)
    if workers is None:  # a larger model keeps every core busy by itself
        unfinished = sum(not run_files(out, *run)[0].exists() for run in runs)
        workers = fitting_workers(unfinished) if options.model == "head" else 1
    with contextlib.ExitStack() as stack:
        pool = None
        if workers > 1:  # they load their libraries while this process reads the data
            pool = stack.enter_context(WorkerPool(shared_jobs, workers))
        experiment = Experiment.load(options, progress=progress)
        for name in options.settings:  # refuses what would end without a bound, before anything is trained
            experiment.plan(name)
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
        of = {name: [records[name, run] for run in range(options.runs)] for name in options.settings}
        results = assemble(experiment, asked, of, do)
        results["seconds"] = round(time.perf_counter() - began, 1)
        write_json(out / "results.json", results)
        with atomic_path(out / "figure1.png") as temporary:
            figure1(results).savefig(temporary, dpi=150)
    return results
