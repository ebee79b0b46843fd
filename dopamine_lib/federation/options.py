"""What a run is asked for: the command line's options, checked where they are made, and the plan they become."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dopamine_lib import data
from dopamine_lib.data.dataset import GRADES
from dopamine_lib.data.function import find_function, is_function
from dopamine_lib.data.hospitals import SPLITS
from dopamine_lib.errors import InputError, check_delta, check_epsilon, check_whole, check_within
from dopamine_lib.federation.bounds import bounded, calibrated
from dopamine_lib.federation.metrics import screening
from dopamine_lib.federation.own_settings import from_record
from dopamine_lib.federation.plan import AGGREGATIONS, Plan
from dopamine_lib.federation.rounds import check_rounds, rescaled, takes_local_steps, with_rounds
from dopamine_lib.federation.settings import DELTA, SETTINGS, Choice, Setting, balanced, choices_of, fitted, setting
from dopamine_lib.models.networks import check_model
from dopamine_lib.privacy.accounting import ACCOUNTANTS, Accountant
from dopamine_lib.privacy.operating_point import OperatingPoint

NOISES = ("float", "integer")
#: How classes count in training: as often as they occur, or alike.
LOSSES = ("cross-entropy", "balanced")
#: Models whose loss is convex, so that local steps on all patients in turn have a bound: ``privacy.local_steps``.
CONVEX = ("head", "linear")


@dataclass(frozen=True)
class Options:
    """What ``reproduce`` is asked for; the fields are the command line's.

    model    one of the kit's or of torchvision's, or ``module:function``; None for "head", or for a table "linear"
    hospitals  None for 10, or with split "site" for as many as the data names
    split    None for "iid", or for "heart" the four hospitals that it names: "site"
    backbone  network and weights under a "head", as "resnet50:FILE"; None for SqueezeNet with ``weights``
    seed     None for randomness from the operating system; the split of the patients then uses seed 0
    epsilon  None for the paper's sigma; else sigma is recalibrated to this bound by ``accountant``
    rounds   T of the private settings at that epsilon; "auto" for ``rounds.fewest_rounds``; None for each setting's own
    local_steps  E of the private settings that add sums under shared noise: for head and linear models on all patients
             in turn, for others each patient's own (``Setting.trajectories``); None for each setting's own
    sample_rate  q of the private settings at that epsilon; None for each setting's own, or with rounds for the q that
             leaves it as many gradients as it had
    least    hospitals that must survive a round, and whose noise makes up sigma; None for all of them
    dropout  probability that a hospital vanishes in a round
    patients  training patients, as declared to everybody; None for the data sheet's published number, or where there is
              none, for their count, which is then public
    accountant, aggregation, optimizer  also ``module:function``: INTERFACES.md says what each is called with
    augment   views of each patient's image in a step (``privacy.augmentation``); 0 for the image alone
    specificity  of the thresholds that the last rounds find out (``privacy.operating_point``); None for none
    own       settings of one's own by name, as ``own_settings.read_settings`` gives them; None for the paper's alone
    Raises InputError for a value out of bounds.
    """

    data: str = "synthetic"
    data_dir: str | None = None
    size: int | None = None
    model: str | None = None
    weights: str | None = None
    backbone: str | None = None
    settings: tuple[str, ...] = tuple(SETTINGS)
    runs: int = 5
    seed: int | None = None
    hospitals: int | None = None
    split: str | None = None
    epsilon: float | None = None
    rounds: int | str | None = None
    sample_rate: float | None = None
    local_steps: int | None = None
    delta: float = DELTA
    accountant: str = "prv"
    aggregation: str = "plain"
    noise: str = "float"
    loss: str = "cross-entropy"
    least: int | None = None
    dropout: float = 0.0
    patients: int | None = None
    own: dict[str, dict] | None = None
    optimizer: str = "momentum"
    specificity: float | None = None
    augment: int = 0

    def __post_init__(self):
        check_rounds(self.rounds, self.sample_rate, self.local_steps, self.epsilon)
        for name in self.settings:
            self.setting(name)
        data.check_name(self.data)
        if self.data not in data.SOURCES and "/" not in self.data and Path(self.data).is_dir():
            object.__setattr__(self, "data", f"./{self.data}")  # seen to be a folder from elsewhere, too
        table = data.is_table(self.data)
        self._default("model", "linear" if table else "head")
        self._default("split", "site" if self.data == "heart" else "iid")
        self._default("hospitals", None if self.split == "site" else 10)
        for value, known, what in (
            (self.split, SPLITS, "split"),
            (self.noise, NOISES, "noise"),
            (self.accountant, ACCOUNTANTS, "accountant"),
            (self.aggregation, AGGREGATIONS, "aggregation"),
            (self.optimizer, ("momentum",), "optimizer"),
            (self.loss, LOSSES, "loss"),
        ):
            own = what in ("accountant", "aggregation", "optimizer")
            if value not in known and not (own and is_function(value)):
                yours = ", or a function of yours as module:function" if own else ""
                raise InputError(f"{what} '{value}' is unknown; choose one of {', '.join(known)}{yours}")
        check_model(self.model)
        several = [name for name in self.settings if takes_local_steps(self.setting(name))]
        if self.local_steps not in (None, 1) and not several:
            raise InputError(
                f"local steps are {self.local_steps}, but are for settings that add sums under shared noise, as FSCDP: "
                f"{', '.join(self.settings)} do not"
            )
        for name in self.settings:
            if self.setting(name).draws > 1 and self.model not in CONVEX:
                raise InputError(
                    f"{name} has local steps of all patients under one sum's noise, which have a bound for a convex "
                    f"loss, that of head and linear models, but not for '{self.model}': say trajectories = true"
                )
        for name in self.own or {}:
            choice = self.choice(name)
            if self.model not in CONVEX and choice.mean_noise_multiplier is not None and choice.counts < 1:
                raise InputError(f"setting '{name}' says centre, which is for head and linear models: leave it out")
        if self.backbone is not None and (self.model != "head" or self.weights is not None):
            raise InputError("backbone is for the model head, and names its own weights: leave out --weights")
        if not self.settings:
            raise InputError(f"no setting was named; choose from {', '.join(SETTINGS)}")
        if not 1 <= self.runs <= 1000:
            raise InputError(f"runs is {self.runs}, but must lie in [1, 1000]: 5 is the paper's")
        if self.hospitals is not None and not 2 <= self.hospitals <= 1000:
            raise InputError(f"hospitals is {self.hospitals}, but must lie in [2, 1000]: 10 is the paper's")
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}, but must not be negative; leave it out for real randomness")
        if self.least is not None and not 2 <= self.least <= (self.hospitals or 1000):
            raise InputError(
                f"least is {self.least}, but must lie in [2, {self.hospitals or 1000}], the number of hospitals"
            )
        if self.patients is not None and not (self.hospitals or 2) <= self.patients <= 10**9:
            raise InputError(
                f"patients is {self.patients}, but must lie in [{self.hospitals or 2}, 1e9]: every hospital has one"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}, but must lie in [0, 1): it is a probability")
        if self.noise == "integer" and self.epsilon is not None:
            raise InputError("noise integer has a bound of its own: give --epsilon or --noise integer, not both")
        check_delta(self.delta)
        check_whole("augment", self.augment, 0, 1000, "views of an image in a step; 0 for the image alone")
        if self.augment and (self.model in CONVEX or data.is_table(self.data)):
            raise InputError(f"augment is for a network that sees images, but '{self.model}' sees none: leave it out")
        self.operating_point("01")  # for its checks

    def _default(self, name: str, value: object) -> None:
        """Give an option that was left out its value."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def record(self) -> dict:
        """As plain data, for ``options.json`` and ``results.json``."""
        return asdict(self) | {"settings": list(self.settings)}

    @classmethod
    def from_record(cls, record: dict) -> "Options":
        """The inverse of ``record``. Raises KeyError or TypeError for other keys, InputError as the class does."""
        return cls(**(record | {"settings": tuple(record["settings"])}))

    def declared(self, name: str) -> Setting:
        """The setting called ``name`` as the paper, or one's own file, declares it. Raises InputError for another."""
        return from_record(name, self.own[name])[0] if name in (self.own or {}) else setting(name)

    def setting(self, name: str) -> Setting:
        """The same with the rounds, sampling rate and local steps that were asked for, where it is private."""
        declared = self.declared(name)
        asked = self.rounds, self.sample_rate, self.local_steps
        if not declared.private or asked == (None, None, None):
            return declared
        return with_rounds(declared, self.choice(name), *asked, trajectories=self.model not in CONVEX)

    def choice(self, name: str) -> Choice:
        """What the model trains with in that setting; the noise of its first release fits the bound asked for."""
        own, declared = name in (self.own or {}), self.declared(name)
        choice = from_record(name, self.own[name])[1] if own else choices_of(self.model)[name]
        if self.loss == "balanced":
            choice = balanced(declared, choice, self.epsilon)
        return fitted(declared, choice, self.epsilon)

    def operating_point(self, grades: Sequence[str]) -> OperatingPoint | None:
        """The thresholds asked for, where the classes are called ``grades``; None for none.

        Raises InputError as an ``OperatingPoint`` does.
        """
        if self.specificity is None:
            return None
        return OperatingPoint(self.specificity, tuple(screening(grades).values()), len(grades))

    def shares(self, setting: Setting, hospitals: int) -> int:
        """Of these hospitals, how many must survive a round, whose noise makes up sigma where it is shared."""
        return (self.least or hospitals) if setting.federated else 1

    def discrete(self, setting: Setting) -> bool:
        """Whether this setting's noise is discrete."""
        return self.noise == "integer" and setting.private

    def bounded(self, setting: Setting) -> bool:
        """Whether the accountants have a bound for this setting: ``bounds.bounded``."""
        return bounded(setting, summed=not (setting.federated and is_function(self.aggregation)))

    @property
    def budget(self) -> float:
        """Epsilon that must not be exceeded."""
        return math.inf if self.epsilon is None else self.epsilon

    @property
    def public_seed(self) -> int:
        """Seed of what protects nobody: splits, initial weights, the draw of participants."""
        return self.seed or 0

    @property
    def image_size(self) -> int | None:
        """Side of an image in pixels; None for the data set's own, as every other network takes it."""
        small = self.data == "retinamnist" or self.data.lower().endswith(".npz")
        if self.size is None and small and self.model in ("head", "squeezenet"):
            return 224  # SqueezeNet, or another backbone, sees next to nothing in 28 pixels
        return self.size


