"""Output perturbation as an alternative to DP-SGD for the head, on the same patients at the same epsilon.

Like training, it first asks for the patients' mean features, with noise, and centres the features on them; what that
spends is taken off what the answer may spend. The regularisation is chosen on validation patients.
"""

from collections.abc import Sequence

import numpy as np
import torch

from dopamine_lib.data.dataset import Dataset
from dopamine_lib.errors import InputError
from dopamine_lib.fairness.output_perturbation import TOTAL_RANGE, Perturbed, clip_rows, output_perturbation
from dopamine_lib.fairness.scores import scores
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.privacy.head import STRETCH
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian

#: Noise multiplier of the mean features.
MEAN_NOISE = 20.0
#: Features, centred and stretched as for training, have norms about 1.2; with the bias' 1 most are below this.
RADIUS = 1.6
#: Regularisations tried on validation patients.
GRID = (3.0, 10.0, 30.0, 100.0)


def perturbed_head(
    experiment: Experiment, target: float | None, regularisation: float, *, federated: bool, run: int = 0
) -> tuple[Perturbed, np.ndarray]:
    """The released head at epsilon ``target`` (None: without noise) and its probabilities (N, classes) on the test set.

    federated  every hospital solves for its own patients and adds its share of noise; else one curator solves for all
    Raises InputError for any model but the head, or arguments out of bounds.
    """
    options = experiment.options
    if options.model != "head":
        raise InputError(
            f"model is {options.model}, but output perturbation is made for a head's features: use model head"
        )
    task = experiment.task(run)
    hospitals = experiment.patients if federated else [experiment.train]
    randomness = Randomness(options.seed)
    total, patients = sum(task.feature_sum(torch.as_tensor(own)) for own in hospitals), sum(experiment.sizes)
    if target is not None:
        terms = {"total_range": TOTAL_RANGE, "sample_rate": 1.0, "patients": patients}
        noise = RoundedGaussian(MEAN_NOISE, 1.0, 1, len(total), box=patients, **terms)
        drawn = noise.draw(randomness.stream("output perturbation", run, "centre"))[0]
        total = torch.from_numpy(noise.decode(noise.combine(total, drawn)))
    centred = (STRETCH * (experiment.features - (total / patients).float())).numpy()
    dataset: Dataset = experiment.dataset
    head = output_perturbation(
        centred,
        dataset.labels,
        hospitals,
        classes=len(dataset.grades),
        regularisation=regularisation,
        radius=RADIUS,
        epsilon=target,
        delta=options.delta,
        randomness=randomness,
        sizes=experiment.sizes if federated else None,
        before=None if target is None else MEAN_NOISE,
        person=dataset.person,
        run=run,
    )
    logits = torch.from_numpy(clip_rows(centred[experiment.test], RADIUS)) @ head.weights.double().T
    return head, logits.softmax(1).numpy()


def choose_regularisation(
    experiment: Experiment, target: float | None, *, federated: bool, grid: Sequence[float] = GRID
) -> float:
    """The regularisation of ``grid`` that grades the most validation patients right, on average over the runs.

    experiment  ``Experiment.held_out``: it sees no test image. That looking is not in epsilon.
    """
    labels = experiment.dataset.labels[experiment.test]

    def accuracy(regularisation):
        runs = [
            perturbed_head(experiment, target, regularisation, federated=federated, run=run)[1]
            for run in range(experiment.options.runs)
        ]
        return scores(labels, np.array(runs), only=("accuracy",))["accuracy"].mean()

    return max(grid, key=accuracy)
