"""Gradient canaries: patients made up so that Algorithm 1 gives them away as far as its bound allows, and no further.

A canary is alone in a coordinate of the features and so large there that its gradient is always clipped: whatever the
model is, it adds C in one direction that nobody else moves. What runs is the kit's own ``Training``, with its
hospitals, its samples, its clipping, its noise and its ledgers; only the patients are made up, and an aggregation
looks on, as the server can: at the total where hospitals' noise is shared, else at every hospital's message.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dopamine_lib.auditing.audit import OneRun, Verdict, audit, claims, one_run_audit
from dopamine_lib.errors import InputError
from dopamine_lib.federation.aggregation import PlainAggregation
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import DELTA, SETTINGS, Choice, Setting
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.accounting import SampledGaussian
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness

#: A learning rate that moves no model measurably, so that every round is one more draw of the same step.
STANDSTILL = 1e-9
#: Length of a canary's features: its gradient is clipped at any clipping norm of use.
STRENGTH = 1000.0
#: Puts a fault into a Training before it begins (``planted_faults``).
Plant = Callable[[Training], object]


class Watcher(PlainAggregation):
    """Adds up in the clear and keeps what ``look(messages, total)`` makes of every round.

    It is the auditor's eye, not a way to train: ``seen`` grows by one entry per round. Every ``rounds`` rounds a new
    release begins, to which nothing may be carried over.
    """

    def __init__(self, look: Callable[[dict[int, Tensor], Tensor], object], rounds: int = 1):
        self.look, self.rounds, self.seen = look, rounds, []

    def total(self, round_number: int, invited: list[int], messages: dict[int, Tensor]) -> Tensor:
        """The sum of the messages, and a look at it."""
        total = super().total(round_number, invited, messages)
        self.seen.append(self.look(messages, total))
        return total


def canary_head(patients: int, strength: float = STRENGTH) -> HeadTask:
    """``patients`` ordinary patients and one canary, the last, for a head with two classes on patients + 1 features."""
    features = torch.eye(patients + 1)
    features[-1] *= strength
    return _head(features, torch.arange(patients + 1) % 2)


def _head(features: Tensor, labels: Tensor) -> HeadTask:
    net = nn.Linear(features.shape[1], 2)
    for parameters in net.parameters():
        nn.init.zeros_(parameters)
    return HeadTask(net, features, labels)


@dataclass(frozen=True)
class Scene:
    """A tiny federation with or without a canary in its first hospital, and what the server sees of it.

    setting        name of one of the five; its sample rate and noise multiplier are replaced, all hospitals take part
    rounds         rounds in one release, which are composed
    local_steps    steps at a hospital in a round, where the setting has several
    patients       ordinary patients of each hospital
    task           function from the number of ordinary patients to a Task, in which the canary comes last
    """

    setting: str = "FSCDP"
    noise_multiplier: float = 2.1
    sample_rate: float = 0.5
    rounds: int = 1
    local_steps: int = 2
    hospitals: int = 4
    patients: int = 1
    max_grad_norm: float = 1.0
    momentum: float = 0.0
    task: Callable[[int], Task] = canary_head

    def events(self) -> tuple[SampledGaussian, ...]:
        """What one release is charged for."""
        return (SampledGaussian(self.noise_multiplier, self.sample_rate, self._declared(1).steps),)

    def watch(self, canary: bool, releases: int, randomness: Randomness, *, plant: Plant | None = None) -> np.ndarray:
        """How far each release points in the canary's direction, in units of C: float64 (releases,).

        plant  a fault to put into the Training
        The model stands still, so nothing is carried over, and one long run serves all releases.
        """
        declared = self._declared(releases)
        ordinary = np.arange(self.patients * (self.hospitals if declared.federated else 1))
        patients, task = list(ordinary.reshape(-1, self.patients)), self.task(len(ordinary))
        if canary:
            patients[0] = np.append(patients[0], len(ordinary))
        direction, unit = self._direction(task), self.max_grad_norm
        if declared.local_steps > 1:  # sizes are public: the scale they give a change says nothing
            unit *= -STANDSTILL / (self.sample_rate * sum(map(len, patients)))

        def look(messages, total):
            return float((total if declared.shared_noise else messages[0]) @ direction) / unit

        plan = Plan.of(declared, Choice(STANDSTILL, self.max_grad_norm, momentum=self.momentum), task, patients)
        watcher = Watcher(look, self.rounds)
        training = Training(plan, task, patients, randomness, aggregation=watcher)
        if plant is not None:
            plant(training)
        training.run()
        return np.reshape(watcher.seen, (releases, self.rounds)).sum(1)

    def audit(
        self, releases: int = 5000, *, seed: int | None = None, confidence: float = 0.95, plant: Plant | None = None
    ) -> Verdict:
        """``releases`` with the canary and as many without, compared with everything the accountant claims.

        seed  for a repeatable audit: teaching and tests
        """
        worlds = []
        for canary in (True, False):
            randomness = Randomness(None if seed is None else f"audit {seed}, {'with' if canary else 'without'}")
            worlds.append(self.watch(canary, releases, randomness, plant=plant))
        return audit(*worlds, claims(self.events()), confidence)

    def _direction(self, task: Task) -> Tensor:
        """The unit vector (d,) of the canary's gradient. Raises InputError where that is not clipped."""
        gradient = task.clipped_sums(task.start, torch.tensor([len(task.labels) - 1]), self.max_grad_norm)[0]
        if not math.isclose(float(gradient.norm()), self.max_grad_norm, rel_tol=1e-3):
            raise InputError(
                f"the canary's gradient has norm {float(gradient.norm()):g}, but must be clipped to "
                f"{self.max_grad_norm:g}: make its features longer"
            )
        return gradient / gradient.norm()

    def _declared(self, releases: int) -> Setting:
        declared = SETTINGS[self.setting]
        return replace(
            declared,
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            rounds=releases * self.rounds,
            local_steps=self.local_steps if declared.local_steps > 1 else 1,
            participation=1.0,
        )


