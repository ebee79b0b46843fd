"""A folder is a release: what everything in it spends together.

All runs of all settings are trained on the same patients, and whoever has the folder has all of its models. So their
events compose, and one model without noise leaves nothing bounded, whatever the others spend.
"""

import math
from collections.abc import Sequence

from dopamine_lib.federation.bounds import Bound
from dopamine_lib.federation.statement import in_words
from dopamine_lib.privacy.accounting import ACCOUNTANTS, epsilon

#: Rate of false alarms at which a verdict says how many training patients an attack can recognise, and the share
#: of them from which on it says that this promises next to nothing (epsilon 4.6 and more).
FALSE_ALARMS, ALMOST_ALL = 0.01, 0.99


def release(bounds: dict[str, Bound], charged: dict[str, Sequence[Sequence[int]]], *, seeded: bool) -> dict:
    """``results.json``'s "folder": is it private as a whole, and what does it spend of a training patient's privacy?

    bounds   of each setting in the folder;  charged  noisy steps of its ledgers, run by run
    Returns

        private          whether all of it is bounded
        verdict          the same in words
        epsilon          of all of it together against an outsider, by accountant; None where something has no noise
        epsilon_private  of its private settings' runs together, whatever lies beside them; None if there are none
        delta            of all of it together

    >>> from dopamine_lib.federation.settings import CHOICES, SETTINGS
    >>> from dopamine_lib.federation.plan import Plan
    >>> bound = Plan(SETTINGS["FSCDP"], CHOICES["head"]["FSCDP"], sizes=(293,) * 10, d=2565).bound
    >>> round(release({"FSCDP": bound}, {"FSCDP": [[3001]] * 5}, seeded=False)["epsilon"]["rdp_classic"], 1)
    28.9
    """
    private = [name for name, bound in bounds.items() if bound.holds]
    open_ = [name for name in bounds if name not in private]
    unsummed = [name for name in open_ if bounds[name].setting.private]
    # a patient is in one hospital in all runs; taking the worst-off hospital of every setting can only be too much
    events = [
        event
        for name in private
        for event in bounds[name].events(max(map(sum, zip(*charged[name], strict=True))), runs=len(charged[name]))
    ]
    delta = next(iter(bounds.values())).delta
    # PRV takes seconds for unlike events, and is no tighter than the PLD
    together = {key: epsilon(events, delta, key) if key != "prv" else None for key in ACCOUNTANTS} if events else None
    if together:  # infinity, where delta is spent on a mechanism's failures, is no bound
        together = {key: None if value == math.inf else value for key, value in together.items()}
    bounded = together is not None and any(value is not None for value in together.values())
    return {
        "private": bounded and not open_ and not seeded,
        "verdict": _verdict(private, open_, unsummed, seeded, together, delta, sum(map(len, charged.values()))),
        "epsilon": None if open_ else together,
        "epsilon_private": together,
        "delta": delta,
    }


def _verdict(
    private: list[str],
    open_: list[str],
    unsummed: list[str],
    seeded: bool,
    together: dict | None,
    delta: float,
    models: int,
) -> str:
    """The folder's verdict, for a reader who has never heard of epsilon."""
    if open_:
        beside = f", and the noise in {_names(private)}, trained on the same patients, cannot help" if private else ""
        without = [name for name in open_ if name not in unsummed]
        why = [f"{_names(without)} {'were' if len(without) > 1 else 'was'} trained without any protection"]
        sums = f"the noise in {_names(unsummed)} is sized for sums, and messages were not summed"
        why = (why if without else []) + ([sums] if unsummed else [])
        return (
            f"Not private: {', and '.join(why)}{beside}. Whoever gets this folder may find out whether a given person "
            "was a training patient, and with which label. Do not pass it on as private; for that, train private "
            "settings alone, into a folder of their own."
        )
    if seeded:
        return (
            "Not private: its noise follows from a seed, and whoever knows or guesses that can take the noise off "
            "again. It is for teaching."
        )
    if all(value is None for value in together.values()):
        return (
            f"Not private: {models} models of {_names(private)} spend so much together that no accountant has a bound "
            "for them. Release fewer models, or train with --epsilon."
        )
    spent = min(value for value in together.values() if value is not None)
    found = recognised(spent, delta)
    all_of_it = (
        f"{models} model{'s' if models > 1 else ''} of {_names(private)}, epsilon {in_words(together)} together, at "
        f"delta {delta:g}"
    )
    if found > ALMOST_ALL:
        return (
            f"Private on paper only: {all_of_it}. That promises next to nothing: an attack that wrongly takes "
            f"{FALSE_ALARMS:.0%} of other people for training patients could recognise {found:.1%} of the training "
            "patients. Release fewer models, or train with --epsilon."
        )
    return (
        f"Private as a whole: {all_of_it}. Whatever the attack, if it wrongly takes {FALSE_ALARMS:.0%} of other people "
        f"for training patients, it recognises {found:.1%} of the training patients at most."
    )


def recognised(epsilon: float, delta: float) -> float:
    """The share of training patients that an attack with ``FALSE_ALARMS`` can recognise at most.

    At a rate f of false alarms that is e^epsilon f + delta, and 1 - e^-epsilon (1 - delta - f): Eq. 1 for the event
    "judged a patient" and for its complement (Kairouz, Oh, Viswanath 2015).

    >>> round(recognised(1.0, 1e-4), 3), round(recognised(8.99, 1e-4), 4)
    (0.027, 0.9999)
    """
    f = FALSE_ALARMS
    return min(math.exp(min(epsilon, 700)) * f + delta, 1 - math.exp(-epsilon) * (1 - delta - f))


def _names(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
