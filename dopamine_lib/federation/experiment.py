"""An experiment: the data, weights, model and hospitals that a run's options name.

Everything that determines a result is in ``Options``; nothing is chosen by looking at test images.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dopamine_lib import data
from dopamine_lib.data.dataset import VALIDATION_FRACTION, Dataset
from dopamine_lib.data.function import is_function
from dopamine_lib.data.hospitals import declared_sizes, hospital_shares, split_hospitals
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError
from dopamine_lib.federation.aggregation import Aggregation
from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.metrics import at_thresholds, evaluate, screening
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.server import Server
from dopamine_lib.federation.training import Training
from dopamine_lib.federation.transports import make_aggregation
from dopamine_lib.machine import find_device
from dopamine_lib.models.features import extract_features
from dopamine_lib.models.networks import Weights, build, parameter_count, replaced_layers, resident_inputs, to_input
from dopamine_lib.models.tables import TABLE_MODELS
from dopamine_lib.models.weights import load_backbone, load_weights
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness


@dataclass(frozen=True, eq=False)
class Experiment:
    """What the options name, ready to train any of the settings; ``replace`` makes a variation of it.

    features  float32 (N, p) for the models "head" and "linear", else None
    sizes     declared training patients of each hospital: public, and what everything is divided by
    patients  the true ones' indices, one array per hospital; None for a hospital in another process
    train, test  indices of the images that are trained on and of those that are scored
    split_hash   stands for who, by persons' numbers and grades, is at which hospital; for hospitals' eyes only
    device    where networks train; a head, too small to gain by a GPU, always on the processor
    """

    options: Options
    dataset: Dataset
    weights: Weights
    features: Tensor | None
    sizes: tuple[int, ...]
    patients: tuple[np.ndarray | None, ...]
    train: np.ndarray
    test: np.ndarray
    split_hash: str = ""
    device: torch.device = torch.device("cpu")
    _plans: dict[str, Plan] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def load(
        cls, options: Options, *, progress: bool = True, party: int | None = None, device: str = "cpu"
    ) -> "Experiment":
        """The experiment of these options, with the data set's training patients and its test images.

        party  keep only what this party has: a hospital its own patients, SERVER the test images. The source is read
               whole, since the split is made here; the rest is dropped before anything is computed from it
        device  what features are extracted on, and networks train: ``machine.find_device`` knows the names
        Raises InputError for data, weights or a device that are not there.
        """
        place = find_device(device)
        dataset = data.load(options.data, options.data_dir, size=options.image_size, seed=options.public_seed)
        if not is_function(options.model) and bool(dataset.inputs) != (options.model in TABLE_MODELS):
            kind, fitting = ("a table", TABLE_MODELS) if dataset.inputs else ("images", ("head", "cnn", "squeezenet"))
            raise InputError(
                f"model '{options.model}' does not take {kind}, as {dataset.name} is: {' or '.join(fitting)}"
            )
        if options.augment and dataset.inputs:
            raise InputError(f"augment is for images, but {dataset.name} is a table: leave it out")
        if options.hospitals is None:
            options = replace(options, hospitals=len(dataset.sheet.sites))
        terms = {"split": options.split, "seed": options.public_seed}
        patients = split_hospitals(dataset, options.hospitals, **terms)
        declared = options.patients or dataset.sheet.patients or len(np.unique(dataset.person[dataset.train]))
        sizes = declared_sizes(declared, hospital_shares(dataset, options.hospitals, **terms))
        own = [np.stack([dataset.person[part], dataset.labels[part]]) for part in (*patients, dataset.validation)]
        split_hash = hashlib.sha256(b"|".join(part.astype("<i8").tobytes() for part in own)).hexdigest()
        if party is not None:
            dataset = dataset.rows(dataset.test if party == SERVER else patients[party])
            patients = [dataset.train if k == party else None for k in range(len(sizes))]
        if options.backbone:
            weights = load_backbone(options.backbone)
        else:
            weights = load_weights(options.weights, options.model, dataset.size)
        features = None
        if options.model == "head":
            terms = {"seed": options.public_seed, "progress": progress, "device": place}
            features = extract_features(weights, dataset.images, **terms)
        elif options.model == "linear":
            features = torch.from_numpy(np.array(dataset.images))
        rest = (sizes, tuple(patients), dataset.train, dataset.test, split_hash, place)
        return cls(options, dataset, weights, features, *rest)

    @property
    def counted(self) -> bool:
        """Whether the declared number of patients is their count, for want of a published or given one."""
        return self.options.patients is None and self.dataset.sheet.patients is None

    @property
    def in_words(self) -> str:
        """What was read, in a line: declared and public numbers alone, as in ``results.json``, and of test images.

        How many images training patients have, with which labels, is theirs, and not said.
        """
        data, sizes = self.dataset, self.sizes
        what = f"rows of {len(data.inputs)} numbers" if data.inputs else f"images of {data.size} x {data.size} pixels"
        sites = f" ({', '.join(data.sheet.sites)})" if self.options.split == "site" and data.sheet.sites else ""
        known = "counted" if self.counted else "declared"
        recorded = f"; recorded: {', '.join(data.attributes)}" if data.attributes else ""
        return (
            f"{data.name}: {what}; {len(data.grades)} classes: {', '.join(data.grades)}; {sum(sizes)} training "
            f"patients ({known}) in {len(sizes)} hospitals{sites}; {len(self.test)} to test on{recorded}"
        )

    def dealt(self, patients: list[np.ndarray], sizes: tuple[int, ...] | None = None) -> "Experiment":
        """The same with its training patients dealt anew: one array of indices per hospital.

        sizes  their declared numbers; by default equal shares of the declared number of all
        """
        if sizes is None:
            sizes = declared_sizes(sum(self.sizes), np.full(len(patients), 1 / len(patients)))
        return replace(self, patients=tuple(patients), sizes=sizes, train=np.sort(np.concatenate(patients)))

    def held_out(self) -> "Experiment":
        """The same without the validation patients, which are scored instead: for choices made by looking."""
        declared, shares = round(sum(self.sizes) * (1 - VALIDATION_FRACTION)), np.array(self.sizes) / sum(self.sizes)
        fit = [np.intersect1d(own, self.dataset.fit) for own in self.patients]
        fit = self.dealt(fit, declared_sizes(declared, shares))
        return replace(fit, test=self.dataset.validation)

    @cached_property
    def replaced(self) -> tuple[str, ...]:
        """Names of the model's layers of batch normalisation, which are group normalisation here."""
        return replaced_layers(
            self.options.model, len(self.dataset.grades), len(self.dataset.inputs), self.dataset.size
        )

    @property
    def labels(self) -> Tensor:
        """int64 (N,), the grades of all images."""
        return torch.from_numpy(np.array(self.dataset.labels))

    def plan(self, name: str) -> Plan:
        """The plan of a setting, made once."""
        if name not in self._plans:
            terms = {"backbone": self.options.backbone, "size": self.dataset.size}
            d = parameter_count(self.options.model, len(self.dataset.grades), len(self.dataset.inputs), **terms)
            # a plan that is not federated has all training patients as one
            self._plans[name] = make_plan(self.options, name, self.sizes, d, self.dataset.grades)
        return self._plans[name]

    def task(self, run: int = 0) -> Task:
        """The model with this run's initial weights, and its images."""
        classes, seed = len(self.dataset.grades), self.options.public_seed + run
        net = build(self.options.model, classes, self.weights, seed, len(self.dataset.inputs), self.dataset.size)
        images, mean, std = self.dataset.images, self.weights.mean, self.weights.std
        if self.features is not None:
            return self._of_persons(HeadTask(net, self.features, self.labels))
        if self.dataset.inputs:
            task = self._of_persons(
                Task(net, lambda index: torch.from_numpy(images[index.numpy()]), self.labels, classes=classes)
            )
            task.threads = 1
            return task
        if self.device.type == "cpu":
            return self._of_persons(
                Task(net, lambda index: to_input(images[index.numpy()], mean, std), self.labels, classes=classes)
            )
        return self._of_persons(Task(net.to(self.device), self._resident, self.labels, classes=classes))

    @cached_property
    def _resident(self) -> Callable[[Tensor], Tensor]:
        """The images on the device, kept there for all runs."""
        return resident_inputs(self.dataset.images, self.weights.mean, self.weights.std, self.device)

    def _of_persons(self, task: Task) -> Task:
        """The task, told whose images it has."""
        task.person = torch.from_numpy(np.array(self.dataset.person))
        return task

    def training(
        self,
        name: str,
        run: int = 0,
        *,
        task: Task | None = None,
        aggregation: Aggregation | None = None,
        hospital: Callable[..., Hospital] = Hospital,
        server: Callable[..., Server] = Server,
        **changes: Any,
    ) -> Training:
        """A run of a setting, not yet begun.

        task, aggregation, hospital, server  other parts for the Training
        changes                              new values for fields of the plan, e.g. ``choice``
        """
        plan, task = self.plan(name), self.task(run) if task is None else self._of_persons(task)
        if changes or task.d != plan.d:
            plan = replace(plan, d=task.d, **changes)
        patients = self.patients if plan.setting.federated else [self.train]
        aggregation = make_aggregation(plan) if aggregation is None else aggregation
        parts = {"aggregation": aggregation, "run": run, "hospital": hospital, "server": server}
        return Training(plan, task, patients, Randomness(self.options.seed), **parts)

    def predictions(self, training: Training) -> np.ndarray:
        """Predicted grades of the test images by the model that would be handed out now."""
        return training.task.logits(training.server.model, torch.as_tensor(self.test)).argmax(1).cpu().numpy()

    def scores(self, training: Training) -> dict:
        """``metrics.evaluate`` of the model that would be handed out now, on the test images."""
        return evaluate(self.dataset.labels[self.test], self._probabilities(training), self.dataset.grades)

    def operating_point(self, training: Training) -> dict | None:
        """``metrics.at_thresholds`` of that model on the test images; None where no thresholds were found."""
        if training.thresholds is None:
            return None
        labels, grades = self.dataset.labels[self.test], self.dataset.grades
        return at_thresholds(labels, self._probabilities(training), grades, training.thresholds)

    def _probabilities(self, training: Training) -> np.ndarray:
        logits = training.task.logits(training.server.model, torch.as_tensor(self.test))
        # float64, for in float32 sure answers would tie
        return torch.softmax(logits.double(), 1).numpy(force=True)

    def accuracy(self, training: Training) -> float:
        """Share of the test images graded right."""
        return float(np.mean(self.predictions(training) == self.dataset.labels[self.test]))

    def metadata(self, name: str, statement: str, thresholds: Sequence[float] | None = None) -> dict:
        """What a model file says about itself; ``thresholds`` as a ``Training`` has found them."""
        names = screening(self.dataset.grades) if thresholds else {}
        return {
            "architecture": self.options.model,
            "preprocessing": {"inputs": self.dataset.inputs, "declared": self.dataset.declared}
            if self.dataset.inputs
            else {"size": self.dataset.size, "mean": self.weights.mean, "std": self.weights.std},
            "grades": self.dataset.grades,
            "data": self.options.data,
            "weights": self.weights.source,
            "backbone": self.weights.network if self.options.model == "head" else None,
            "backbone_sha256": self.weights.sha256 if self.options.model == "head" else None,
            "backbone_seed": self.options.public_seed,
            "setting": name,
            "loss": self.options.loss,
            "thresholds": dict(zip(names, thresholds or (), strict=True)),
            "statement": statement,
        }
