"""The plan of a run: everything that is decided before it begins, and only read from then on.

``options.make_plan`` is the one place where options become a setting, its choice, noise, codec and aggregation. A
``Plan`` is frozen and made of public numbers alone, so the server, a hospital in another process and a later check of
the results derive the same bound and the same schedule from it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.data.function import is_function
from dopamine_lib.encryption.codec import Codec, find_layout
from dopamine_lib.errors import InputError
from dopamine_lib.federation.bounds import Bound
from dopamine_lib.federation.plan_checks import check_terms
from dopamine_lib.federation.schedule import schedule
from dopamine_lib.federation.settings import DELTA, Choice, Setting
from dopamine_lib.privacy.budget import Ledger
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.integer_noise import IntegerNoise
from dopamine_lib.privacy.operating_point import OperatingPoint, counting_rounds
from dopamine_lib.privacy.rounded_gaussian import BOX, RoundedGaussian, most_in_a_sum

#: How messages may be added: in the clear, under BFV, behind masks. A ``module:function`` may take a sum's place.
AGGREGATIONS = ("plain", "bfv", "masks")


@dataclass(frozen=True)
class Plan:
    """A setting as it is run.

    sizes        declared patients of each hospital, by which sums are divided and weighed; where nothing is federated,
                 all of them as one. They are public constants, and may differ from the true numbers, which are private
    d            parameters of the model
    aggregation  how messages are added: "plain", "bfv" or "masks"; or ``module:function``, which reads every message
    discrete     whether the noise on the gradients is discrete (Skellam), instead of Gaussian and rounded to a grid
    least        hospitals that must survive a round where their noise is shared, and then make up sigma; None for all.
                 With more survivors there is more noise than needed: the price of dropouts
    dropout      probability that an invited hospital vanishes in a round, for trying that out
    budget       epsilon, by ``accountant``, that is not exceeded: training stops before the step that would
                 A ``module:function`` as accountant has sized sigma for the setting's steps: no hospital takes more
    seed         of the public draws: participants and dropouts
    optimizer    the server's step on a total: "momentum", or ``module:name``, an optimiser like torch's
    augment      views of each patient's image in a step, whose mean gradient is clipped; 0 for the image alone
    operating_point  thresholds that the last rounds find out, in place of training; None for none
    Raises ValueError where a private setting has no finite clipping norm, InputError for terms that contradict each
    other: nothing is trained by such a plan.

    >>> from dopamine_lib.federation.settings import CHOICES, SETTINGS
    >>> plan = Plan(SETTINGS["FSCDP"], CHOICES["head"]["FSCDP"], sizes=(293,) * 10, d=2565)
    >>> plan.survivors, plan.layout, round(plan.bound.epsilon(steps=3001), 2)  # the paper's sigma, by classic RDP
    (10, 'packed', 10.83)
    """

    setting: Setting
    choice: Choice
    sizes: tuple[int, ...]
    d: int
    aggregation: str = "plain"
    discrete: bool = False
    least: int | None = None
    dropout: float = 0.0
    delta: float = DELTA
    budget: float = math.inf
    accountant: str = "prv"
    seed: int = 0
    optimizer: str = "momentum"
    operating_point: OperatingPoint | None = None
    augment: int = 0

    def __post_init__(self):
        if self.setting.private and math.isinf(self.choice.max_grad_norm):
            raise ValueError(
                f"{self.setting.name} is private and needs a finite max_grad_norm: without one nothing is bounded"
            )
        if self.aggregation not in AGGREGATIONS and not is_function(self.aggregation):
            known = ", ".join(AGGREGATIONS)
            raise InputError(f"aggregation is '{self.aggregation}', but must be one of {known}, or module:function")
        check_terms(self)

    @classmethod
    def of(cls, setting: Setting, choice: Choice, task: Task, patients: Sequence[np.ndarray], **terms: Any) -> "Plan":
        """The plan for a task and hospitals whose numbers of patients are public: one index array per hospital."""
        return cls(setting, choice, tuple(map(len, patients)), task.d, **terms)

    @property
    def hospitals(self) -> int:
        """K."""
        return len(self.sizes)

    @property
    def population(self) -> int:
        """N, all hospitals' declared patients."""
        return sum(self.sizes)

    @property
    def hidden(self) -> bool:
        """Whether single messages are hidden: under BFV or behind masks."""
        return self.aggregation in ("bfv", "masks")

    @property
    def most_patients(self) -> int:
        """The most patients that a box has room for: all declared ones, and what chance may deal besides.

        A hospital's true number need not be known. Where it holds more, its sum is clamped like any other.
        """
        return most_in_a_sum(1.0, self.population)

    @property
    def invited(self) -> int:
        """Hospitals that take part in a round, as long as their budgets last."""
        return max(1, round(self.setting.participation * self.hospitals))

    @property
    def survivors(self) -> int:
        """Hospitals that are sure to be in a total, whose noise makes up sigma where it is shared."""
        return self.least or self.hospitals

    @property
    def least_in_a_total(self) -> int:
        """The fewest hospitals whose total is opened: those whose noise makes up sigma, and two where sums are hidden.

        Three where nothing is noised: of two, each subtracts its own message and has the other's.
        """
        hidden = 2 if self.setting.private else 3
        return max(self.survivors if self.setting.shared_noise else 1, hidden if self.hidden else 1)

    @cached_property
    def noise(self) -> RoundedGaussian | IntegerNoise | None:
        """One hospital's share of the noise on a step's gradients; None without privacy."""
        if not self.setting.private:
            return None
        sigma, clip, q = self.setting.noise_multiplier, self.choice.max_grad_norm, self.setting.sample_rate
        draws = self.setting.draws
        hospitals = self.hospitals if self._adds_sums else 1
        least = self.survivors if self.setting.shared_noise else 1
        terms, patients = {"least": least, "sample_rate": q}, draws * most_in_a_sum(q, self.most_patients)
        if not self.discrete:
            terms |= {"patients": patients, "box": min(patients, self._agreed)}
            terms["draws"] = draws
            return _narrowest(lambda width: RoundedGaussian(sigma, clip, hospitals, self.d, total_range=width, **terms))
        layout = find_layout("wide" if self._adds_sums and self.aggregation != "masks" else "ring32")
        terms |= {"total_range": layout.total_range, "steps": self.setting.rounds * self.setting.noisy_steps}
        box = BOX if self.operating_point is None else min(patients, self._agreed)
        return IntegerNoise(sigma, clip, hospitals, self.d, box=box if self._adds_sums else patients, **terms)

    @property
    def _agreed(self) -> float:
        """How many C a hospital's sum has room for: what patients agree on adds up.

        At the start of training it is a fifth of C for each, in the head's biases; in a histogram all may share a cell.
        """
        expected = self.setting.draws * self.setting.sample_rate * max(self.sizes)
        return max(BOX, expected / (4 if self.operating_point is None else 1))

    @cached_property
    def mean_noise(self) -> RoundedGaussian | None:
        """One hospital's share of the noise on the mean features; None where these are not asked for, or in the clear.

        A patient's features, of norm 1 at most, are divided by an average hospital's patients (``Hospital.features``).
        """
        if not self.setting.private or self.choice.mean_noise_multiplier is None:
            return None
        sigma, norm = self.choice.mean_noise_multiplier, self.hospitals / self.population
        terms = {"least": self.survivors, "sample_rate": 1.0, "patients": self.most_patients}
        terms["box"] = most_in_a_sum(1.0, max(self.sizes))  # a hospital that happens to hold more is clamped
        return _narrowest(
            lambda width: RoundedGaussian(sigma, norm, self.hospitals, self.d, total_range=width, **terms)
        )

    def counts_in(self, number: int, run: int = 0) -> bool:
        """Whether a run's round, from 0, asks for histograms and trains nothing (``privacy.operating_point``).

        The last tenth does of those rounds in which enough hospitals take part: where each has a budget of its own,
        the run's very last ones may have nobody left in them.
        """
        if self.operating_point is None:
            return False
        if run not in self._first_counts:
            opened = [n for n, invited in enumerate(self.schedule(run)) if len(invited) >= self.least_in_a_total]
            self._first_counts[run] = opened[-counting_rounds(len(opened))] if opened else self.setting.rounds
        return number >= self._first_counts[run]

    @property
    def count_rate(self) -> float:
        """What a hospital's mean histogram is multiplied by where changes of the model are sent, and so have room.

        A cell may hold twice as many as a hospital's sample is expected to have.
        """
        clip = self.choice.max_grad_norm
        return 1.0 if self.codec is None else self._reach / (2 * (1.0 if math.isinf(clip) else clip))

    @cached_property
    def layout(self) -> str:
        """How integers are laid out for the aggregation: in 16 bits where they fit, else in 24 or 32."""
        if self.aggregation == "masks" or (not self.hidden and self.setting.averages):
            return "ring32"
        summed = self.noise if self._adds_sums else None
        needed = max((noise.total_range for noise in (summed, self.mean_noise) if noise), default=0)
        return "packed" if needed <= find_layout("packed").total_range else "wide"

    @cached_property
    def codec(self) -> Codec | RoundedGaussian | IntegerNoise | None:
        """What decodes totals, and encodes changes of the model; None for floats added in the clear."""
        if self.setting.private and not self.setting.averages:
            return self.noise
        if not self.hidden and not self.setting.private:
            return None
        return Codec(self.layout, hospitals=self.hospitals, bound=self._reach, clamped=self.setting.private)

    @property
    def message_limit(self) -> int:
        """The largest |integer| that a hospital may send: where totals are sure to fit, as much as the layout holds."""
        return find_layout(self.layout).total_range if self.setting.private else self.codec.limit

    def encoded(self, message: Tensor) -> Tensor | np.ndarray:
        """A message (d,) of floats as int64 (d,), or as it is where floats are added in the clear."""
        return message if self.codec is None else self.codec.encode(message.cpu().numpy())

    def decoded(self, round_number: int, total: np.ndarray) -> Tensor:
        """What a total int64 (d,) stands for, float32 (d,); round 0 is that of the mean features."""
        codec = self.mean_noise if round_number == 0 and self.mean_noise else self.codec
        return torch.as_tensor(codec.decode(total)).float()

    @cached_property
    def bound(self) -> Bound:
        """What the messages spend."""
        summed = self.aggregation in AGGREGATIONS
        return Bound(self.setting, self.choice, self.survivors, self.delta, self.noise, self.mean_noise, summed)

    def ledgers(self) -> list[Ledger]:
        """Fresh ledgers: one for everybody where noise is shared, else one per hospital; none where no bound holds."""
        count = (1 if self.setting.shared_noise else self.hospitals) if self.bound.holds else 0
        within = (math.inf, "prv") if is_function(self.accountant) else (self.budget, self.accountant)
        terms = (self.setting.noise_multiplier, self.setting.sample_rate, self.delta, *within)
        return [Ledger(*terms, self.setting.steps, self.bound.epsilon) for _ in range(count)]

    def schedule(self, run: int = 0) -> list[list[int]]:
        """Who takes part in each round of a run: ``schedule`` within the budget."""
        return schedule(self.setting, self.hospitals, self._affordable, seed=self.seed, run=run)

    def charged(self, run: int = 0) -> list[int]:
        """Steps that a whole run charges to each ledger."""
        rounds, noisy = self.schedule(run), self.setting.noisy_steps
        return [noisy * sum(k in invited for invited in rounds) for k in range(len(self.ledgers()))]

    @cached_property
    def _first_counts(self) -> dict[int, int]:
        """The first round of each run that asks for histograms, as far as it was asked."""
        return {}

    @property
    def _adds_sums(self) -> bool:
        """Whether hospitals' noisy sums are added up, rather than their changes of the model or nothing."""
        return self.setting.federated and not self.setting.averages

    @property
    def _reach(self) -> float:
        """The largest |value| of a change that is sent: the choice's, or what no noisy change of the model exceeds."""
        if self.choice.reach or not self.setting.private:
            return self.choice.reach or 16 * self.choice.max_grad_norm
        largest = self.noise.box + 9 * math.sqrt(self.noise.share_variance) / self.noise.scale
        moved = self.choice.learning_rate * self.setting.local_steps / (1 - self.choice.momentum)
        return moved * largest / (self.setting.sample_rate * self.population)

    @cached_property
    def _affordable(self) -> float:
        if is_function(self.accountant) and math.isfinite(self.budget):
            return self.setting.steps
        return next((ledger.left for ledger in self.ledgers()), math.inf)


def _narrowest(make: Callable[[int], RoundedGaussian]) -> RoundedGaussian:
    """Noise whose totals fit the 16 bits of the layout "packed" or, if these are too few, the 24 of "wide"."""
    try:
        return make(find_layout("packed").total_range)
    except InputError:
        return make(find_layout("wide").total_range)
