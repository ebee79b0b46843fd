"""How the learning rates and clips of ``federation.settings.CHOICES`` were chosen: on validation patients."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import NotFinite
from dopamine_lib.federation.own_settings import as_toml
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.federation.training import Training
from dopamine_lib.files import atomic_path
from dopamine_lib.progress import progress_bar

#: Factors tried around the present choice.
LEARNING_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
CLIPS = (0.5, 1.0, 2.0)


def tune(experiment: Experiment, name: str) -> list[tuple[float, Choice]]:
    """Candidates around the present choice with their mean accuracy on the validation patients, best first.

    experiment  ``Experiment.held_out``: it trains without those patients and never sees a test image.
    That looking is not in epsilon, and the privacy statement says so.
    """
    present, scored = experiment.plan(name).choice, []
    clips = [1.0] if math.isinf(present.max_grad_norm) else CLIPS
    candidates = list(itertools.product(LEARNING_RATES, clips))
    for rate, clip in progress_bar(candidates, title=name, unit="candidate"):
        choice = replace(
            present, learning_rate=rate * present.learning_rate, max_grad_norm=clip * present.max_grad_norm
        )
        runs = (experiment.training(name, run, choice=choice) for run in range(experiment.options.runs))
        scored.append((float(np.mean([_accuracy(experiment, training) for training in runs])), choice))
    return sorted(scored, key=lambda pair: -pair[0])


def tuned_table(experiment: Experiment, name: str, choice: Choice) -> str:
    """The setting called ``name`` with ``choice``, as TOML for ``reproduce --settings``.

    One of the paper's five gets another name, as FSCDP-tuned. Its title, and so its privacy statement, says on whose
    images it was chosen.
    """
    declared = experiment.plan(name).setting
    title = f"{declared.title}, with learning rate and clip chosen on validation patients of {experiment.dataset.name}"
    return as_toml(f"{name}-tuned" if name in SETTINGS else name, replace(declared, title=title), choice)


@contextlib.contextmanager
def writing_tables(out: str | None) -> Iterator[Callable[[str], object]]:
    """Yield what takes tables of TOML; in the end they are the file ``out``. None keeps nothing.

    Raises InputError, before anything else is done, for a file that is not called .toml or cannot be written.
    """
    tables: list[str] = []
    if out is None:
        yield tables.append
        return
    if not out.endswith(".toml"):
        raise InputError(f"--out {out} is read by --settings only as .toml: call it {out}.toml")
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(atomic_path(out))
        except OSError as error:
            raise InputError(f"--out {out} cannot be written ({error.strerror}); name another file") from error
        yield tables.append
        temporary.write_text("\n".join(tables), encoding="utf-8")


def _accuracy(experiment: Experiment, training: Training) -> float:
    try:
        return experiment.accuracy(training.run())
    except NotFinite:  # a rate so large that training diverges
        return 0.0
