"""Algorithm 1: the one training function behind all five settings."""

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from dopamine_lib.encryption.messages import AggregationAborted
from dopamine_lib.federation.aggregation import Aggregation, PlainAggregation
from dopamine_lib.federation.bounds import Bound
from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.server import Server
from dopamine_lib.federation.settings import DELTA, EPOCHS, Choice, Setting
from dopamine_lib.privacy.accounting import Ledger
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.integer_noise import IntegerNoise
from dopamine_lib.privacy.randomness import Randomness


@dataclass
class Progress:
    """How far a run is.

    epoch     epochs whose steps are in the model
    reserved  epochs whose steps are in the ledger; ahead of ``epoch`` while one is being trained
    aborted   rounds in which too few hospitals arrived: spent, and nothing was opened
    history   one record per finished epoch
    """

    epoch: int = 0
    reserved: int = 0
    aborted: int = 0
    history: list[dict] = field(default_factory=list)


class Training:
    """One run of one setting, able to stop and go on.

    patients  one index array per hospital (all training patients as one array where nothing is federated)
    integer   noise in the integers, as made with the aggregation
    least     hospitals that must survive a round where their noise is shared, and make up sigma then; all of them
              by default. With more survivors there is more noise than needed: the price of dropouts
    dropout   probability that an invited hospital vanishes in a round, to try that out
    hospital, server  what makes the parties, called like Hospital and Server
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
        integer: IntegerNoise | None = None,
        least: int | None = None,
        dropout: float = 0.0,
        delta: float = DELTA,
        budget: float = math.inf,
        accountant: str = "prv",
        seed: int = 0,
        run: int = 0,
        hospital=Hospital,
        server=Server,
    ):
        if setting.private and math.isinf(choice.max_grad_norm):
            raise ValueError(
                f"{setting.name} is private and needs a finite max_grad_norm: without one nothing is bounded"
            )
        self.setting, self.choice, self.task, self.run = setting, choice, task, run
        self.randomness, self.aggregation = randomness, aggregation or PlainAggregation()
        self.least, self.dropout, self.seed = least or len(patients), dropout, seed
        shares = self.least if setting.shared_noise else 1
        self.hospitals = [
            hospital(k, own, task, setting, choice, randomness, shares=shares, run=run, integer=integer)
            for k, own in enumerate(patients)
        ]
        self.population = sum(map(len, self.hospitals))
        self.server = server(task.start, choice)
        self.bound = Bound(setting, choice, self.least, delta, integer)
        # where the noise is shared one ledger holds for everybody; else each hospital keeps its own
        ledgers = (1 if setting.shared_noise else len(patients)) if setting.private else 0
        terms = (setting.noise_multiplier, setting.sample_rate, delta, budget, accountant, setting.steps)
        self.ledgers = [Ledger(*terms, self.bound.epsilon) for _ in range(ledgers)]
        self.schedule = self._schedule(seed)
        self.progress, self.centre = Progress(), None

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
            if first == 0 and self.choice.centre is not None and self.centre is None:
                self._centre()
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
        if self.centre is not None:
            vectors["centre"] = self.centre
        charged = [ledger.charged for ledger in self.ledgers]
        return vectors, {"server_steps": self.server.steps, "charged": charged, **asdict(self.progress)}

    def restore(self, vectors: dict[str, torch.Tensor], record: dict) -> None:
        """Go on from a ``state``."""
        self.server.w, self.server.velocity, self.server.mean = (vectors[key] for key in ("w", "velocity", "mean"))
        self.server.steps = record["server_steps"]
        for ledger, charged in zip(self.ledgers, record["charged"], strict=True):
            ledger.charged = charged
        self.progress = Progress(**{key: record[key] for key in ("epoch", "reserved", "aborted", "history")})
        if "centre" in vectors:
            self._centre_on(vectors["centre"])

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
    def _centre(self) -> None:
        """Ask once for the patients' mean features, noised, and measure the head's features from there."""
        multiplier = (self.choice.centre or 0.0) / math.sqrt(self.least)
        arrived = [self.hospitals[k] for k in self._arrived(-1, range(len(self.hospitals)))]
        sums = {hospital.number: hospital.centre_message(multiplier) for hospital in arrived}
        size, share = len(next(iter(sums.values()), ())), self.population / len(self.hospitals)
        # a session adds d values: the rest is zeros. Divided by a hospital's share they are as small as other messages
        messages = {k: torch.cat([own / share, own.new_zeros(self.task.d - size)]) for k, own in sums.items()}
        total = self._total(-1, list(range(len(self.hospitals))), messages)
        if total is not None:
            self._centre_on(total[:size] * share / sum(map(len, arrived)))

    def _centre_on(self, centre: torch.Tensor) -> None:
        self.centre = centre
        self.task.centre_on(centre)

    def _arrived(self, number: int, invited) -> list[int]:
        """Which of the invited hospitals do not vanish in this round."""
        if not self.dropout:
            return list(invited)
        chance = np.random.default_rng([self.seed, self.run, number + 1]).random(len(self.hospitals))
        return [k for k in invited if chance[k] >= self.dropout]

    def _total(self, number: int, invited: list[int], messages: dict) -> torch.Tensor | None:
        """The total (d,) of what arrived; None, with the round spent, where that is too little to be opened."""
        try:
            if not messages or (self.setting.shared_noise and len(messages) < self.least):
                raise AggregationAborted(
                    f"{len(messages)} hospitals arrived, but their noise is enough from {self.least}"
                )
            sent = {k: self.aggregation.encode(message) for k, message in messages.items()}
            return self.aggregation.total(number + 1, invited, sent)
        except AggregationAborted:
            self.progress.aborted += 1
            return None

    @torch.no_grad()
    def _round(self, number: int) -> None:
        """One pass of the loop of Algorithm 1 (lines 6 to 21)."""
        invited = self.schedule[number]
        present = [self.hospitals[k] for k in self._arrived(number, invited)]
        here = sum(map(len, present))
        messages = self._messages(present, number) if present else {}
        total = self._total(number, invited, messages)
        if total is None:
            return
        if self.setting.local_steps > 1:
            self.server.average_step(total * (self.population / here))
        else:  # divided by the public expected batch, unlike the batch itself (register, 2)
            self.server.gradient_step(total / (self.setting.sample_rate * here))

    def _messages(self, present: list[Hospital], number: int) -> dict:
        """What the hospitals that are there send, by hospital."""
        w, clip = self.server.w, self.choice.max_grad_norm
        if self.setting.local_steps > 1:
            return {h.number: h.train_locally(w, number) * (len(h) / self.population) for h in present}
        if len(present) == 1:  # putting hospitals together would take longer than its step
            return {present[0].number: present[0].message(w, number)}
        # hospital.message(w, number) of each, all their gradients out of one batch
        samples = [hospital.sample(number) for hospital in present]
        group = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample) for sample in samples]))
        sums = self.task.clipped_sums(w, torch.cat(samples), clip, group, len(samples))
        return {h.number: h.noised(own, number) for h, own in zip(present, sums, strict=True)}
