"""Who takes part in which round, drawn from public numbers before a run begins."""

import math

import numpy as np

from dopamine_lib.federation.settings import Setting


def schedule(
    setting: Setting, hospitals: int, affordable: float = math.inf, *, seed: int = 0, run: int = 0
) -> list[list[int]]:
    """Who takes part in each round, from public numbers alone; a hospital whose budget is spent sits out.

    affordable  noisy steps that the budget allows at one hospital
    Under shared noise all take part or none, so the schedule ends where the budget does.

    >>> from dopamine_lib.federation.settings import SETTINGS
    >>> schedule(SETTINGS["FSCDP"], hospitals=3, affordable=2)
    [[0, 1, 2], [0, 1, 2]]
    """
    everybody = list(range(hospitals))
    invited = max(1, round(setting.participation * hospitals))
    sits_out = setting.private and not setting.shared_noise
    rounds = setting.rounds if sits_out else int(min(setting.rounds, affordable))
    if invited == hospitals and not sits_out:
        return [everybody] * rounds
    rng = np.random.default_rng([seed, run])
    left, drawn = [affordable] * hospitals, []
    for _ in range(rounds):
        present = sorted(rng.choice(everybody, size=invited, replace=False).tolist())
        drawn.append([k for k in present if left[k] >= setting.noisy_steps])
        for k in drawn[-1]:
            left[k] -= setting.noisy_steps
    return drawn
