"""What the paper's full run costs: operations counted in one step, times the gradients that the settings ask for.

A multiplication and an addition are two operations. They are counted as they are dispatched, so a private step includes
what book-keeping adds: the norms, and the clipped sums out of stored factors.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from dopamine_lib.benchmarks.measure import row
from dopamine_lib.federation.settings import SETTINGS, Setting
from dopamine_lib.models.networks import build
from dopamine_lib.models.weights import load_weights
from dopamine_lib.privacy.dpsgd import Task

PATIENTS, RUNS, PIXELS, BATCH = 2931, 5, 224, 10
#: Assumed, not measured: float32 operations a second of a data-centre GPU on small convolutions, and USD per hour.
GPU_OPERATIONS, GPU_HOUR = 5e12, 2.0


def gradients(setting: Setting) -> float:
    """Per-patient gradients that one run of a setting computes, on average: q N T.

    >>> round(gradients(SETTINGS["FSCDP"]))
    300202
    """
    return setting.gradients(PATIENTS)


def operations(private: bool, pixels: int = PIXELS, batch: int = BATCH) -> float:
    """Operations of one gradient of SqueezeNet-1.1, forward and backward, counted over a batch of random images."""
    net = build("squeezenet", 5, load_weights("random"), 0)
    x = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    task, index = Task(net, lambda index: x[index], torch.arange(batch) % 5), torch.arange(batch)
    task.clipped_sums(task.start, index, 0.5)  # what is checked once, before the first step, is not a step's
    # the counter only knows products into a new tensor
    into = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=into) as counter:
        if private:
            task.clipped_sums(task.start, index, 0.5)
        else:
            torch.nn.functional.cross_entropy(net(x), task.labels).backward()
    return counter.get_total_flops() / batch


def rows(seconds_per_gradient: float) -> list[dict]:
    """The cost of the paper's run: five settings, five runs, SqueezeNet-1.1 at 224 pixels.

    seconds_per_gradient  of a private step on this machine
    """
    plain, private = operations(private=False), operations(private=True)
    run = {name: gradients(setting) for name, setting in SETTINGS.items()}
    asked = RUNS * sum(run.values())
    total = RUNS * sum(count * (private if SETTINGS[name].private else plain) for name, count in run.items())
    hours = total / GPU_OPERATIONS / 3600
    return [
        row(f"operations of a private gradient, {PIXELS} px", private, "", "plain", plain, private / plain),
        *(row(f"gradients of one run of {name}", count, "") for name, count in run.items()),
        row("gradients of the paper's run, five settings, five runs", asked, ""),
        row("operations of the paper's run", total, ""),
        row("the paper's run on this machine", asked * seconds_per_gradient / 3600, "h"),
        row(f"the paper's run on a GPU that sustains {GPU_OPERATIONS:.0e} operations a second (assumed)", hours, "h"),
        row(f"the same at {GPU_HOUR:g} USD an hour (assumed)", hours * GPU_HOUR, "USD"),
    ]
