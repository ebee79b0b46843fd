"""``bench reproduce``: the main job as a reader starts it, imports included, and what it owes to batches and workers.

Whole jobs run in fresh interpreters, one after another. APTOS-2019 is measured where ``DOPAMINE_SHARED`` (by default
``../shared/data``) has it, with its features in the cache already.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dopamine_lib.benchmarks.measure import interleaved, medians, row, write
from dopamine_lib.experiment import Experiment, Options
from dopamine_lib.federation.hospital import train_together
from dopamine_lib.federation.settings import SETTINGS
from dopamine_lib.federation.side_by_side import alone
from dopamine_lib.reproduction import run_setting

#: Seconds that all five settings may take, five runs each.
COLD_TARGET, WARM_TARGET, APTOS_TARGET = 120, 40, 90

#: A whole job as a program: the options and the number of workers are its arguments.
JOB = """
import json, sys
from dopamine_lib.experiment import Options
from dopamine_lib.reproduction import reproduce
options = json.loads(sys.argv[1])
options["settings"] = tuple(options["settings"])
reproduce(Options(**options), sys.argv[2], progress=False, workers=json.loads(sys.argv[3]))
"""


def run(path=None, *, runs: int = 5, settings: tuple[str, ...] = tuple(SETTINGS), repeats: int = 3) -> dict:
    """Measure, and write the rows as JSON to ``path`` where one is given."""
    options = {"runs": runs, "settings": settings}
    with tempfile.TemporaryDirectory(prefix="dopamine-") as cache:
        cold = _job_seconds(options, cache=cache)
        seconds = {workers: _job_seconds(options, workers=workers, cache=cache) for workers in (None, 1)}
    warm, alone = seconds[None], seconds[1]
    whole = f"{len(settings)} settings x {runs} runs"
    rows = [
        _promised(f"{whole}, nothing cached", cold, COLD_TARGET),
        _promised(f"{whole}, cached", warm, WARM_TARGET, "one process", alone),
    ]
    aptos = _aptos()
    if aptos is not None:
        Experiment(Options(**aptos))  # decoding and features are not part of the figure
        rows.append(_promised(f"{whole}, APTOS-2019, cached", _job_seconds(options | aptos), APTOS_TARGET))
    return write([*rows, *_setting_rows(settings, repeats)], path)


def _promised(name: str, seconds: float, target: float, peer: str | None = None, peer_seconds=None) -> dict:
    ratio = None if peer is None else seconds / peer_seconds
    return row(name, seconds, "s", peer, peer_seconds, ratio, f"at most {target} s", seconds <= target)


def _job_seconds(options: dict, *, workers: int | None = None, cache: str | None = None) -> float:
    """Seconds of one whole job in an interpreter of its own."""
    home = str(Path(__file__).parents[2])
    environment = os.environ | ({} if cache is None else {"DOPAMINE_CACHE": cache})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="dopamine-") as out:
        words = [sys.executable, "-c", JOB, json.dumps(options), out, json.dumps(workers)]
        begin = time.perf_counter()
        subprocess.run(words, check=True, env=environment)
        return time.perf_counter() - begin


def _aptos() -> dict | None:
    """Options of the real data set where it is here."""
    shared = Path(os.environ.get("DOPAMINE_SHARED", "../shared/data"))
    images, weights = shared / "aptos2019", shared / "squeezenet1_1_features_imagenet.npz"
    if not ((images / "train.csv").is_file() and weights.is_file()):
        return None
    return {"data": "aptos", "data_dir": str(images), "weights": str(weights)}


def _setting_rows(settings, repeats: int) -> list[dict]:
    """One run of each setting on one thread, and a round of local training with and without lock-step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        experiment = Experiment(Options(), progress=False)
        taken = interleaved({name: lambda name=name: run_setting(experiment, name, 0) for name in settings}, repeats, 0)
        rows = [row(f"one run of {name}", seconds, "s") for name, seconds in medians(taken).items()]
        training = experiment.training("FPDP")
        hospitals, w = [training.hospitals[k] for k in training.schedule[0]], training.server.w
        number = iter(range(10**6))  # every round draws samples and noise of its own
        with torch.no_grad():
            taken = interleaved(
                {
                    "together": lambda: list(alone(train_together(hospitals, w, next(number)), training.task)),
                    "alone": lambda: [hospital.train_locally(w, next(number)) for hospital in hospitals],
                },
                5 * repeats,
            )
        together, one_by_one = medians(taken).values()
        name = f"FPDP's round of {len(hospitals)} hospitals in lock-step"
        return [
            *rows,
            row(name, together, "s", "one by one", one_by_one, together / one_by_one, "below 1", together < one_by_one),
        ]
    finally:
        torch.set_num_threads(threads)
