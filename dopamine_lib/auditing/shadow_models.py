"""The models of a membership attack: targets as ``reproduce`` makes them, and the attacker's shadow models.

A target is one run of one setting on its own split of the patients into training and test, so that every patient is a
member of some targets and not of others. The attacker has records like these and trains shadow heads on random
halves of them, with the setting's published parameters: many at once, in one batched product a step. Their training
equals ``federation.training`` up to the source of randomness, which is a fast seeded generator here: the noise of an
attacker's own models hides nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dopamine_lib.auditing.membership import confidence
from dopamine_lib.data.dataset import APTOS_IMAGES, APTOS_TEST, split_by_person
from dopamine_lib.data.hospitals import declared_sizes, hospital_shares, split_hospitals
from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import local_change
from dopamine_lib.federation.server import Server
from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.machine import threads
from dopamine_lib.privacy.balanced import join, log_shares, take_apart
from dopamine_lib.privacy.dpsgd import clip_factors
from dopamine_lib.privacy.head import STRETCH, for_raw_features, unit_rows

#: Shadow models trained in one batch: more do not fit a core's cache, and gain nothing.
TOGETHER = 16
#: Models that are one linear layer from zero, on frozen features or on a table's rows.
HEADS = ("head", "linear")


def other_split(experiment: Experiment, seed: int) -> Experiment:
    """The same patients dealt anew into training, validation, test and hospitals, as a seed does with real data.

    The experiment's own seed gives its own split, the one that ``reproduce`` uses.
    """
    dataset, terms = experiment.dataset, experiment.options
    if seed == terms.public_seed:
        return experiment
    parts = split_by_person(dataset.person, test_fraction=APTOS_TEST / APTOS_IMAGES, seed=seed)
    dataset = replace(dataset, **dict(zip(("train", "validation", "test"), parts, strict=True)))
    shares = hospital_shares(dataset, terms.hospitals, split=terms.split, seed=seed)
    patients = split_hospitals(dataset, terms.hospitals, split=terms.split, seed=seed)
    dealt = experiment.dealt(patients, declared_sizes(sum(experiment.sizes), shares))
    return replace(dealt, dataset=dataset, train=dataset.train, test=dataset.test)


@dataclass(frozen=True)
class Targets:
    """Attacked models: phi (T, N) of all patients, members bool (T, N), and accuracy (T,) on the test images.

    epsilon  of the worst-off ledger of all targets by the PRV accountant; None where nothing is private
    """

    phi: np.ndarray
    members: np.ndarray
    accuracy: np.ndarray
    epsilon: float | None


def train_targets(experiment: Experiment, name: str, count: int) -> Targets:
    """``count`` runs of a setting, run r on split r, each the model that ``reproduce`` makes of it."""
    phi, members, accuracy, charged = [], [], [], []
    for run in range(count):
        own = other_split(experiment, experiment.options.public_seed + run)
        training, everybody = own.training(name, run).run(), np.arange(len(own.dataset))
        logits = training.task.logits(training.server.model, torch.from_numpy(everybody))
        phi.append(confidence(logits, own.dataset.labels))
        members.append(np.isin(everybody, own.train))
        accuracy.append(own.accuracy(training))
        charged += [ledger.charged for ledger in training.ledgers]
    epsilon = experiment.plan(name).bound.epsilon(max(charged), "prv") if charged else None
    return Targets(np.array(phi), np.array(members), np.array(accuracy), epsilon)


def shadow_confidences(experiment: Experiment, name: str, count: int, *, seed: int = 0) -> np.ndarray:
    """phi (count, N) of shadow heads, each trained on a random half of all persons; NaN for those in that half.

    The halves come in complementary pairs, so half of the models were trained without any given patient. Raises
    InputError for an odd count or fewer than 4, for any model but ``HEADS``, for others are too slow to train in bulk,
    and for a setting whose local steps are in one noisy sum.
    """
    if experiment.options.model not in HEADS:
        known = " and ".join(HEADS)
        raise InputError(f"shadow models are trained for --model {known} only: their training takes seconds")
    if count < 4 or count % 2:
        raise InputError(f"{count} shadow models cannot leave every patient out of half of them: take 4, 6, 8 ...")
    plan, rng = experiment.plan(name), np.random.default_rng(seed)
    if plan.setting.local_steps > plan.setting.noisy_steps:  # their averaging would be another algorithm
        steps = plan.setting.local_steps
        raise InputError(f"shadow models take one step a round, but {name} takes {steps}: attack it at 1")
    _, person, images = np.unique(experiment.dataset.person, return_inverse=True, return_counts=True)
    images_of = np.split(person.argsort(kind="stable"), images.cumsum()[:-1])
    patients = []
    for _ in range(count // 2):  # the attacker need not know who is in which hospital
        for half in np.array_split(rng.permutation(len(images_of)), 2):
            hospitals = np.array_split(half, plan.hospitals)
            patients.append([np.concatenate([images_of[one] for one in own]) for own in hospitals])
    x, phi, classes = F.pad(experiment.features, (0, 1), value=1.0), [], len(experiment.dataset.grades)
    for first in range(0, count, TOGETHER):
        some = patients[first : first + TOGETHER]
        terms = (experiment.features, experiment.labels, some, plan.setting, plan.choice)
        heads = train_heads(*terms, classes=classes, seed=seed + first, person=person)
        phi += [confidence(x @ head.T, experiment.dataset.labels) for head in heads]
    for own, members in zip(phi, patients, strict=True):
        own[np.concatenate(members)] = np.nan
    return np.array(phi)


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    patients: list[list[np.ndarray]],
    setting: Setting,
    choice: Choice,
    *,
    classes: int = 5,
    seed: int = 0,
    person: np.ndarray | None = None,
) -> Tensor:
    """Linear heads (M, classes, p + 1) for the features (N, p) as they are, the bias last, all trained in lock-step.

    patients  for each of M models the indices of its hospitals' patients' images
    person    int (N,), 0 … P-1: who each image belongs to; by default everybody has one

    In C, CDP and FSCDP the hospitals' samples and noises add up to one sample and one noise of sigma C, so a model is
    one group. In F and FPDP every hospital that takes part in a round is a group with a model and noise of its own.
    """
    with threads(1):
        return _Crowd(features, labels, patients, setting, choice, classes, seed, person).train()


class _Crowd:
    """M heads in training, whose rounds are those of ``federation``: a hospital's local change, the server's step.

    Parameters are (G, classes, p + 1) for G groups of patients; a batch of groups stands where Training has one task.
    Noise is floating-point, and not rounded to a grid: nothing of these models is released, the attacker keeps them.
    """

    def __init__(self, features, labels, patients, setting: Setting, choice: Choice, classes: int, seed: int, person):
        self.setting, self.choice, self.features = setting, choice, features
        self.onehot, self.squares = F.one_hot(labels, classes).float(), features.square().sum(1)
        self.rng, self.noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.models, self.local = len(patients), setting.local_steps > 1
        self.hospitals = patients if self.local else [[np.concatenate(own)] for own in patients]
        self.person = np.arange(len(features)) if person is None else person
        self.images = np.bincount(self.person)  # of each person
        if len(self.images) < len(self.person):  # groups are of persons then, and a sample has one image of each
            self.hospitals = [[np.unique(self.person[images]) for images in own] for own in self.hospitals]
        self.by_person, self.first = self.person.argsort(kind="stable"), self.images.cumsum() - self.images
        self.population = torch.tensor([sum(map(len, own)) for own in patients], dtype=torch.float32)[:, None, None]
        self.mean, self.stretch = torch.zeros(self.models, features.shape[1]), 1.0
        self.offset = torch.zeros(self.models, classes)  # of a balanced loss, as in ``Task.offset``
        if choice.mean_noise_multiplier is not None:
            self._take_first(patients)

    def train(self) -> Tensor:
        """All rounds; the heads handed out, for the features as they are."""
        start = torch.zeros(self.models, self.onehot.shape[1], self.features.shape[1] + 1)
        server = Server(start, self.setting, self.choice, self.population)
        everybody = [own[0] for own in self.hospitals]
        for _ in range(self.setting.rounds):
            if self.local:
                server.step(*self._weighted_changes(server.w))
            else:
                server.step(self._noisy_sums(server.w, everybody, range(self.models)), self.population)
        return for_raw_features(server.model, self.mean, self.stretch)

    def _weighted_changes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """A round of F or FPDP: the total of each model's present hospitals' messages, and their patients."""
        invited = max(1, round(self.setting.participation * len(self.hospitals[0])))
        model = np.repeat(np.arange(self.models), invited)
        drawn = [self.rng.choice(len(own), invited, replace=False) for own in self.hospitals]
        groups = [self.hospitals[m][k] for m, own in enumerate(drawn) for k in own]
        sizes = torch.tensor([len(own) for own in groups], dtype=torch.float32)[:, None, None]
        change = local_change(
            w[model],
            lambda local, i: self._noisy_sums(local, groups, model),
            self.choice,
            self.setting.local_steps,
            self.setting.sample_rate * sizes,
        )
        messages = change * (sizes / self.population[model])
        return tuple(each.unflatten(0, (self.models, invited)).sum(1) for each in (messages, sizes))

    def _noisy_sums(self, w: Tensor, groups: list[np.ndarray], model: Sequence[int]) -> Tensor:
        """Algorithm 1, lines 8 to 13, for every group at its own parameters w (G, classes, p + 1)."""
        position, there = poisson_samples(np.array([len(own) for own in groups]), self.setting.sample_rate, self.rng)
        starts = np.cumsum([0, *map(len, groups)])[:-1, None]
        index = torch.from_numpy(self._one_image(np.concatenate(groups)[starts + position]))
        # an input is a (x - m): the products are taken with x as it is, so that the batch is read twice and not more
        x = self.features.index_select(0, index.flatten()).view(*index.shape, -1)
        m, a = self.mean[model], self.stretch
        products = x @ torch.cat([w[..., :-1], m[:, None]], dim=1).mT  # the last column is x m
        biases = w[..., None, :, -1] + self.offset[model][:, None]
        logits = a * (products[..., :-1] - (w[..., :-1] @ m[..., None]).mT) + biases
        error = torch.softmax(logits, dim=-1) - self.onehot[index]
        error *= torch.from_numpy(there)[..., None]
        clip = self.choice.max_grad_norm
        if not np.isinf(clip):
            squares = self.squares[index] - 2 * products[..., -1] + m.square().sum(1)[:, None]
            error *= clip_factors(error.norm(dim=-1) * (a**2 * squares + 1).sqrt(), clip)[..., None]
        total = error.sum(1)[..., None]
        sums = torch.cat([a * (error.mT @ x - total * m[:, None]), total], dim=-1)
        if self.setting.private:
            sums += self.setting.noise_multiplier * clip * torch.randn(sums.shape, generator=self.noise)
        return sums

    def _one_image(self, people: np.ndarray) -> np.ndarray:
        """An image of each person, drawn evenly from its own, as ``Hospital`` does."""
        if len(self.images) == len(self.person):  # everybody has one, which stands for its person
            return people
        return self.by_person[self.first[people] + (self.rng.random(people.shape) * self.images[people]).astype(int)]

    def _take_first(self, patients) -> None:
        """Centre on the noisy mean features, and balance by the noisy class counts, as ``Task.take_first`` does."""
        counts, everybody = self.choice.counts, [np.concatenate(own) for own in patients]
        alone = 1 / torch.from_numpy(self.images[self.person]).float()[:, None]
        unit, onehot = unit_rows(self.features) * alone, self.onehot * alone
        sums = torch.stack(
            [join(unit[own].sum(0), onehot[own].sum(0), counts) if counts else unit[own].sum(0) for own in everybody]
        )
        if self.setting.private:
            sums += self.choice.mean_noise_multiplier * torch.randn(sums.shape, generator=self.noise)
        means = sums / self.population[:, 0]
        if counts:
            apart = [take_apart(mean, onehot.shape[1], counts) for mean in means]
            self.offset = torch.stack([log_shares(shares) for _, shares in apart])
            means = torch.stack([mean for mean, _ in apart])
        if counts < 1:
            self.mean, self.stretch = means, STRETCH


def poisson_samples(sizes: np.ndarray, rate: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One Poisson sample of each group: positions int (G, B) within the group, and bool (G, B) which of them count.

    The gaps between the successes of a row of coins are geometric, so the work is in proportion to the samples.
    """
    total, ends = int(sizes.sum()), np.cumsum(sizes)
    at = np.cumsum(rng.geometric(rate, int(total * rate + 6 * np.sqrt(total * rate)) + 6)) - 1
    while at[-1] < total:  # six standard deviations are hardly ever too few
        at = np.append(at, at[-1] + np.cumsum(rng.geometric(rate, 64)))
    at = at[at < total]
    group = np.searchsorted(ends, at, "right")
    counts = np.bincount(group, minlength=len(sizes))
    there = np.arange(max(1, counts.max())) < counts[:, None]
    position = np.zeros(there.shape, dtype=np.int64)
    position[there] = at - (ends - sizes)[group]
    return position, there
