"""What a run's messages spend: epsilon for one hospital's patients, by adversary."""

import math
from dataclasses import dataclass

from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.privacy.accounting import Accountant, DpEvent, SampledGaussian, epsilon, epsilons
from dopamine_lib.privacy.budget import noise_multiplier_for
from dopamine_lib.privacy.integer_noise import IntegerNoise
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian


def accounted_mean_noise(setting: Setting, choice: Choice, shares: int) -> float | None:
    """Noise multiplier of the mean features in a patient's bound; None where they are not asked for.

    Where hospitals' noise does not add up under secure aggregation, each has only its own share.
    """
    if not setting.private or choice.mean_noise_multiplier is None:
        return None
    return choice.mean_noise_multiplier / (1 if setting.shared_noise else math.sqrt(shares))


def bounded(setting: Setting, summed: bool = True) -> bool:
    """Whether the accountants have a bound: there is noise, and all of sigma is in what is computed from messages.

    summed  whether messages are added up. Where they are not, but put through some other function, a bound holds if
            every hospital's message has all of sigma: that is post-processing. Where shares of noise make it up, only
            their sum has it
    """
    return setting.private and (summed or not setting.shared_noise)


@dataclass(frozen=True)
class Bound:
    """Epsilon of a run after a number of noisy steps.

    shares  hospitals whose noise makes up sigma (the least number that must survive a round); 1 if not federated
    noise   a hospital's share of it, Gaussian or Skellam; None where the setting is not private
    mean_noise  the share on the mean features; None where they are not asked for
    summed  whether messages are added up, as shares of noise must be, and not put through a function of one's own
    """

    setting: Setting
    choice: Choice
    shares: int
    delta: float
    noise: RoundedGaussian | IntegerNoise | None
    mean_noise: RoundedGaussian | None = None
    summed: bool = True

    @property
    def holds(self) -> bool:
        """Whether the accountants vouch for this: ``bounded``."""
        return bounded(self.setting, self.summed)

    def events(self, steps: int, colluding: int = 0, runs: int = 1) -> tuple[DpEvent, ...]:
        """What is released, for an adversary that can subtract the noise of ``colluding`` hospitals.

        steps  of all ``runs`` together; each asks for the mean features once
        """
        # where noise is not shared, a message has nothing but its own
        without = colluding if self.setting.shared_noise else self.shares - 1
        first = () if self.mean_noise is None else (self.mean_noise.event(runs, without),)
        return (*first, self.noise.event(steps, colluding))

    def epsilon(self, steps: int, accountant: str = "rdp_classic", colluding: int = 0) -> float | None:
        """Epsilon by one accountant, as ``accounting.epsilon``."""
        return epsilon(self.events(steps, colluding), self.delta, accountant)

    def epsilons(self, steps: int, colluding: int = 0) -> dict[str, float | None]:
        """Epsilon by each accountant; None where one has no bound."""
        return epsilons(self.events(steps, colluding), self.delta)

    def adversaries(self, steps: int, in_clear: bool = False) -> dict[str, dict[str, float | None] | None]:
        """Epsilons against an outsider, the server, and one curious hospital, which can subtract its own share.

        in_clear  whether the server, a process of its own, read every hospital's message: then one share protects it
        None where the party holds the data anyway.
        """
        outsider = self.epsilons(steps)
        if not self.setting.federated:
            return {"outsider": outsider, "server": None, "hospital": outsider}
        if not self.setting.shared_noise:
            return {"outsider": outsider, "server": outsider, "hospital": outsider}
        curious = self.epsilons(steps, colluding=1) if self.shares > 1 else None
        server = self.epsilons(steps, colluding=self.shares - 1) if in_clear else outsider
        return {"outsider": outsider, "server": server, "hospital": curious}


def calibrated(
    declared: Setting, choice: Choice, shares: int, epsilon: float, delta: float, accountant: str | Accountant
) -> Setting:
    """A private setting at the least sigma whose steps, and the mean features before them, spend at most epsilon."""
    mean = accounted_mean_noise(declared, choice, shares)
    before = () if mean is None else (SampledGaussian(mean, 1.0, 1),)
    return declared.with_noise(
        noise_multiplier_for(
            epsilon, declared.sample_rate, declared.steps, delta, accountant, before, draws=declared.draws
        )
    )
