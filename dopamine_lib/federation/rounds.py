"""Rounds as a choice: another T or q for a setting at a given epsilon, and the fewest rounds that lose nothing.

What a run of noisy gradient steps loses to noise does not depend on how many steps there are. After T steps of length
eta on the mean of N patients' gradients, a smooth convex loss is above its least value by at most about

    D^2 / (2 eta T)  +  eta d (sigma C / (q N))^2 / 2         D: how far the model has to go; d: parameters

(gradient descent, and the noise that it takes up; Bassily, Feldman, Talwar, Thakurta 2019). At a given epsilon
sigma / q grows like sqrt(T): many steps are one Gaussian mechanism with mu = q sqrt(T) / sigma (Dong, Roth, Su 2022,
corollary 5.4, where sigma is large). So with Lambda = eta T the second term is Lambda d C^2 / (2 mu^2 N^2): only Lambda
counts, and T steps of length Lambda / T do the same for any T, as long as

    eta      a step is stable. With momentum beta on a loss of smoothness L it is where eta < 2 (1 + beta) / L (Polyak
             1964); the head's L is below 1 / 2 on average, and clipping shortens what is longer
    memory   momentum has forgotten the start: T is many times 1 / (1 - beta), the number of steps that it remembers

``with_rounds`` keeps Lambda (by ``rescaled``) and, unless told otherwise, q T: as many gradients as before, so a
hospital computes as much and sends less often. ``fewest_rounds`` is the least T that the two conditions leave.
"""

import math
from dataclasses import replace

from dopamine_lib.errors import InputError, check_whole, check_within
from dopamine_lib.federation.settings import Choice, Setting, slower

#: The word for ``fewest_rounds`` where a number of rounds is asked for.
AUTO = "auto"
#: Rounds, in units of what momentum remembers: ten, for which e^-10 of the start is left.
MEMORIES = 10


def check_rounds(rounds: int | str | None, sample_rate: float | None, epsilon: float | None) -> None:
    """Raise InputError for a T or q out of bounds, or one without an epsilon that sigma is calibrated to."""
    for name, value in (("rounds", rounds), ("sample rate", sample_rate)):
        if value is not None and epsilon is None:
            raise InputError(
                f"{name} is {value}, but at the paper's sigma another T or q is another bound: say --epsilon too, or "
                "declare a setting of your own with its noise_multiplier"
            )
    if isinstance(rounds, str) and rounds != AUTO:
        raise InputError(f"rounds is '{rounds}', but must be a whole number, or {AUTO}")
    if rounds not in (None, AUTO):
        check_whole("rounds", rounds, 1, 10**6, f"the paper's FSCDP has 3001; or say {AUTO}")
    if sample_rate is not None:
        check_within("sample rate", sample_rate, 0, 1, "it is the probability q of being in a step's sample")


def fewest_rounds(choice: Choice) -> int:
    """The fewest rounds in which momentum forgets its start, 10 / (1 - beta).

    >>> from dopamine_lib.federation.settings import CHOICES
    >>> fewest_rounds(CHOICES["head"]["FSCDP"])
    100
    """
    return math.ceil(round(MEMORIES / (1 - choice.momentum), 6))


def with_rounds(
    declared: Setting, choice: Choice, rounds: int | str | None = None, sample_rate: float | None = None
) -> Setting:
    """The setting with another T, another q, or both, and its own sigma; public numbers alone decide.

    rounds       T, or ``AUTO``; by default the setting's own
    sample_rate  q; by default as many gradients as before: q T stays, as far as a probability can

    >>> from dopamine_lib.federation.settings import CHOICES, SETTINGS
    >>> used = with_rounds(SETTINGS["FSCDP"], CHOICES["head"]["FSCDP"], rounds=150)
    >>> used.rounds, round(used.sample_rate, 3), used.epochs
    (150, 0.683, 100)
    """
    rounds = min(declared.rounds, fewest_rounds(choice)) if rounds == AUTO else rounds or declared.rounds
    if sample_rate is None:
        sample_rate = min(1.0, round(declared.sample_rate * declared.rounds / rounds, 12))
    if (rounds, sample_rate) == (declared.rounds, round(declared.sample_rate, 12)):
        return declared
    title = f"{declared.title}, T = {rounds} and q = {sample_rate:.3g} in place of {declared.rounds} and "
    title += f"{declared.sample_rate:.3g}"
    epochs = min(declared.epochs, rounds)
    return replace(declared, title=title, rounds=rounds, sample_rate=sample_rate, epochs=epochs)


def rescaled(choice: Choice, declared: Setting, used: Setting, exponent: float = 1.0) -> Choice:
    """The choice that ``declared`` was tuned with for ``used``, which has another T, q or sigma; both are private.

    Fewer rounds have longer steps, so that Lambda = eta T stays; where there is more noise, Lambda shrinks until noise
    moves the model as far in a run as before: by eta sigma sqrt(T) C / (q N) in each parameter (``slower``, whose
    ``exponent`` is 1). For other q that is as it stands, since a step's mean gradient does not change with q.
    """
    shorter, boost = declared.rounds / used.rounds, used.sample_rate / declared.sample_rate
    ratio = declared.noise_multiplier * boost / (used.noise_multiplier * math.sqrt(shorter))
    choice = slower(choice, ratio, exponent)
    return replace(choice, learning_rate=shorter * choice.learning_rate)
