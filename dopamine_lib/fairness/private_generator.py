"""A private generator: moments of the patients released once with noise, and patients drawn from them for ever after.

Another way to a private model: what is released tells how patients of each class are distributed, and not a model. A
patient with the features x, of norm at most 1, and class y adds to the release

    ( b onehot(y),  a onehot(y) x^T,  c x x^T )    with  a^2 + b^2 + c^2 = 1

whose norm is at most 1: the second part has norm a |x|, the third c |x|^2. Of the symmetric x x^T the upper triangle is
sent, what is off the diagonal times sqrt(2), which has the same norm. Several images of one patient stand for it as
their mean. Noise is Gaussian, in one share of each hospital on a public grid (``rounded_gaussian``), calibrated exactly
(``gaussian.analytic_sigma``); the event is that of one Gaussian release.

Of the noisy sums follow each class' share and mean, and one covariance within classes for all (the model of linear
discriminant analysis). Drawing from these normal distributions is post-processing, as is whatever is trained on what
was drawn: as many patients and models as one likes cost nothing more. What no such normal distribution has (skewness,
categories, a class' own covariance) is lost, whatever epsilon is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.fairness.output_perturbation import TOTAL_RANGE, person_shares, solve
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.privacy.accounting import SampledGaussian
from dopamine_lib.privacy.gaussian import analytic_sigma
from dopamine_lib.privacy.head import unit_rows
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian

#: b^2, a^2 and c^2, and how much of the noise's largest eigenvalue no eigenvalue of the covariance falls below: chosen
#: on validation patients of the heart-disease data.
COUNTS, MEANS, PRODUCTS = 0.07, 0.75, 0.18
FLOOR = 0.15
#: No class counts as rarer than this.
RAREST = 0.02
#: Of a head that is trained on drawn patients: L in ``output_perturbation``.
REGULARISATION = 1.0


@dataclass(frozen=True)
class Generator:
    """Classes' ``shares`` (K,) and ``means`` (K, p), and ``root`` (p, p): root^T root is the covariance within classes.

    >>> one = Generator(np.array([0.25, 0.75]), np.array([[-3.0], [3.0]]), np.array([[0.1]]))
    >>> features, labels = one.draw(4, np.random.default_rng(0))
    >>> labels.tolist(), features.round(1).ravel().tolist()
    ([1, 1, 0, 0], [2.9, 3.0, -2.9, -2.9])
    """

    shares: np.ndarray
    means: np.ndarray
    root: np.ndarray

    def draw(self, patients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Features float64 (patients, p) and classes int64 (patients,) of patients that never were."""
        labels = rng.choice(len(self.shares), patients, p=self.shares)
        return self.means[labels] + rng.normal(size=(patients, len(self.root))) @ self.root, labels

    def head(self, patients: int, rng: np.random.Generator) -> np.ndarray:
        """A head (K, p + 1), the bias last, that was trained on as many drawn patients, without any noise."""
        features, labels = self.draw(patients, rng)
        return solve(np.column_stack([features, np.ones(patients)]), labels, len(self.shares), REGULARISATION)


def moments(rows: np.ndarray, onehot: np.ndarray) -> np.ndarray:
    """The sum float64 (K + K p + p (p + 1) / 2,) of what patients add, for features (n, p) of norm 1 at most.

    onehot  (n, K) of their classes; a row is as much less as there are more images of the patient

    >>> moments(np.array([[0.6, 0.8]]), np.array([[0.0, 1.0]])).round(2)
    array([0.  , 0.26, 0.  , 0.  , 0.52, 0.69, 0.15, 0.29, 0.27])
    """
    products, (i, j) = (rows * onehot.sum(1, keepdims=True)).T @ rows, np.triu_indices(rows.shape[1])
    scale = np.where(i == j, 1, math.sqrt(2))
    parts = onehot.sum(0), (onehot.T @ rows).ravel(), products[i, j] * scale
    return np.concatenate([math.sqrt(w) * part for w, part in zip((COUNTS, MEANS, PRODUCTS), parts, strict=True)])


