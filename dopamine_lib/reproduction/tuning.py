"""How the learning rates and clips of ``federation.settings.CHOICES`` were chosen: on validation patients."""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import NotFinite
from dopamine_lib.federation.own_settings import as_toml
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.federation.training import Training
from dopamine_lib.files import atomic_path
from dopamine_lib.machine import place_for
from dopamine_lib.progress import progress_bar

#: Factors tried around the present choice.
LEARNING_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
CLIPS = (0.5, 1.0, 2.0)


def tune(experiment: Experiment, name: str) -> list[tuple[float, Choice]]:
    """Candidates around the present choice with their mean accuracy on the validation patients, best first.

    experiment  ``Experiment.held_out``: it trains without those patients and never sees a test image.
    That looking is not in epsilon, and the privacy statement says so. A rate so large that local steps have no bound
    is no candidate.
    Raises InputError where training diverges with every candidate.
    """
    present, scored = experiment.plan(name).choice, []
    clips = [1.0] if math.isinf(present.max_grad_norm) else CLIPS
    candidates = list(itertools.product(LEARNING_RATES, clips))
    for rate, clip in progress_bar(candidates, title=name, unit="candidate"):
        choice = replace(
            present, learning_rate=rate * present.learning_rate, max_grad_norm=clip * present.max_grad_norm
        )
        try:
            replace(experiment.plan(name), choice=choice)
        except InputError:
            continue
        runs = (experiment.training(name, run, choice=choice) for run in range(experiment.options.runs))
        scored.append((float(np.mean([_accuracy(experiment, training) for training in runs])), choice))
    if not any(score for score, _ in scored):
        tried = f"{scored[0][1].learning_rate:g} to {scored[-1][1].learning_rate:g}"
        raise InputError(f"{name} diverges at all learning rates from {tried}; --settings FILE.toml sets smaller ones")
    return sorted(scored, key=lambda pair: -pair[0])


def tuned_table(experiment: Experiment, name: str, choice: Choice) -> str:
    """The setting called ``name`` with ``choice``, as TOML for ``reproduce --settings``.

    It is called ``name_of_tuned``. Its title, and so its privacy statement, says on whose images it was chosen.
    """
    declared = experiment.plan(name).setting
    what = "learning rate" if math.isinf(choice.max_grad_norm) else "learning rate and clip"
    said = f", with {what} chosen on validation patients of {experiment.dataset.name}"
    return as_toml(name_of_tuned(name), replace(declared, title=declared.title.removesuffix(said) + said), choice)


def name_of_tuned(name: str) -> str:
    """What a tuned setting is called: one of the paper's five gets another name.

    >>> name_of_tuned("FSCDP"), name_of_tuned("mine")
    ('FSCDP-tuned', 'mine')
    """
    return f"{name}-tuned" if name in SETTINGS else name


@contextlib.contextmanager
def writing_tables(out: str | None, settings: Sequence[str]) -> Iterator[Callable[[str], object]]:
    """Yield what takes the tables of ``settings`` and writes those so far to the file ``out``. None keeps nothing.

    Raises InputError, before anything else is done, for a file that is not called .toml or cannot be written, and where
    two tables would have one name.
    """
    tables: list[str] = []
    if out is None:
        yield tables.append
        return
    if not out.endswith(".toml"):
        raise InputError(f"--out {out} is read by --settings only as .toml: call it {out}.toml")
    (name, times), *_ = Counter(name_of_tuned(name).casefold() for name in settings).most_common()
    if times > 1:
        called = [setting for setting in settings if name_of_tuned(setting).casefold() == name]
        raise InputError(f"--out would have {' and '.join(called)} under one name, {name}: tune them into two files")
    with place_for(out, "--out") as whole:

        def write(table: str) -> None:
            tables.append(table)
            with atomic_path(out) as so_far:  # a search that is stopped keeps the settings that it has done
                so_far.write_text("\n".join(tables), encoding="utf-8")

        yield write
        whole.write_text("\n".join(tables), encoding="utf-8")


def _accuracy(experiment: Experiment, training: Training) -> float:
    try:
        return experiment.accuracy(training.run())
    except NotFinite:  # a rate so large that training diverges
        return 0.0