def make_plan(options: Options, name: str, sizes: Sequence[int], d: int, grades: Sequence[str] = GRADES) -> Plan:
    """The plan of the setting called ``name`` under these options, for hospitals of declared sizes and d parameters.

    grades  the classes' names, by which an operating point knows what is disease

    With a bound asked for, sigma is calibrated to it, and the learning rate follows (``rounds.rescaled``): where that
    takes more noise than was declared, it shrinks in proportion, so that the noise moves the model as far as before
    (validation patients agree at epsilon 1 and 3). Raises InputError where the run would end without a bound, or the
    accountant has none to calibrate by.
    """
    declared, choice = options.setting(name), options.choice(name)
    shares = options.shares(declared, len(sizes))
    if options.epsilon is not None and declared.private:
        accountant = own_accountant(options.accountant) or options.accountant
        declared = calibrated(declared, choice, shares, options.epsilon, options.delta, accountant)
        choice = rescaled(choice, options.declared(name), declared)
    plan = Plan(
        declared,
        choice,
        tuple(sizes) if declared.federated else (sum(sizes),),
        d,
        aggregation=options.aggregation if declared.federated else "plain",
        discrete=options.discrete(declared),
        least=shares,
        dropout=options.dropout if declared.federated else 0.0,
        delta=options.delta,
        budget=options.budget,
        accountant=options.accountant,
        seed=options.public_seed,
        optimizer=options.optimizer,
        operating_point=options.operating_point(grades),
        augment=options.augment,
    )
    if plan.setting.private and math.isinf(plan.bound.epsilon(plan.setting.steps)):
        deltas = (10.0**exponent for exponent in range(-15, 0))
        least = next((d for d in deltas if math.isfinite(replace(plan.bound, delta=d).epsilon(plan.setting.steps))), 1)
        raise InputError(
            f"delta is {options.delta:g}, but {name}'s noise has no bound below {least:g}: its own failures, such as "
            "overflows, are likelier than that; take a larger delta"
        )
    return plan


def own_accountant(name: str) -> Accountant | None:
    """The accountant ``module:function``, for ``accounting.epsilon``; None for one of the kit's.

    Its answer must be a number of at least 0, or None where it has no bound. Raises InputError for another, and for
    whatever it raises.
    """
    if not is_function(name):
        return None
    function = find_function(name, "accountant")

    def spent(steps: Sequence[tuple[float, float, int]], delta: float) -> float | None:
        answer = function(list(steps), delta)
        if answer is not None:
            check_within(f"epsilon by {name}", answer, 0, math.inf, "give a number, or None", low_open=False)
        return None if answer is None else float(answer)

    return spent
