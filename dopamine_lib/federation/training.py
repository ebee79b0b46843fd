"""Algorithm 1 as it runs: rounds of contribute, total and step, behind all five settings and every transport.

``algorithm1`` has the same on one page. Here the three verbs are

    contribute   ``hospital.contribute``: what the hospitals of this process send (lines 7 to 13). Clipped sums are
                 those of ``dpsgd.Task``, or of ``head.HeadTask`` for the model "head"; the noise is ``Plan.noise``
    total        ``Aggregation.total``: the sum of what arrived; the only verb that a transport replaces (line 21)
    step         ``Server.step``: line 13's division, momentum and learning rate, on the total (lines 13 to 15 and 21);
                 ``OptimizingServer``'s, where an optimiser of one's own takes their place

A hospital that drops out is missing from a total. Where noise is shared, a round with fewer than ``Plan.survivors`` is
spent and not opened. Between processes the aggregation says who was in a total (``wires.sums``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.encryption.messages import AggregationAborted
from dopamine_lib.federation.aggregation import Aggregation, Message, in_the_clear
from dopamine_lib.federation.hospital import Hospital, contribute
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.server import OptimizingServer, Server
from dopamine_lib.machine import threads
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.randomness import Randomness


@dataclass
class Progress:
    """How far a run has come.

    epoch     epochs whose steps are in the model
    reserved  epochs whose steps are in the ledger; ahead of ``epoch`` while one is being trained
    centred   whether the mean features have been asked for
    aborted   rounds in which too few hospitals arrived: spent, and nothing was opened
    history   one record per finished epoch
    """

    epoch: int = 0
    reserved: int = 0
    centred: bool = False
    aborted: int = 0
    history: list[dict] = field(default_factory=list)

    def record(self) -> dict:
        """As plain data; ``asdict`` would copy every number of the history at every checkpoint."""
        return vars(self) | {"history": list(self.history)}


class Training:
    """One run of one plan, which can stop and go on.

    patients     one index array per hospital (where nothing is federated, one array of all training patients); None
                 for a hospital in another process
    aggregation  how messages are added; by default in the clear (``transports.make_aggregation`` makes the plan's)
    hospital, server  what makes the parties, called like Hospital and Server
    Raises ValueError where patients or task are not the plan's, and where an aggregation is needed but not given. How
    many patients a hospital holds is its own affair: no refusal tells of them.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        patients: Sequence[np.ndarray | None],
        randomness: Randomness,
        *,
        aggregation: Aggregation | None = None,
        run: int = 0,
        hospital: Callable[..., Hospital] = Hospital,
        server: Callable[..., Server] = Server,
    ):
        here = [k for k, own in enumerate(patients) if own is not None]
        if len(patients) != plan.hospitals or task.d != plan.d:
            raise ValueError(f"patients or task are not those of the plan: {plan.hospitals} hospitals, d = {plan.d}")
        if aggregation is None and plan.hidden:
            raise ValueError(f"a plan with aggregation '{plan.aggregation}' needs transports.make_aggregation(plan)")
        self.plan, self.task, self.run_number, self.randomness = plan, task, run, randomness
        self.aggregation = in_the_clear(plan) if aggregation is None else aggregation
        if len(here) < plan.hospitals and not getattr(self.aggregation, "between_processes", False):
            raise ValueError(f"only hospitals {here} are in this process, but its aggregation reaches no other")
        self.hospitals = [hospital(k, patients[k], task, plan, randomness, run) for k in here]
        if plan.optimizer != "momentum":
            server = partial(OptimizingServer, optimizer=plan.optimizer)
        self.server = server(task.start, plan.setting, plan.choice, plan.population)
        self.bound, self.ledgers, self.schedule = plan.bound, plan.ledgers(), plan.schedule(run)
        self.progress, self.feature_mean = Progress(), None
        #: Noisy counts (cells,) so far, for ``plan.operating_point``; None before the first.
        self.histogram: Tensor | None = None

    def run(
        self, save: Callable[[], object] = lambda: None, after: Callable[[int], object] = lambda epoch: None
    ) -> "Training":
        """Train to the end, or until ``after``, called with each epoch's number, answers that it is enough.

        Returns itself.
        """
        with threads(self.task.threads or torch.get_num_threads()):
            for epoch in self.epochs(save):
                if after(epoch):
                    break
        return self

    @property
    def thresholds(self) -> list[float] | None:
        """Severities beyond which patients are called, for each of the ``plan.operating_point``'s; None without any."""
        if self.histogram is None:
            return None
        # where hospitals train locally, a message is a change of the model, against the sum
        return self.plan.operating_point.thresholds(self.histogram * (-1 if self.plan.setting.averages else 1))

    @property
    def done(self) -> bool:
        """Whether all epochs are in the model, or all that the budget allows."""
        epoch = self.progress.epoch
        return epoch >= self.plan.setting.epochs or self.plan.setting.round_after(epoch) >= len(self.schedule)

    def epochs(self, save: Callable[[], object] = lambda: None) -> Iterator[int]:
        """Train epoch by epoch, yielding the number of epochs done; stops early where the budget ends.

        save  called when the state must be on disk: once an epoch's steps are in the ledger, before their
              noise is used
        """
        progress = self.progress
        if not self.randomness.seeded and self.ledgers and progress.reserved > progress.epoch:
            # an epoch that was begun cannot be repeated with the same noise: it is spent, and skipped
            progress.epoch = progress.reserved
            yield progress.epoch
        while not self.done:
            rounds = self._rounds(progress.epoch)
            if progress.reserved == progress.epoch:
                self.reserve(progress.epoch + 1)
                save()
            if rounds.start == 0 and self.plan.choice.mean_noise_multiplier is not None and not progress.centred:
                self._ask_for_mean()
                progress.centred = True
                save()
            for number in rounds:
                self._round(number)
            progress.epoch += 1
            yield progress.epoch

    def reserve(self, epochs: int) -> None:
        """Enter the steps of the first ``epochs`` epochs into the ledgers, where they are not in them yet."""
        for epoch in range(self.progress.reserved, epochs):
            for k, ledger in enumerate(self.ledgers):  # lines 17 to 20
                ledger.charge(self._steps_of(k, [epoch]))
            self.progress.reserved += 1

    def epsilons(self, accountant: str) -> list[float]:
        """Epsilon spent so far by each ledger; empty without privacy."""
        return [ledger.spent(accountant) for ledger in self.ledgers]

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a checkpoint holds: the server's vectors, and ledger and progress as plain data."""
        vectors, record = self.server.state()
        if self.feature_mean is not None:
            vectors["centre"] = self.feature_mean
        if self.histogram is not None:
            vectors["histogram"] = self.histogram
        charged = [ledger.charged for ledger in self.ledgers]
        return vectors, {**record, "charged": charged, **self.progress.record()}

    def restore(self, vectors: dict[str, Tensor], record: dict) -> None:
        """Go on from a ``state``; without its vectors where this party has no hospital, and so no model.

        Raises KeyError or ValueError for a state of something else, and for one whose model is ahead of its ledger:
        its rounds would go on without being charged.
        """
        record = {"centred": "centre" in vectors} | record  # checkpoints of older versions do not say it
        progress = Progress(**{key: record[key] for key in vars(self.progress)})
        if not 0 <= progress.epoch <= progress.reserved <= self.plan.setting.epochs:
            raise ValueError(f"{progress.epoch} epochs in the model, and {progress.reserved} in the ledger")
        if record["charged"] != [self._steps_of(k, range(progress.reserved)) for k in range(len(self.ledgers))]:
            raise ValueError(f"{record['charged']} steps charged, which is not what {progress.reserved} epochs take")
        histogram, point = vectors.get("histogram"), self.plan.operating_point
        if histogram is not None and (point is None or histogram.shape != (point.cells,)):
            raise ValueError(f"a histogram of shape {tuple(histogram.shape)}, which this run does not ask for")
        if vectors or self.hospitals:
            self.server.restore(vectors, record)
        self.server.steps = record["server_steps"]
        for ledger, charged in zip(self.ledgers, record["charged"], strict=True):
            ledger.charged = charged
        self.progress = progress
        if "centre" in vectors:
            self._centre_on(vectors["centre"])
        self.histogram = histogram

    def _rounds(self, epoch: int) -> range:
        """The rounds of an epoch, counted from 0."""
        first, last = (self.plan.setting.round_after(epoch + ahead) for ahead in (0, 1))
        return range(first, min(last, len(self.schedule)))

    def _steps_of(self, k: int, epochs: Iterable[int]) -> int:
        """The noisy steps that ledger ``k`` is charged for these epochs."""
        taken = sum(k in self.schedule[number] for epoch in epochs for number in self._rounds(epoch))
        return taken * self.plan.setting.noisy_steps

    @torch.no_grad()
    def _round(self, number: int) -> None:
        """One pass of the loop of Algorithm 1 (lines 6 to 21): contribute, total, step."""
        invited = self.schedule[number]
        arrived, counting = self._arrived(number, invited), self.plan.counts_in(number, self.run_number)
        w = self.server.model if counting else self.server.w
        total = self._total(number, invited, arrived, contribute(self._here(arrived), w, number))
        if total is not None and counting:
            counts = total[: self.plan.operating_point.cells].cpu()
            self.histogram = counts if self.histogram is None else self.histogram + counts
        elif total is not None:
            self.server.step(total.to(self.server.w.device), self._patients(self._included(arrived)))

    @torch.no_grad()
    def _ask_for_mean(self) -> None:
        """Ask once for the patients' mean features, or class counts, noised, and train by them from now on."""
        everybody = range(self.plan.hospitals)
        arrived = self._arrived(-1, everybody)
        total = self._total(-1, list(everybody), arrived, {h.number: h.features() for h in self._here(arrived)})
        if total is not None:
            share = self.plan.population / self.plan.hospitals
            width = len(self.task.first_sum(torch.arange(0), self.plan.choice.counts))
            present = self._patients(self._included(arrived))
            self._centre_on(total[:width] * share / present)  # what follows is padding

    def _centre_on(self, mean: Tensor) -> None:
        self.feature_mean = mean
        self.task.take_first(mean, self.plan.choice.counts)

    def _arrived(self, number: int, invited: Iterable[int]) -> list[int]:
        """Which of the invited hospitals are there, as far as all parties know before the round."""
        if not self.plan.dropout:
            members = getattr(self.aggregation, "members", None)
            return [k for k in invited if members is None or k in members]
        chance = np.random.default_rng([self.plan.seed, self.run_number, number + 1]).random(self.plan.hospitals)
        return [k for k in invited if chance[k] >= self.plan.dropout]

    def _included(self, arrived: list[int]) -> list[int]:
        """Which of them are in the total that was just opened: between processes some may have vanished meanwhile."""
        return list(getattr(self.aggregation, "included", arrived))

    def _here(self, numbers: list[int]) -> list[Hospital]:
        """Those of the hospitals that live in this process."""
        return [hospital for hospital in self.hospitals if hospital.number in numbers]

    def _patients(self, arrived: list[int]) -> int:
        return sum(self.plan.sizes[k] for k in arrived)

    def _total(
        self, number: int, invited: list[int], arrived: list[int], messages: dict[int, Message]
    ) -> Tensor | None:
        """The total (d,) of what arrived; None, with the round spent, where that is too little to be opened."""
        if len(arrived) >= self.plan.least_in_a_total:  # public numbers, so that all parties decide alike
            try:
                return self.aggregation.total(number + 1, invited, messages)
            except AggregationAborted:
                if len(self.hospitals) < self.plan.hospitals:  # the other parties may not have aborted
                    raise
        self.progress.aborted += 1
        return None
