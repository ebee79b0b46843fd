"""``bench dp``: what a private step costs beside an ordinary one, beside Opacus, and beside ten Opacus models.

Every step starts from images in memory and ends in a changed model. The ordinary step, ours and Opacus's functorch
mode use channels_last memory, the fastest. Opacus's other two modes use plain memory: in channels_last their gradients
of convolutions are silently wrong, because their unfolding assumes plain strides. Steps are compared without noise,
whose price depends on the generator; a whole iteration includes each side's own: AES-256 in counter mode here, torch's
simulation generator there. ``cost`` computes the price of the paper's whole run.
"""

import itertools
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from dopamine_lib.benchmarks import cost
from dopamine_lib.benchmarks.measure import at_most, interleaved, medians, row, write
from dopamine_lib.benchmarks.steps import (
    HOSPITALS,
    Case,
    batch_of,
    opacus_functorch,
    opacus_ghost,
    opacus_hooks,
    opacus_iteration,
    our_iteration,
    our_step,
    plain_step,
)
from dopamine_lib.errors import InputError
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import PAPER_CHOICES, SETTINGS
from dopamine_lib.federation.training import Training
from dopamine_lib.machine import find_device, keep_freed_memory
from dopamine_lib.models.networks import CPU, IMAGENET, resident_inputs
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.randomness import Randomness

ITERATIONS = 3001


STEPS = (
    Case("squeezenet", 64, 64, most=1.15, least=1.7),
    Case("squeezenet", 224, 10, most=1.15),
    Case("cnn", 28, 64, most=1.2),
    Case("resnet18", 64, 32, most=1.5),
    Case("mobilenet_v3_small", 64, 32, most=1.5),
    Case("efficientnet_b0", 64, 16, most=1.5, least=1.0),
)
FEDERATED = (
    Case("squeezenet", 64, 100, least=2.5, minutes=30),
    Case("squeezenet", 28, 100, least=5.0),
    Case("cnn", 28, 100),
)
MEMORY = (Case("squeezenet", 64, 64, most=2.2), Case("squeezenet", 224, 10, most=2.2), Case("cnn", 28, 64, most=2.2))


#: On a GPU: the paper's own step and iteration.
ON_GPU = Case("squeezenet", 224, 100, most=1.2, least=1.0)


