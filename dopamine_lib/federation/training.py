"""Algorithm 1: the one training function behind all five settings."""

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.server import Aggregation, PlainAggregation, Server
from dopamine_lib.federation.settings import DELTA, EPOCHS, Choice, Setting
from dopamine_lib.privacy.accounting import Ledger
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.randomness import Randomness


@dataclass
class Progress:
    """How far a run is.

    epoch     epochs whose steps are in the model
    reserved  epochs whose steps are in the ledger; ahead of ``epoch`` while one is being trained
    history   one record per finished epoch
    """

    epoch: int = 0
    reserved: int = 0
    history: list[dict] = field(default_factory=list)


class Training:
    """One run of one setting, able to stop and go on.

    patients  one index array per hospital (all training patients as one array where nothing is federated)
    seed      of the public draw of participants
    budget    epsilon that is not passed, by ``accountant``; training stops before the step that would
    Raises ValueError where a private setting has no finite clipping norm.
    """

    def __init__(
        self,
        setting: Setting,
        choice: Choice,
        task: Task,
        patients: list[np.ndarray],
        randomness: Randomness,
        *,
        aggregation: Aggregation | None = None,
        delta: float = DELTA,
        budget: float = math.inf,
        accountant: str = "prv",
        seed: int = 0,
        run: int = 0,
    ):
        if setting.private and math.isinf(choice.max_grad_norm):
            raise ValueError(
                f"{setting.name} is private and needs a finite max_grad_norm: without one nothing is bounded"
            )
        self.setting, self.choice, self.task, self.run = setting, choice, task, run
        self.randomness, self.aggregation = randomness, aggregation or PlainAggregation()
        shares = len(patients) if setting.shared_noise else 1
        self.hospitals = [
            Hospital(k, own, task, setting, choice, randomness, shares=shares, run=run)
            for k, own in enumerate(patients)
        ]
        self.population = sum(map(len, self.hospitals))
        self.server = Server(task.start, choice)
        # where the noise is shared one ledger holds for everybody; else each hospital keeps its own
        ledgers = (1 if setting.shared_noise else len(patients)) if setting.private else 0
        self.ledgers = [
            Ledger(setting.noise_multiplier, setting.sample_rate, delta, budget, accountant, planned=setting.steps)
            for _ in range(ledgers)
        ]
        self.schedule = self._schedule(seed)
        self.progress = Progress()

    def epochs(self, save=lambda: None):
        """Train epoch by epoch, yielding the number of epochs done; stops early where the budget ends.

        save  called when the state must be on disk: once an epoch's steps are in the ledger, before their
              noise is drawn
        """
        progress = self.progress
        if not self.randomness.seeded and self.ledgers and progress.reserved > progress.epoch:
            # an epoch that was begun cannot be repeated with the same noise: it is spent, and skipped
            progress.epoch = progress.reserved
            yield progress.epoch
        while progress.epoch < EPOCHS and self.setting.round_after(progress.epoch) < len(self.schedule):
            first, last = (self.setting.round_after(progress.epoch + ahead) for ahead in (0, 1))
            rounds = range(first, min(last, len(self.schedule)))
            if progress.reserved == progress.epoch:
                self._charge(rounds)
                progress.reserved += 1
                save()
            for number in rounds:
                self._round(number)
            progress.epoch += 1
            yield progress.epoch

    def epsilons(self, accountant: str) -> list[float]:
        """Epsilon spent so far by each ledger; empty without privacy."""
        return [ledger.spent(accountant) for ledger in self.ledgers]

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """What a checkpoint holds: the server's vectors, and ledger and progress as plain data."""
        vectors = {"w": self.server.w, "velocity": self.server.velocity, "mean": self.server.mean}
        charged = [ledger.charged for ledger in self.ledgers]
        return vectors, {"server_steps": self.server.steps, "charged": charged, **asdict(self.progress)}

    def restore(self, vectors: dict[str, torch.Tensor], record: dict) -> None:
        """Go on from a ``state``."""
        self.server.w, self.server.velocity, self.server.mean = (vectors[key] for key in ("w", "velocity", "mean"))
        self.server.steps = record["server_steps"]
        for ledger, charged in zip(self.ledgers, record["charged"], strict=True):
            ledger.charged = charged
        self.progress = Progress(record["epoch"], record["reserved"], record["history"])

    def _schedule(self, seed: int) -> list[list[int]]:
        """Who takes part in each round. The draw is public; a hospital whose budget is spent sits out.

        Under shared noise all take part or none, so the schedule ends where the budget does.
        """
        everybody = list(range(len(self.hospitals)))
        invited = max(1, round(self.setting.participation * len(everybody)))
        if self.setting.shared_noise or not self.setting.private:
            rounds = int(min([self.setting.rounds, *(ledger.left for ledger in self.ledgers)]))
        else:
            rounds = self.setting.rounds
        if invited == len(everybody):
            return [everybody] * rounds
        rng = np.random.default_rng([seed, self.run])
        left = [ledger.left for ledger in self.ledgers] or [math.inf] * len(everybody)
        schedule = []
        for _ in range(rounds):
            drawn = sorted(rng.choice(everybody, size=invited, replace=False).tolist())
            schedule.append([k for k in drawn if left[k] >= self.setting.local_steps])
            for k in schedule[-1]:
                left[k] -= self.setting.local_steps
        return schedule

    def _charge(self, rounds: range) -> None:
        """Enter the steps of ``rounds`` into the ledgers before their noise is drawn (lines 17 to 20)."""
        for k, ledger in enumerate(self.ledgers):
            taken = sum(k in self.schedule[number] for number in rounds)
            ledger.charge(taken * self.setting.local_steps)

    @torch.no_grad()
    def _round(self, number: int) -> None:
        """One pass of the loop of Algorithm 1 (lines 6 to 21), all hospitals' gradients in one batch."""
        present = [self.hospitals[k] for k in self.schedule[number]]
        if not present:
            return
        if self.setting.local_steps > 1:
            here = sum(map(len, present))
            changes = [hospital.train_locally(self.server.w, number) * (len(hospital) / here) for hospital in present]
            self.server.average_step(self.aggregation.total(changes))
            return
        samples = [hospital.sample(number) for hospital in present]
        group = torch.repeat_interleave(torch.arange(len(present)), torch.tensor([len(sample) for sample in samples]))
        sums = self.task.clipped_sums(self.server.w, torch.cat(samples), self.choice.max_grad_norm, group, len(present))
        messages = [hospital.noised(own, number) for hospital, own in zip(present, sums, strict=True)]
        expected_batch = self.setting.sample_rate * self.population  # public, unlike the batch (register, 2)
        self.server.gradient_step(self.aggregation.total(messages) / expected_batch)
