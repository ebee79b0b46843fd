"""How the learning rates and clips of ``federation.settings.CHOICES`` were chosen: on validation patients."""

import itertools
import math
from dataclasses import replace

import numpy as np

from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import NotFinite
from dopamine_lib.federation.settings import Choice
from dopamine_lib.federation.training import Training
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


def _accuracy(experiment: Experiment, training: Training) -> float:
    try:
        return experiment.accuracy(training.run())
    except NotFinite:  # a rate so large that training diverges
        return 0.0