def run(
    path: str | PathLike | None = None,
    *,
    device: str = "cpu",
    model: str | None = None,
    size: int | None = None,
    steps: tuple[Case, ...] = STEPS,
    federated: tuple[Case, ...] = FEDERATED,
    memory: tuple[Case, ...] = MEMORY,
    repeats: int = 9,
) -> dict:
    """All rows, also written to ``path`` if one is given. ``device_rows`` has those of a GPU.

    model, size  one network's step alone, as ``reproduce --model`` names it, on images of ``size`` pixels (64)
    Raises InputError for a size without a model, and for a model on a GPU.
    """
    place = find_device(device)
    if size is not None and model is None:
        raise InputError(f"--size is {size}, but is for one network alone: give --model, or leave it out")
    if model is not None and place.type != "cpu":
        raise InputError(f"--model is {model}, but on {place.type} the paper's networks are measured: leave it out")
    keep_freed_memory()
    if place.type != "cpu":
        return write(device_rows(place, ON_GPU, repeats), path)
    if model is not None:
        steps, federated, memory = (Case(model, size or 64, 32, most=1.5, least=1.0),), (), ()
    rows = [row("threads", torch.get_num_threads(), "threads")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns of its own hooks
        for case in steps:
            measured = step_rows(case, repeats)
            rows += measured
            if (case.model, case.pixels) == ("squeezenet", cost.PIXELS):
                rows += cost.rows(measured[0]["value"] / case.batch)
        for case in federated:
            rows += federated_rows(case, repeats)
    rows += [memory_row(case) for case in memory]
    return write(rows, path)


def step_rows(case: Case, repeats: int, device: torch.device = CPU) -> list[dict]:
    """One step of one model: ours against the ordinary step and each of Opacus's modes that take the model."""
    makers = {"plain SGD step": plain_step, "ours": our_step}
    makers |= {"Opacus hooks": opacus_hooks, "Opacus functorch": opacus_functorch, "Opacus ghost": opacus_ghost}
    steps = {name: waited_for(make(*batch_of(case, device)), device) for name, make in makers.items()}
    steps["ours"]()  # the first, since it says in one line what a network lacks
    steps = {name: step for name, step in steps.items() if not name.startswith("Opacus") or _runs(step)}
    seconds = interleaved(steps, repeats)
    own, name = seconds.pop("ours"), f"private step: {case}"
    rows = [compared(name, own, "plain SGD step", seconds.pop("plain SGD step"), most=case.most)]
    best = min(seconds, key=medians(seconds).get, default=None)
    return rows + [
        compared(name, own, peer, seconds[peer], least=case.least if peer == best else None) for peer in seconds
    ]


def _runs(step: Callable[[], object]) -> bool:
    """Whether a step can be taken: Opacus cannot where a network adds to a layer's output in place."""
    try:
        step()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def federated_rows(case: Case, repeats: int) -> list[dict]:
    """One iteration of FSCDP: ten hospitals' sums in one pass, against ten Opacus models one after another."""
    makers = {"ours": our_iteration, "peer": opacus_iteration}
    seconds = interleaved({name: make(*batch_of(case)) for name, make in makers.items()}, repeats)
    name = f"FSCDP iteration, {HOSPITALS} hospitals: {case}"
    rows = [compared(name, seconds["ours"], f"{HOSPITALS} Opacus models", seconds["peer"], least=case.least)]
    if case.minutes is not None:
        minutes = rows[0]["value"] * ITERATIONS / 60
        rows.append(at_most(f"{ITERATIONS} iterations: {case}", minutes, "min", case.minutes))
    return rows


def memory_row(case: Case) -> dict:
    """Peak memory of a step, ours against the ordinary one, each in its own process."""
    ours, plain = (peak_megabytes(make, case) for make in (our_step, plain_step))
    name, ratio = f"peak memory: {case}", ours / plain
    return row(name, ours, "MB", "plain SGD step", plain, ratio, f"at most {case.most}", ratio <= case.most)


def compared(
    name: str,
    own: list[float],
    peer: str,
    peers: list[float],
    *,
    most: float | None = None,
    least: float | None = None,
) -> dict:
    """A row of medians with our fastest and slowest turn.

    The ratio is ours to the peer's for the ordinary step, which ``most`` bounds; the peer's to ours for Opacus, which
    ``least`` bounds.
    """
    ours, other = statistics.median(own), statistics.median(peers)
    ratio = ours / other if peer == "plain SGD step" else other / ours
    target, holds = None, None
    if most is not None:
        target, holds = f"ours / peer at most {most}", ratio <= most
    elif least is not None:
        target, holds = f"peer / ours at least {least}", ratio >= least
    line = row(name, ours, "s", peer, other, ratio, target, holds)
    return line | {"fastest": min(own), "slowest": max(own)}


def device_rows(device: torch.device, case: Case, repeats: int = 9) -> list[dict]:
    """The step, the iteration of ten hospitals with all that belongs to it, and what the paper's run would take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = step_rows(case, repeats, device)
    hours = 0.0
    for name, declared in SETTINGS.items():
        turns = interleaved({name: waited_for(whole_round(name, case, device), device)}, repeats)[name]
        seconds = statistics.median(turns)
        hours += cost.RUNS * declared.rounds * seconds / 3600
        rows.append(row(f"{name}: a round, sampling and noise included, {case.model}, {case.pixels} px", seconds, "s"))
        taken = cost.PATIENTS * declared.sample_rate * declared.steps / declared.rounds
        rows.append(row(f"{name}: gradients a second", taken / seconds, "1/s"))
        rows.append(row(f"{name}: one run of {declared.rounds} rounds", declared.rounds * seconds / 60, "min"))
    rows.append(row("the paper's run on this device, five settings, five runs", hours, "h"))
    rows.append(row(f"the same at {cost.GPU_HOUR:g} USD an hour (assumed)", hours * cost.GPU_HOUR, "USD"))
    if device.type == "cuda":
        for name, make in (("private", our_step), ("plain", plain_step)):
            rows.append(row(f"peak memory of a {name} step: {case}", _device_megabytes(make, case, device), "MB"))
    return rows


def whole_round(name: str, case: Case, device: torch.device) -> Callable[[], None]:
    """Rounds of a setting as they run, one after another: patients are random images, as many as in the paper."""
    declared, choice, net = SETTINGS[name], PAPER_CHOICES[name], batch_of(case, device)[0]
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (cost.PATIENTS, case.pixels, case.pixels, 3), dtype=np.uint8)
    task = Task(net, resident_inputs(images, *IMAGENET, device), torch.arange(cost.PATIENTS) % 5, classes=5)
    patients = np.array_split(np.arange(cost.PATIENTS), HOSPITALS if declared.federated else 1)
    training = Training(Plan.of(declared, choice, task, patients), task, patients, Randomness())
    numbers = itertools.count()
    return lambda: training._round(next(numbers))


def waited_for(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The step, and a wait for the device to have done it."""

    def whole() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole


def _device_megabytes(make: Callable, case: Case, device: torch.device) -> float:
    step = waited_for(make(*batch_of(case, device)), device)
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 2**20


def peak_megabytes(make: Callable, case: Case) -> float:
    """Resident memory that three steps add at their peak."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (make, case, torch.get_num_threads()))


def _peak(make: Callable, case: Case, threads: int) -> float:
    torch.set_num_threads(threads)
    step = make(*batch_of(case))
    before = _resident(reset=True)
    for _ in range(3):
        step()
    return _resident() - before


def _resident(reset: bool = False) -> float:
    """Peak resident memory in MB since the last reset, or since the start where the system has no reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    peak = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**10
