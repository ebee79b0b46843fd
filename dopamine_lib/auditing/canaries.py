"""Gradient canaries: patients made up so that Algorithm 1 gives them away as far as its bound allows, and no further.

A canary is alone in a coordinate of the features and so large there that its gradient is always clipped: whatever the
model is, it adds C in one direction that nobody else moves. What runs is the kit's own ``Training``, with its
hospitals, its samples, its clipping, its noise and its ledgers; only the patients are made up, and an aggregation
looks on, as the server can: at the total where hospitals' noise is shared, else at every hospital's message.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dopamine_lib.auditing.audit import OneRun, Verdict, audit, claims, one_run_audit
from dopamine_lib.errors import InputError
from dopamine_lib.federation.aggregation import Message, in_the_clear
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


class Watcher:
    """Adds up in the clear and keeps what ``look(messages, total)`` makes of every round; both are decoded, (d,) each.

    It is the auditor's eye, not a way to train: ``seen`` grows by one entry per round. Every ``rounds`` rounds a new
    release begins, to which nothing may be carried over.
    """

    def __init__(self, plan: Plan, look: Callable[[dict[int, Tensor], Tensor], object], rounds: int = 1):
        self.plan, self.look, self.rounds, self.seen = plan, look, rounds, []
        self._sum = in_the_clear(plan)

    def total(self, round_number: int, invited: list[int], messages: dict[int, Message]) -> Tensor:
        """The sum of the messages, and a look at it."""
        total = self._sum.total(round_number, invited, messages)
        if self.plan.codec is not None:
            messages = {k: self.plan.decoded(round_number, message) for k, message in messages.items()}
        self.seen.append(self.look(messages, total))
        return total


def canary_head(patients: int, strength: float = STRENGTH) -> HeadTask:
    """``patients`` ordinary patients and one canary, the last, for a head with two classes on patients + 1 features."""
    features = torch.eye(patients + 1)
    features[-1] *= strength
    return HeadTask(_zeros(patients + 1, 2), features, torch.arange(patients + 1) % 2)


def swing_head(patients: int, hospitals: int = 16) -> HeadTask:
    """One canary, the last, whose hospital's other patients go where its model leans; elsewhere nobody has features.

    They have the canary's only feature, and half of them its grade. At a model of zeros their gradients cancel out; at
    one that leans, those that it grades right have hardly any, and the others all pull one way.
    """
    features, own = torch.zeros(patients + 1, 1), patients // hospitals
    features[:own] = features[-1] = STRENGTH
    return HeadTask(_zeros(1, 2), features, (torch.arange(patients + 1) - patients) % 2)


def _zeros(features: int, classes: int) -> nn.Linear:
    net = nn.Linear(features, classes)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


@dataclass(frozen=True)
class Scene:
    """A tiny federation with or without a canary in its first hospital, and what the server sees of it.

    setting        name of one of the five; its sample rate and noise multiplier are replaced, all hospitals take part
    rounds         rounds in one release, which are composed
    local_steps    steps at a hospital in a round, where the setting has several
    patients       ordinary patients of each hospital
    learning_rate  by default so small that the model stands still
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
    learning_rate: float = STANDSTILL
    task: Callable[[int], Task] = canary_head

    def events(self) -> tuple[SampledGaussian, ...]:
        """What one release is charged for."""
        return (SampledGaussian(self.noise_multiplier, self.sample_rate, self._declared(1).steps),)

    def training(
        self, canary: bool, releases: int, randomness: Randomness, *, run: int = 0, task: Task | None = None
    ) -> Training:
        """The federation, ready to train for ``releases`` times ``rounds`` rounds, with a Watcher that looks on."""
        declared = self._declared(releases)
        hospitals = self.hospitals if declared.federated else 1
        task = self.make_task() if task is None else task
        patients = list(np.arange(hospitals * self.patients).reshape(hospitals, -1))
        if canary:
            patients[0] = np.append(patients[0], hospitals * self.patients)
        choice = Choice(self.learning_rate, self.max_grad_norm, momentum=self.momentum)
        direction, unit = self.direction(task), self.max_grad_norm
        if declared.local_steps > 1:
            unit *= -self.learning_rate / (self.sample_rate * hospitals * self.patients)

        def look(messages, total):
            return float((total if declared.shared_noise else messages[0]) @ direction) / unit

        plan = Plan(declared, choice, (self.patients,) * hospitals, task.d)  # declared without the canary
        return Training(plan, task, patients, randomness, aggregation=Watcher(plan, look, self.rounds), run=run)

    def make_task(self) -> Task:
        """The patients of all hospitals and the canary."""
        return self.task((self.hospitals if SETTINGS[self.setting].federated else 1) * self.patients)

    def direction(self, task: Task) -> Tensor:
        """The unit vector (d,) that the canary's gradient has at the start, and keeps."""
        gradient = task.clipped_sums(task.start, torch.tensor([len(task.labels) - 1]), self.max_grad_norm)[0]
        if not math.isclose(float(gradient.norm()), self.max_grad_norm, rel_tol=1e-3):
            raise InputError(
                f"the canary's gradient has norm {float(gradient.norm()):g}, but must be clipped to "
                f"{self.max_grad_norm:g}: make its features longer"
            )
        return gradient / gradient.norm()

    def watch(
        self,
        canary: bool,
        releases: int,
        randomness: Randomness,
        *,
        plant: Plant | None = None,
        adversary: str = "server",
    ) -> np.ndarray:
        """How far each release points in the canary's direction: float64 (releases,).

        adversary  "server" adds up what it sees of all rounds, in units of C; "outsider" sees the final model
        plant      a fault to put into every Training
        """
        # while the model stands still nothing is carried over: one long run serves all releases
        together = releases if adversary == "server" and self.learning_rate == STANDSTILL else 1
        task, seen = self.make_task(), []
        for run in range(releases // together):
            training = self.training(canary, together, randomness, run=run, task=copy(task))
            if plant is not None:
                plant(training)
            training.run()
            if adversary == "server":
                seen.append(np.reshape(training.aggregation.seen, (together, self.rounds)).sum(1))
            else:
                seen.append([float((training.task.start - training.server.model) @ self.direction(training.task))])
        return np.concatenate(seen)

    def audit(
        self, releases: int = 5000, *, seed: int | None = None, confidence: float = 0.95, **watched: Any
    ) -> Verdict:
        """``releases`` with the canary and as many without, compared with everything the accountant claims.

        seed     for a repeatable audit: teaching and tests
        watched  ``plant`` and ``adversary`` of ``watch``
        """
        worlds = []
        for canary in (True, False):
            randomness = Randomness(None if seed is None else f"audit {seed}, {'with' if canary else 'without'}")
            worlds.append(self.watch(canary, releases, randomness, **watched))
        return audit(*worlds, claims(self.events()), confidence)

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
    features: Tensor | None = None,
    labels: Tensor | None = None,
    strength: float = 3.0,
    delta: float = DELTA,
    seed: int | None = None,
    plant: Plant | None = None,
) -> CanaryRun:
    """Train once, on ``features`` (N, p) with ``labels`` (N,) and on each of the canaries with probability one half.

    The head gets one more feature for every canary, in which all others are 0. Canaries are dealt out to all hospitals.
    features  of at least one patient per hospital; by default one per hospital, without any features
    strength  length of a canary's features: enough to be clipped, and little enough that the model does not learn it
              by heart at once, after which it would have no gradient
    seed      for a repeatable run: teaching and tests
    """
    randomness = Randomness(None if seed is None else f"canary run {seed}")
    features = torch.zeros(hospitals, 0) if features is None else features
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    ordinary, width = features.shape
    if ordinary < hospitals:
        raise InputError(f"{ordinary} patients are too few for {hospitals} hospitals: every hospital needs one")
    classes = max(2, int(labels.max()) + 1)
    everybody = torch.zeros(ordinary + canaries, width + canaries)
    everybody[:ordinary, :width] = features
    everybody[ordinary:, width:] = strength * torch.eye(canaries)
    labels = torch.cat([labels, torch.arange(canaries) % classes])
    task = HeadTask(_zeros(width + canaries, classes), everybody, labels)

    included = randomness.stream("coins").uniform(canaries).numpy() < 0.5
    home = np.arange(ordinary + canaries) % (hospitals if setting.federated else 1)
    present = np.concatenate([np.ones(ordinary, bool), included])
    patients = [np.flatnonzero(present & (home == k)) for k in range(home.max() + 1)]
    index = torch.arange(ordinary, ordinary + canaries)
    directions = task.clipped_sums(task.start, index, choice.max_grad_norm, torch.arange(canaries), canaries)

    sums = torch.zeros(len(patients), task.d)

    def look(messages, total):
        for k, message in ({0: total} if setting.shared_noise else messages).items():
            sums[k] += message

    declared = np.bincount(home, minlength=len(patients))  # as if all canaries were in
    plan = Plan(setting, choice, tuple(declared.tolist()), task.d, delta=delta)
    training = Training(plan, task, patients, randomness, aggregation=Watcher(plan, look))
    if plant is not None:
        plant(training)
    training.run()
    towards = sums if setting.local_steps == 1 else -sums  # a change goes against the gradient
    seen = (directions * towards[home[ordinary:] if not setting.shared_noise else np.zeros(canaries, int)]).sum(1)
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
