"""``bench reproduce``: the main job as a reader starts it, imports included, and what workers and a loop save.

Whole jobs run in fresh interpreters, one after another. APTOS-2019 is measured if ``DOPAMINE_SHARED`` (by default
``../shared/data``) has it, with its features already cached.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from os import PathLike
from pathlib import Path

import torch

from dopamine_lib.benchmarks.measure import at_most, interleaved, medians, row, write
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.settings import SETTINGS
from dopamine_lib.reproduction.run import run_setting

#: Seconds that all five settings may take, five runs each.
COLD_TARGET, WARM_TARGET, APTOS_TARGET = 120, 40, 90

#: A whole job as a program: the options and the number of workers are its arguments.
JOB = """
import json, sys
from dopamine_lib.federation.options import Options
from dopamine_lib.reproduction.run import reproduce
options = json.loads(sys.argv[1])
options["settings"] = tuple(options["settings"])
reproduce(Options(**options), sys.argv[2], workers=json.loads(sys.argv[3]))
"""


def run(
    path: str | PathLike | None = None,
    *,
    runs: int = 5,
    settings: tuple[str, ...] = tuple(SETTINGS),
    repeats: int = 3,
) -> dict:
    """All rows, also written to ``path`` if one is given."""
    options = {"runs": runs, "settings": settings}
    with tempfile.TemporaryDirectory(prefix="dopamine-") as cache:
        cold = _job_seconds(options, cache=cache)
        seconds = {workers: _job_seconds(options, workers=workers, cache=cache) for workers in (None, 1)}
    warm, alone = seconds[None], seconds[1]
    whole = f"{len(settings)} settings x {runs} run{'s' if runs > 1 else ''}"
    rows = [
        at_most(f"{whole}, nothing cached", cold, "s", COLD_TARGET),
        at_most(f"{whole}, cached", warm, "s", WARM_TARGET, "one process", alone),
    ]
    aptos = _aptos()
    if aptos is not None:
        Experiment.load(Options(**aptos))  # decoding and features do not count
        rows.append(at_most(f"{whole}, APTOS-2019, cached", _job_seconds(options | aptos), "s", APTOS_TARGET))
    return write([*rows, *_setting_rows(settings, repeats)], path)


def _job_seconds(options: dict, *, workers: int | None = None, cache: str | None = None) -> float:
    """Seconds of one whole job in its own interpreter."""
    home = str(Path(__file__).parents[2])
    environment = os.environ | ({} if cache is None else {"DOPAMINE_CACHE": cache})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="dopamine-") as out:
        words = [sys.executable, "-c", JOB, json.dumps(options), out, json.dumps(workers)]
        begin = time.perf_counter()
        subprocess.run(words, check=True, env=environment)
        return time.perf_counter() - begin


def _aptos() -> dict | None:
    """Options of the real data set, or None where it is missing."""
    shared = Path(os.environ.get("DOPAMINE_SHARED", "../shared/data"))
    images, weights = shared / "aptos2019", shared / "squeezenet1_1_features_imagenet.npz"
    if not ((images / "train.csv").is_file() and weights.is_file()):
        return None
    return {"data": "aptos", "data_dir": str(images), "weights": str(weights)}


def _setting_rows(settings: tuple[str, ...], repeats: int) -> list[dict]:
    """One run of each setting on one thread, and the clipped sums of a round's ten hospitals computed in two ways."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        experiment = Experiment.load(Options(), progress=False)
        taken = interleaved({name: lambda name=name: run_setting(experiment, name, 0) for name in settings}, repeats)
        rows = [row(f"one run of {name}", seconds, "s") for name, seconds in medians(taken).items()]
        task, choice = experiment.task(), experiment.plan("FSCDP").choice
        samples = [hospital.sample(0) for hospital in experiment.training("FSCDP").hospitals]
        group = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample) for sample in samples]))
        terms = (task.start, torch.cat(samples), choice.max_grad_norm, group, len(samples))
        ways = {"loop": task.clipped_sums, "products": task.product_sums}
        taken = interleaved({name: lambda way=way: way(*terms) for name, way in ways.items()}, 100 * repeats)
        loop, products = medians(taken).values()
        name = f"clipped sums of {len(samples)} hospitals' samples by a compiled loop"
        return [*rows, row(name, loop, "s", "matrix products", products, loop / products, "below 1", loop < products)]
    finally:
        torch.set_num_threads(threads)