@dataclass(frozen=True)
class CanaryRun:
    """One training run with canaries, before anybody guesses.

    included  bool (m,): the coins;  scores  (m,) by adversary: "server", who sees every round, "outsider", who sees
              only the model that is handed out;  epsilon, delta  what was accounted for the worst-off patient
    """

    included: np.ndarray
    scores: dict[str, np.ndarray]
    epsilon: dict[str, float | None]
    delta: float

    def audit(self, adversary: str = "server") -> OneRun:
        """What the guesses of this adversary prove."""
        return one_run_audit(self.scores[adversary], self.included, self.delta)


def canary_run(
    setting: Setting,
    choice: Choice,
    *,
    canaries: int = 400,
    hospitals: int = 10,
    strength: float = 3.0,
    delta: float = DELTA,
    seed: int | None = None,
    plant: Plant | None = None,
) -> CanaryRun:
    """Train once, on one ordinary patient per hospital and on each of the canaries with probability one half.

    The head has one feature for every canary, in which all others are 0. Canaries are dealt out to all hospitals.
    strength  length of a canary's features: long enough to be clipped, short enough that the model does not learn it by
              heart at once, after which it would have no gradient
    seed      for a repeatable run: teaching and tests
    """
    randomness = Randomness(None if seed is None else f"canary run {seed}")
    features = torch.cat([torch.zeros(hospitals, canaries), strength * torch.eye(canaries)])
    labels = torch.cat([torch.zeros(hospitals, dtype=torch.int64), torch.arange(canaries) % 2])
    task = _head(features, labels)

    included = randomness.stream("coins").uniform(canaries).numpy() < 0.5
    home = np.arange(hospitals + canaries) % (hospitals if setting.federated else 1)
    present = np.concatenate([np.ones(hospitals, bool), included])
    patients = [np.flatnonzero(present & (home == k)) for k in range(home.max() + 1)]
    index = torch.arange(hospitals, hospitals + canaries)
    directions = task.clipped_sums(task.start, index, choice.max_grad_norm, torch.arange(canaries), canaries)

    sums = torch.zeros(len(patients), task.d)

    def look(messages, total):
        for k, message in ({0: total} if setting.shared_noise else messages).items():
            sums[k] += message

    plan = Plan.of(setting, choice, task, patients, delta=delta)
    training = Training(plan, task, patients, randomness, aggregation=Watcher(look))
    if plant is not None:
        plant(training)
    training.run()
    towards = sums if setting.local_steps == 1 else -sums  # a change goes against the gradient
    seen = (directions * towards[home[hospitals:] if not setting.shared_noise else np.zeros(canaries, int)]).sum(1)
    logits = task.logits(training.server.model, index)
    worst = max(ledger.charged for ledger in training.ledgers)
    return CanaryRun(
        included,
        {"server": seen.double().numpy(), "outsider": _margin(logits, task.labels[index])},
        training.bound.epsilons(worst),
        delta,
    )


def _margin(logits: Tensor, labels: Tensor) -> np.ndarray:
    """How far each label's score stands above the others' together, (m,): the loss, but without its flat end."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf)
    return (own - others.logsumexp(1)).numpy()