def from_moments(released: np.ndarray, classes: int, patients: int, sigma: float = 0.0) -> Generator:
    """The generator out of noisy ``moments`` of ``classes`` and a declared number of ``patients``.

    sigma  of the noise on each value, 0 for none. Differences between classes' means shrink by what noise adds to
           them (James and Stein 1961), and no direction has less variance than a part of what noise alone would give
    """
    p = round(math.sqrt((classes + 0.5) ** 2 + 2 * (len(released) - classes)) - classes - 0.5)
    counts, means, products = np.split(released, [classes, classes * (p + 1)])
    counts = np.clip(counts / math.sqrt(COUNTS), RAREST * patients, patients)
    counts *= patients / counts.sum()
    sums = means.reshape(classes, p) / math.sqrt(MEANS)
    everybody = sums.sum(0) / patients
    apart, noise = sums / counts[:, None] - everybody, p * (sigma / (math.sqrt(MEANS) * counts)) ** 2
    left = np.maximum(0, 1 - noise / np.maximum(np.square(apart).sum(1), 1e-12))
    means = everybody + left[:, None] * apart
    i, j = np.triu_indices(p)
    whole = np.zeros((p, p))
    whole[i, j] = whole[j, i] = products / math.sqrt(PRODUCTS) / np.where(i == j, 1, math.sqrt(2)) / patients
    values, vectors = np.linalg.eigh(whole - (means.T * (counts / patients)) @ means)
    least = FLOOR * math.sqrt(2 * p / PRODUCTS) * sigma / patients  # the semicircle law's edge, times ``FLOOR``
    return Generator(counts / patients, means, np.sqrt(np.maximum(values, max(least, 1e-6)))[:, None] * vectors.T)


def release(
    parts: Sequence[np.ndarray], epsilon: float, delta: float, patients: int, randomness: Randomness, run: int = 0
) -> tuple[np.ndarray, SampledGaussian]:
    """Hospitals' ``moments`` (m,) as a noisy total (m,), and what that spends: (epsilon, delta) for one patient.

    patients  declared, of all hospitals together
    """
    terms = {"total_range": TOTAL_RANGE, "sample_rate": 1.0, "patients": patients, "box": patients}
    noise = RoundedGaussian(analytic_sigma(epsilon, delta), 1.0, len(parts), len(parts[0]), **terms)
    total = np.zeros(len(parts[0]), np.int64)
    for number, part in enumerate(parts):
        total += noise.combine(part, noise.draw(randomness.stream("generator", run, number))[0])
    return noise.decode(total), noise.event(1)


def private_generator(
    experiment: Experiment, target: float | None, *, run: int = 0, hospitals: Sequence[np.ndarray] | None = None
) -> tuple[Generator, SampledGaussian | None]:
    """The generator of an experiment's training patients at epsilon ``target`` (None: without noise), and its event.

    hospitals  images of each; by default the experiment's own
    Raises InputError for models that learn their features, and for an epsilon or delta out of bounds.
    """
    options, labels = experiment.options, experiment.dataset.labels
    if experiment.features is None:
        raise InputError(f"model is {options.model}, but moments are of fixed features: use model head or linear")
    rows, classes = unit_rows(experiment.features).double().numpy(), len(experiment.dataset.grades)
    parts = []
    for own in experiment.patients if hospitals is None else hospitals:
        shares = person_shares(experiment.dataset.person, own)
        parts.append(moments(rows[own], np.eye(classes)[labels[own]] * shares[:, None]))
    patients = sum(experiment.sizes)
    if target is None:
        return from_moments(sum(parts), classes, patients), None
    released, event = release(parts, target, options.delta, patients, Randomness(options.seed), run)
    return from_moments(released, classes, patients, event.noise_multiplier), event
