"""Rounds as a choice: another T or q for a setting at a given epsilon, and the fewest rounds that should lose nothing.

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
hospital computes as much and sends less often. ``fewest_rounds`` is the least T that the two conditions leave. A
network's L is not known: for it the head's stands in, and validation has to tell whether the steps are too long.

With E local steps (``privacy.local_steps``) a round counts as E steps: Lambda = eta T E. There is no momentum then,
which hospitals could not have, and eta is 1 / (1 - beta) of what it was; and no clip, but rows of norm 1.
"""

import math
from dataclasses import replace

from dopamine_lib.errors import InputError, check_whole, check_within
from dopamine_lib.federation.settings import Choice, Setting, slower
from dopamine_lib.privacy.accounting import MAX_DRAWS

#: C of local steps: that of rows of norm 1. With a bias every row is longer, so that all patients count alike.
LOCAL_NORM = math.sqrt(2)
#: The word for ``fewest_rounds`` where a number of rounds is asked for.
AUTO = "auto"
#: Rounds, in units of what momentum remembers: ten, for which e^-10 of the start is left.
MEMORIES = 10
#: The fewest rounds of several local steps. On eyes dealt out at random 20 lose half a point; hospitals that differ
#: drift apart: on the heart-disease data's four, 20 rounds of 5 steps cost 5 points at epsilon 1, 100 rounds 2.
LEAST = 20
#: L: softmax cross-entropy of a linear model on rows of norm 1 is no more curved.
SMOOTHNESS = 0.5


def check_rounds(
    rounds: int | str | None, sample_rate: float | None, local_steps: int | None, epsilon: float | None
) -> None:
    """Raise InputError for a T, q or E out of bounds, or one without an epsilon that sigma is calibrated to."""
    for name, value in (("rounds", rounds), ("sample rate", sample_rate), ("local steps", local_steps)):
        if value is not None and epsilon is None:
            raise InputError(
                f"{name} is {value}, but at the paper's sigma that is another bound: say --epsilon too, or declare a "
                "setting of your own with its noise_multiplier"
            )
    if local_steps is not None:
        check_whole("local steps", local_steps, 1, MAX_DRAWS, "Algorithm 1 has 1")
    if isinstance(rounds, str) and rounds != AUTO:
        raise InputError(f"rounds is '{rounds}', but must be a whole number, or {AUTO}")
    if rounds not in (None, AUTO):
        check_whole("rounds", rounds, 1, 10**6, f"the paper's FSCDP has 3001; or say {AUTO}")
    if sample_rate is not None:
        check_within("sample rate", sample_rate, 0, 1, "it is the probability q of being in a step's sample")


def fewest_rounds(choice: Choice, declared: int, local_steps: int = 1) -> int:
    """The fewest rounds with stable steps in which momentum forgets its start; a local step counts as a round.

    declared  the rounds that ``choice`` is for
    But at least ``LEAST`` where there are local steps: hospitals learn of each other between rounds alone.

    >>> from dopamine_lib.federation.settings import CHOICES
    >>> [fewest_rounds(CHOICES["head"]["FSCDP"], 3001, local_steps) for local_steps in (1, 2, 5, 25)]
    [100, 50, 20, 20]
    >>> fewest_rounds(Choice(learning_rate=2.5, max_grad_norm=0.5, momentum=0.0), 3001)  # 2.5 * 3001 / T < 4
    1876
    """
    stable = declared * choice.learning_rate * SMOOTHNESS / (2 * (1 + choice.momentum))
    steps = round(max(MEMORIES / (1 - choice.momentum), stable), 6)
    return math.ceil(steps if local_steps == 1 else max(LEAST, steps / local_steps))


def with_rounds(
    declared: Setting,
    choice: Choice,
    rounds: int | str | None = None,
    sample_rate: float | None = None,
    local_steps: int | None = None,
    trajectories: bool = False,
) -> Setting:
    """The setting with another T, q or E, and its own sigma; public numbers alone decide.

    rounds       T, or ``AUTO``; by default the setting's own, or 1 / E of it where ``local_steps`` are asked for
    sample_rate  q; by default as many gradients as before: q T E stays, as far as a probability can
    local_steps  E, where noise is shared and so added once a round; others keep theirs
    trajectories  whether more local steps than declared are each patient's own (``Setting.trajectories``)

    >>> from dopamine_lib.federation.settings import CHOICES, SETTINGS
    >>> used = with_rounds(SETTINGS["FSCDP"], CHOICES["head"]["FSCDP"], rounds=150)
    >>> used.rounds, round(used.sample_rate, 3), used.epochs
    (150, 0.683, 100)
    """
    several = local_steps if local_steps and takes_local_steps(declared) else declared.local_steps
    fewer = declared.local_steps / several
    alone = declared.trajectories or (trajectories and fewer < 1)
    if rounds == AUTO:
        together = 1 if alone else several // declared.local_steps  # else the server's momentum remembers rounds
        rounds = min(declared.rounds, fewest_rounds(choice, declared.rounds, together))
    rounds = rounds or math.ceil(declared.rounds * fewer)
    if sample_rate is None:
        sample_rate = min(1.0, round(declared.sample_rate * declared.rounds * fewer / rounds, 12))
    if (rounds, sample_rate, fewer) == (declared.rounds, round(declared.sample_rate, 12), 1):
        return declared
    title = f"{declared.title}, T = {rounds} and q = {sample_rate:.3g} in place of {declared.rounds} and "
    title += f"{declared.sample_rate:.3g}"
    if several > declared.local_steps:
        title += f", {several} local steps" + " of each patient" * alone
    epochs = min(declared.epochs, rounds)
    terms = {
        "rounds": rounds,
        "sample_rate": sample_rate,
        "local_steps": several,
        "epochs": epochs,
        "trajectories": alone,
    }
    return replace(declared, title=title, **terms)


def takes_local_steps(declared: Setting) -> bool:
    """Whether hospitals send sums under shared noise, which local steps can be in; F and FPDP have theirs."""
    return declared.private and declared.federated and declared.shared_noise


def rescaled(choice: Choice, declared: Setting, used: Setting, exponent: float = 1.0) -> Choice:
    """The choice that ``declared`` was tuned with for ``used``, which has another T, q, E or sigma; both are private.

    Fewer rounds have longer steps, so that Lambda stays; where there is more noise, Lambda shrinks until noise moves
    the model as far in a run as before: by eta sigma sqrt(T) C / (q N) in each parameter (``slower``, whose
    ``exponent`` is 1). What q is does not change a step's mean gradient.
    """
    shorter, boost = declared.rounds / used.rounds, used.sample_rate / declared.sample_rate
    ratio = declared.noise_multiplier * boost / (used.noise_multiplier * math.sqrt(shorter))
    if used.draws > declared.draws:
        rate = choice.learning_rate / (1 - choice.momentum) / used.draws
        ratio *= used.draws * choice.max_grad_norm / LOCAL_NORM
        choice = replace(choice, learning_rate=rate, momentum=0.0, max_grad_norm=LOCAL_NORM)
    choice = slower(choice, ratio, exponent)
    return replace(choice, learning_rate=shorter * choice.learning_rate)
