"""Several runs trained side by side: where each wants sums of gradients, one pass makes them all.

Runs share nothing but the clock: each has its own model, samples, noise and ledger. A linear head's step is so small
that most of its time goes into calls, not numbers, so five runs in one pass take little longer than one.
"""

import torch
from torch import Tensor

from dopamine_lib.privacy.dpsgd import Task, Wanted
from dopamine_lib.privacy.head import HeadTask


def alone(work, task: Task):
    """Do ``work``, a generator that also yields the sums it wants, with ``task``; yield what else it yields."""
    sums = None
    while True:
        try:
            said = work.send(sums)
        except StopIteration as end:
            return end.value
        sums = None
        if isinstance(said, Wanted):
            sums = task.sums(said)
        else:
            yield said


def side_by_side(trainings: list, saves: list):
    """Train runs of one setting to their ends, yielding (which of them, epochs done) whenever one finishes an epoch.

    saves  for each training what ``epochs`` calls when its state must be on disk
    """
    works = {i: training.work(save) for i, (training, save) in enumerate(zip(trainings, saves, strict=True))}
    tasks, stack, sums = [training.task for training in trainings], None, {}
    while works:
        wanted = {}
        for i, work in list(works.items()):
            try:
                said = work.send(sums.get(i))
                while not isinstance(said, Wanted):
                    yield i, said
                    said = work.send(None)
                wanted[i] = said
            except StopIteration:
                del works[i]
        if len(wanted) > 1 and all(type(task) is HeadTask for task in tasks):
            # only now: before its first sums a run has asked for the features' mean, and measures them from there
            stack = stack or HeadTask.stacked(tasks)
            sums = _together(stack, len(tasks[0].labels), wanted)
        else:
            sums = {i: tasks[i].sums(own) for i, own in wanted.items()}


@torch.no_grad()
def _together(stack: HeadTask, patients: int, wanted: dict[int, Wanted]) -> dict[int, Tensor]:
    """The sums that are wanted, by run, in one pass over the ``stack``, in which every run has so many ``patients``."""
    sizes, clip = [len(own.samples) for own in wanted.values()], next(iter(wanted.values())).max_grad_norm
    w = torch.cat([own.w.expand(size, -1) for own, size in zip(wanted.values(), sizes, strict=True)])
    samples = [sample + i * patients for i, own in wanted.items() for sample in own.samples]
    return dict(zip(wanted, stack.clipped_sums_each(w, samples, clip).split(sizes), strict=True))
