"""A hospital, the one party that touches its patients, and its part of a round: Algorithm 1, lines 7 to 13."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.errors import InputError
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import Choice
from dopamine_lib.machine import cores
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.randomness import Randomness, Stream

#: Blocks of samples and noise that are drawn ahead of use where a device trains.
AHEAD = 3


class NotFinite(InputError):
    """A model with a NaN or an infinity: training diverged, or whoever sent it means no good."""


class Hospital:
    """One of K hospitals with its own patients.

    number    k, from 0
    patients  int64 (N_k,), indices of its patients' images in the task, which knows whose they are
    run       names the run, so that two runs from one seed draw different samples
    """

    def __init__(self, number: int, patients: np.ndarray, task: Task, plan: Plan, randomness: Randomness, run: int = 0):
        self.number, self.patients, self.task, self.plan, self.run = number, torch.as_tensor(patients), task, plan, run
        self.noise = plan.noise
        _, whose, self._images = task.person[self.patients].unique(return_inverse=True, return_counts=True)
        self._by_person = self.patients[whose.argsort(stable=True)]
        self._randomness = randomness
        # draws are made for a block of steps at once: for a small model the calls cost more than the numbers
        together = plan.setting.noisy_steps if plan.setting.averages else 32
        self._block, self._drawn = max(1, min(together, 2**17 // task.d)), None
        #: Where noise is added: on the device that trains, or None for the processor.
        self.device = None if task.start.device.type == "cpu" or plan.discrete else task.start.device
        self._ahead: dict[int, Future] = {}

    def __len__(self) -> int:
        return len(self.patients)

    def sample(self, step: int) -> Tensor:
        """The Poisson sample of this step, indices into the task (line 8): of a person that is drawn, one image."""
        return torch.cat(self._draw(step)[0])

    def noised(self, clipped_sum: Tensor, step: int) -> Tensor | np.ndarray:
        """The clipped sum (d,) with this hospital's share of the noise (line 13); unchanged without privacy.

        Sum and noise are added whatever the sample's size: an empty batch is noised like any other. The result is int64
        (d,), which ``Plan.noise`` decodes.
        """
        if self.noise is None:
            return clipped_sum.to(self.task.start.dtype)
        drawn = self._draw(step)[1]
        if self.device is None:
            return self.noise.combine(clipped_sum.cpu() if isinstance(clipped_sum, Tensor) else clipped_sum, drawn)
        return self.noise.combine_there(clipped_sum[None], [drawn])[0]

    def noisy_sum(self, w: Tensor, step: int) -> Tensor | np.ndarray:
        """The clipped, noised gradient sum (d,) at w (d,), as ``noised`` gives it: lines 7 to 13.

        Of several local steps it is the sum of all their gradients, each at the model that the ones before have made of
        w, and bounded by its rows instead of a clip (``privacy.local_steps``); or that of patients' own trajectories
        (``privacy.trajectories``); or in the last rounds a histogram (``privacy.operating_point``). A sum is sent, not
        the stepped weights: those would carry this hospital's earlier rounds along (register, row 19). ``contribute``
        gives the same for several hospitals out of one batch.
        """
        plan, choice = self.plan, self.plan.choice
        if plan.counts_in(step // plan.setting.noisy_steps, self.run):
            counted = self.task.histogram_sum(w, self.sample(step), choice.max_grad_norm, plan.operating_point)
            return self.noised(counted, step)
        if plan.setting.draws == 1:
            sample = self.sample(step)
            seen = {"chance": self._chance(len(sample), step)} if plan.augment else {}
            if plan.setting.trajectories:
                steps = plan.setting.local_steps
                terms = (choice.max_grad_norm, steps, choice.learning_rate / steps)
                return self.noised(self.task.trajectory_sum(w, sample, *terms, **seen), step)
            return self.noised(self.task.clipped_sums(w, sample, choice.max_grad_norm, **seen)[0], step)
        eta = choice.learning_rate / (plan.setting.sample_rate * plan.sizes[self.number])
        return self.noised(self.task.local_sum(w, self._draw(step)[0], choice.max_grad_norm, eta), step)

    def _chance(self, patients: int, step: int) -> Tensor:
        """What ``plan.augment`` views of each of a sample's patients are drawn by, float32 (patients, views, 3)."""
        stream = self._randomness.stream(self.plan.setting.name, self.run, self.number, "views", step)
        return stream.uniform(patients * self.plan.augment * 3).view(patients, self.plan.augment, 3).float()

    def local_change(self, w: Tensor, round_number: int) -> Tensor:
        """The change (d,) of the model over a round's local steps, in F and FPDP.

        With privacy every step's noisy sum is on the grid, so the change is computed from what could be released. A
        round that counts has the mean of its steps' histograms in its place, as large as a change may be.
        """
        steps, declared = self.plan.setting.local_steps, self.plan.sizes[self.number]
        expected_batch, choice = self.plan.setting.sample_rate * declared, self.plan.choice
        counting = self.plan.counts_in(round_number, self.run)
        if counting:
            choice = replace(choice, learning_rate=self.plan.count_rate / steps, momentum=0.0)

        def noisy_sum(local: Tensor, i: int) -> Tensor:
            at = w if counting else local  # counts are no steps of a model
            total = self.noisy_sum(at, round_number * steps + i)
            return total if self.noise is None else torch.as_tensor(self.noise.decode(total)).float().to(w.device)

        return local_change(w, noisy_sum, choice, steps, expected_batch)

    def features(self) -> Tensor | np.ndarray:
        """The message (d,) of what is asked for once: ``Task.first_sum``, noised and as integers, then padding.

        It is divided by an average hospital's patients, which makes it as small as other messages.
        """
        total = self.task.first_sum(self.patients, self.plan.choice.counts)
        total = total * (self.plan.hospitals / self.plan.population)
        message = torch.cat([total, total.new_zeros(self.plan.d - len(total))])
        noise = self.plan.mean_noise
        if noise is None:
            return self.plan.encoded(message.float())
        stream = self._randomness.stream(self.plan.setting.name, self.run, self.number, "centre")
        return noise.combine(message, noise.draw(stream)[0])

    def _draw(self, step: int) -> tuple[tuple[Tensor, ...], object]:
        """The samples of ``step``, indices into the task, one for each time that it draws patients, and its noise.

        Both come from the stream of the step's block.
        """
        number, at = divmod(step, self._block)
        if self._drawn != number:
            if self.device is None or self.noise is None:
                self._samples, self._noises = self._draw_block(number)
            else:  # while the device computes, threads draw what comes next
                self._ahead = {later: block for later, block in self._ahead.items() if later >= number}
                for later in range(number, min(number + AHEAD, -(-self._steps // self._block))):
                    if later not in self._ahead:
                        self._ahead[later] = _drawers().submit(self._draw_block, later)
                self._samples, self._noises = self._ahead.pop(number).result()
            self._drawn = number
        draws = self.plan.setting.draws
        return self._samples[draws * at : draws * (at + 1)], self._noises[at]

    @property
    def _steps(self) -> int:
        """Steps of a whole run."""
        return self.plan.setting.rounds * self.plan.setting.noisy_steps

    def _draw_block(self, number: int) -> tuple[tuple[Tensor, ...], list]:
        """The samples of the block's steps, as many for each as it draws patients, and the steps' noises."""
        stream = self._randomness.stream(self.plan.setting.name, self.run, self.number, number)
        people, samples = len(self._images), self._block * self.plan.setting.draws
        present = stream.uniform(samples * people).view(samples, people) < self.plan.setting.sample_rate
        row, person = present.nonzero().T
        who, sizes = self._one_image(person, stream), present.sum(1)
        if self.plan.setting.draws > 1:  # patient by patient, in a random order
            who = who[(row + stream.uniform(len(row))).argsort()]
        if self.noise is None:
            noises = [None] * self._block
        elif self.device is None:
            noises = self.noise.draw(stream, self._block)
        else:
            noises = self.noise.draw(stream, self._block, self.device)
        return who.split(sizes.tolist()), noises

    def _one_image(self, people: Tensor, stream: Stream) -> Tensor:
        """An image of each of ``people``, drawn evenly from the person's own: so no person adds more than C."""
        if len(self._images) == len(self.patients):  # everybody has one
            return self._by_person[people]
        first = self._images.cumsum(0) - self._images
        return self._by_person[first[people] + (stream.uniform(len(people)) * self._images[people]).long()]


@functools.cache
def _drawers() -> ThreadPoolExecutor:
    """Threads that draw ahead of use; encrypting and copying, they do not hold Python's lock."""
    return ThreadPoolExecutor(cores(), thread_name_prefix="noise")


def local_change(
    w: Tensor, noisy_sum: Callable[[Tensor, int], Tensor], choice: Choice, steps: int, expected_batch: float | Tensor
) -> Tensor:
    """How w (…, d) changes over ``steps`` steps of SGD at one hospital: lines 14 and 15 with its own momentum.

    noisy_sum       function from the weights and the step's number to the gradient sum (…, d), lines 8 to 13
    expected_batch  q N_k, of the declared N_k; for several models at once (…, 1)
    Momentum starts at zero in every round, so a message depends on this round's samples alone.
    """
    local, velocity = w, torch.zeros_like(w)
    for i in range(steps):
        velocity = choice.momentum * velocity + noisy_sum(local, i) / expected_batch
        local = local - choice.learning_rate * velocity
    return local - w


def contribute(hospitals: list[Hospital], w: Tensor, round_number: int) -> dict[int, Tensor | np.ndarray]:
    """The messages (d,) of hospitals of one task in a round, by number: lines 6 to 16.

    In Algorithm 1 a message is the noisy gradient sum; in F and FPDP it is the change of the model, weighted by the
    hospital's declared patients. Raises NotFinite for such a w, before anything is computed from a patient.
    """
    if not hospitals:
        return {}
    if not torch.isfinite(w).all():
        raise NotFinite(
            f"the model of round {round_number} has values that are not finite, and no patient is put to it: take a "
            "smaller learning rate, or ask the server what it sent"
        )
    plan, task = hospitals[0].plan, hospitals[0].task
    if plan.setting.averages:
        share = {h.number: plan.sizes[h.number] / plan.population for h in hospitals}
        return {h.number: plan.encoded(h.local_change(w, round_number) * share[h.number]) for h in hospitals}
    alone = len(hospitals) == 1 or plan.counts_in(round_number, hospitals[0].run)
    if alone or plan.setting.local_steps > 1:  # a batch of hospitals would take longer, or is none
        return {h.number: h.noisy_sum(w, round_number) for h in hospitals}
    # each hospital's noisy_sum, with all gradients out of one batch
    samples = [hospital.sample(round_number) for hospital in hospitals]
    group = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample) for sample in samples]))
    seen = {}
    if plan.augment:
        drawn = [h._chance(len(sample), round_number) for h, sample in zip(hospitals, samples, strict=True)]
        seen = {"chance": torch.cat(drawn)}
    sums = task.clipped_sums(w, torch.cat(samples), plan.choice.max_grad_norm, group, len(samples), **seen)
    if plan.noise is None or hospitals[0].device is None:
        return {h.number: h.noised(own, round_number) for h, own in zip(hospitals, sums, strict=True)}
    drawn = [hospital._draw(round_number)[1] for hospital in hospitals]  # a device is waited for once, not K times
    return {h.number: own for h, own in zip(hospitals, plan.noise.combine_there(sums, drawn), strict=True)}
