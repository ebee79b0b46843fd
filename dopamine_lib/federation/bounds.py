"""What a run's messages spend: epsilon for one hospital's patients, by who looks at them."""

import math
from dataclasses import dataclass

from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.privacy.accounting import ACCOUNTANTS, DpEvent, SampledGaussian, epsilon
from dopamine_lib.privacy.dpsgd import GaussianNoise
from dopamine_lib.privacy.integer_noise import IntegerNoise


def centre_multiplier(setting: Setting, choice: Choice, shares: int) -> float | None:
    """Noise multiplier of the mean features as a patient's bound has it; None where they are not asked for.

    Where hospitals' noise does not add up under secure aggregation, each adds its share and has that alone.
    """
    if not setting.private or choice.centre is None:
        return None
    return choice.centre if setting.shared_noise else choice.centre / math.sqrt(shares)


@dataclass(frozen=True)
class Bound:
    """Epsilon of a run after a number of noisy steps.

    shares  hospitals whose noise makes up sigma (the least number that must survive a round); 1 if not federated
    noise   a hospital's share of it, continuous or discrete; None where the setting is not private
    """

    setting: Setting
    choice: Choice
    shares: int
    delta: float
    noise: GaussianNoise | IntegerNoise | None

    def events(self, steps: int, colluding: int = 0) -> tuple[DpEvent, ...]:
        """What happened, to somebody who can subtract the noise of ``colluding`` hospitals."""
        left = math.sqrt((self.shares - colluding) / self.shares) if self.setting.shared_noise else 1.0
        centre = centre_multiplier(self.setting, self.choice, self.shares)
        first = () if centre is None else (SampledGaussian(left * centre, 1.0, 1),)
        return (*first, self.noise.event(steps, colluding))

    def epsilon(self, steps: int, accountant: str = "rdp_classic", colluding: int = 0) -> float | None:
        """Epsilon by one accountant; None where that accountant cannot interpret the noise."""
        return epsilon(self.events(steps, colluding), self.delta, accountant)

    def epsilons(self, steps: int, colluding: int = 0) -> dict[str, float | None]:
        """Epsilon by each accountant."""
        return {accountant: self.epsilon(steps, accountant, colluding) for accountant in ACCOUNTANTS}

    def adversaries(self, steps: int) -> dict[str, dict[str, float | None] | None]:
        """Epsilons against an outsider, the server, and one curious hospital, which can subtract its own share.

        None where the party holds the data anyway.
        """
        outsider = self.epsilons(steps)
        if not self.setting.federated:
            return {"outsider": outsider, "server": None, "hospital": outsider}
        if not self.setting.shared_noise:
            return {"outsider": outsider, "server": outsider, "hospital": outsider}
        curious = self.epsilons(steps, colluding=1) if self.shares > 1 else None
        return {"outsider": outsider, "server": outsider, "hospital": curious}
