"""One experiment: the options, and the data, weights, model and hospitals they name.

Everything that determines a result is in ``Options``; nothing is chosen by looking at test images.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from dopamine_lib import data
from dopamine_lib.data.dataset import Dataset
from dopamine_lib.data.hospitals import SPLITS, split_hospitals
from dopamine_lib.errors import InputError, check_delta, check_epsilon
from dopamine_lib.federation.aggregation import AGGREGATIONS, NOISES, make_aggregation, make_integer_noise
from dopamine_lib.federation.bounds import Bound, centre_multiplier
from dopamine_lib.federation.settings import DELTA, SETTINGS, Choice, Setting, choice_for, setting
from dopamine_lib.federation.training import Training
from dopamine_lib.models.networks import MODELS, Weights, build, extract_features, load_weights, to_input
from dopamine_lib.privacy.accounting import ACCOUNTANTS, SampledGaussian, noise_multiplier_for
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.integer_noise import IntegerNoise
from dopamine_lib.privacy.randomness import Randomness


@dataclass(frozen=True)
class Options:
    """What ``reproduce`` is asked for; the fields are the command line's.

    seed     None for randomness from the operating system; the split of the patients then uses seed 0
    epsilon  None for the paper's sigma; else sigma is recalibrated to this bound by ``accountant``
    least    hospitals that must survive a round, and whose noise makes up sigma; None for all of them
    dropout  probability that a hospital vanishes in a round
    Raises InputError for a value out of its bounds.
    """

    data: str = "synthetic"
    data_dir: str | None = None
    size: int | None = None
    model: str = "head"
    weights: str | None = None
    settings: tuple[str, ...] = tuple(SETTINGS)
    runs: int = 5
    seed: int | None = None
    hospitals: int = 10
    split: str = "iid"
    epsilon: float | None = None
    delta: float = DELTA
    accountant: str = "prv"
    aggregation: str = "plain"
    noise: str = "float"
    least: int | None = None
    dropout: float = 0.0

    def __post_init__(self):
        for name in self.settings:
            setting(name)
        for value, known, what in (
            (self.data, data.SOURCES, "data"),
            (self.model, MODELS, "model"),
            (self.split, SPLITS, "split"),
            (self.accountant, ACCOUNTANTS, "accountant"),
            (self.aggregation, AGGREGATIONS, "aggregation"),
            (self.noise, NOISES, "noise"),
        ):
            if value not in known:
                raise InputError(f"{what} '{value}' is unknown; choose one of {', '.join(known)}")
        if not self.settings:
            raise InputError(f"no setting was named; choose from {', '.join(SETTINGS)}")
        if not 1 <= self.runs <= 1000:
            raise InputError(f"runs is {self.runs}, but must lie in [1, 1000]: 5 is the paper's")
        if not 2 <= self.hospitals <= 1000:
            raise InputError(f"hospitals is {self.hospitals}, but must lie in [2, 1000]: 10 is the paper's")
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}, but must not be negative; leave it out for real randomness")
        if self.least is not None and not 2 <= self.least <= self.hospitals:
            raise InputError(f"least is {self.least}, but must lie in [2, {self.hospitals}], the number of hospitals")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}, but must lie in [0, 1): it is a probability")
        if self.noise == "integer" and self.epsilon is not None:
            raise InputError("noise integer has a bound of its own: give --epsilon or --noise integer, not both")
        check_delta(self.delta)

    @property
    def survivors(self) -> int:
        """Hospitals whose noise makes up sigma where noise is shared."""
        return self.least or self.hospitals

    @property
    def public_seed(self) -> int:
        """Seed of what protects nobody: splits, initial weights, the draw of participants."""
        return self.seed or 0


class Experiment:
    """Data, weights, model and hospitals of one set of options, ready to train any of the settings.

    Trains on the data set's training patients and scores on its test images.
    """

    def __init__(self, options: Options, *, progress: bool = True):
        self.options = options
        size = options.size
        if size is None and options.data == "retinamnist" and options.model != "cnn":
            size = 224  # SqueezeNet sees next to nothing in 28 pixels
        self.dataset: Dataset = data.load(options.data, options.data_dir, size=size, seed=options.public_seed)
        self.train, self.test = self.dataset.train, self.dataset.test
        self.weights: Weights = load_weights("random" if options.model == "cnn" else options.weights)
        self.labels = torch.from_numpy(np.array(self.dataset.labels))
        if options.model == "head":
            self.features = extract_features(
                self.weights, self.dataset.images, seed=options.public_seed, progress=progress
            )
        self.patients = split_hospitals(self.dataset, options.hospitals, split=options.split, seed=options.public_seed)
        self._calibrated: dict[str, Setting] = {}
        self._integer: dict[str, IntegerNoise] = {}

    @property
    def sizes(self) -> list[int]:
        """Training patients of each hospital."""
        return [len(own) for own in self.patients]

    def hold_out_validation(self) -> None:
        """From here on train without the validation patients and score on them: for choices made by looking."""
        self.train, self.test = self.dataset.fit, self.dataset.validation
        self.patients = [np.intersect1d(own, self.train) for own in self.patients]

    def setting(self, name: str) -> Setting:
        """The declared setting, with sigma recalibrated where a bound was asked for."""
        if name not in self._calibrated:
            declared = setting(name)
            if self.options.epsilon is not None and declared.private:
                choice = choice_for(self.options.model, name, self.options.epsilon)
                centre = centre_multiplier(declared, choice, self._shares(declared))
                sigma = noise_multiplier_for(
                    self.options.epsilon,
                    declared.sample_rate,
                    declared.steps,
                    self.options.delta,
                    self.options.accountant,
                    () if centre is None else (SampledGaussian(centre, 1.0, 1),),
                )
                declared = declared.with_noise(sigma)
            self._calibrated[name] = declared
        return self._calibrated[name]

    def _shares(self, declared: Setting) -> int:
        return self.options.survivors if declared.federated else 1

    def choice(self, name: str) -> Choice:
        """Learning rate, clip and averaging of this model.

        Where a bound asked for needs more noise than was declared, the learning rate shrinks in proportion, so
        that the noise moves the model as far as before (validation patients agree at epsilon 1 and 3).
        """
        choice, used = choice_for(self.options.model, name, self.options.epsilon), self.setting(name)
        if self.options.noise == "integer" and used.federated and used.shared_noise:
            choice = replace(choice, centre=None)  # the mean features would need integers of their own
        if not used.private or used.noise_multiplier <= SETTINGS[name].noise_multiplier:
            return choice
        shrink = SETTINGS[name].noise_multiplier / used.noise_multiplier
        return replace(choice, learning_rate=choice.learning_rate * shrink)

    def task(self, run: int = 0) -> Task:
        """The model with this run's initial weights, and its images."""
        classes = len(self.dataset.grades)
        net = build(self.options.model, classes, self.weights, self.options.public_seed + run)
        if self.options.model == "head":
            return HeadTask(net, self.features, self.labels)
        images, mean, std = self.dataset.images, self.weights.mean, self.weights.std
        return Task(net, lambda index: to_input(images[index.numpy()], mean, std), self.labels)

    def training(self, name: str, run: int = 0, **changes) -> Training:
        """A run of a setting, not yet begun; ``changes`` replace arguments of Training, e.g. ``choice``."""
        declared, task, integer = self.setting(name), self.task(run), self.integer(name)
        choice = changes.get("choice", self.choice(name))
        arguments = dict(
            setting=declared,
            choice=choice,
            task=task,
            aggregation=make_aggregation(
                self.options.aggregation if declared.federated else "plain",
                choice,
                hospitals=self.options.hospitals,
                d=task.d,
                least=self._shares(declared) if declared.shared_noise else 2,
                integer=integer,
            ),
            integer=integer,
            least=self._shares(declared),
            dropout=self.options.dropout if declared.federated else 0.0,
            patients=self.patients if declared.federated else [self.train],
            randomness=Randomness(self.options.seed),
            delta=self.options.delta,
            budget=self.options.epsilon if self.options.epsilon is not None else math.inf,
            accountant=self.options.accountant,
            seed=self.options.public_seed,
            run=run,
        )
        return Training(**(arguments | changes))

    def bound(self, name: str) -> Bound:
        """What the messages of a setting spend."""
        declared = self.setting(name)
        return Bound(declared, self.choice(name), self._shares(declared), self.options.delta, self.integer(name))

    def integer(self, name: str) -> IntegerNoise | None:
        """The noise in the integers, where it was asked for and messages are noisy sums of hospitals."""
        declared, options = self.setting(name), self.options
        if options.noise == "float" or not (declared.private and declared.federated and declared.shared_noise):
            return None
        if name not in self._integer:
            terms = (self.choice(name), self.sizes, self.task().d, options.survivors)
            self._integer[name] = make_integer_noise(options.aggregation, declared, *terms)
        return self._integer[name]

    def predictions(self, training: Training) -> np.ndarray:
        """Predicted grades of the test images by the model that would be handed out now."""
        return training.task.logits(training.server.model, torch.as_tensor(self.test)).argmax(1).numpy()

    def accuracy(self, training: Training) -> float:
        """Share of the test images graded right."""
        return float(np.mean(self.predictions(training) == self.dataset.labels[self.test]))

    def metadata(self, name: str, statement: str) -> dict:
        """What a model file says of itself."""
        return {
            "architecture": self.options.model,
            "preprocessing": {"size": self.dataset.size, "mean": self.weights.mean, "std": self.weights.std},
            "grades": self.dataset.grades,
            "data": self.options.data,
            "weights": self.weights.source,
            "backbone_sha256": self.weights.sha256 if self.options.model == "head" else None,
            "backbone_seed": self.options.public_seed,
            "setting": name,
            "statement": statement,
        }
