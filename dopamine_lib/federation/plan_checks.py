"""What a plan's terms must not be together: nothing is trained by a plan that fails here."""

import math
from typing import TYPE_CHECKING

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.privacy.local_steps import longest_step
from dopamine_lib.privacy.operating_point import OperatingPoint

if TYPE_CHECKING:
    from dopamine_lib.federation.plan import Plan


def check_terms(plan: "Plan") -> None:
    """Raise InputError for terms that contradict each other, or by which nothing would be trained."""
    if plan.discrete and not plan.setting.private:
        raise InputError(f"{plan.setting.name} has no discrete noise: it is not private and has none at all")
    if not plan.setting.federated and (plan.hospitals != 1 or plan.aggregation != "plain"):
        raise InputError(
            f"{plan.setting.name} is not federated, but {plan.hospitals} hospitals and aggregation "
            f"'{plan.aggregation}' were given: take all patients as one, and 'plain'"
        )
    if plan.hidden and not plan.setting.private and plan.invited < 3:
        raise InputError(
            f"{plan.setting.name} has no noise and invites {plan.invited} of {plan.hospitals} hospitals a round, "
            "and of a total of fewer than 3 each has the other's message: take more hospitals, or aggregation plain"
        )
    check_within("least", plan.survivors, 1, plan.hospitals, "no more hospitals can survive", low_open=False)
    if plan.invited < plan.least_in_a_total:
        raise InputError(
            f"{plan.setting.name} invites {plan.invited} of {plan.hospitals} hospitals a round, but aggregation "
            f"'{plan.aggregation}' opens no total of fewer than {plan.least_in_a_total}: nothing would be trained. "
            "Take more hospitals, more participation, or aggregation plain"
        )
    if plan.setting.draws > 1:
        _check_local_steps(plan)
    if plan.operating_point is not None:
        _check_operating_point(plan, plan.operating_point)
    if plan.discrete and plan.accountant in ("prv", "pld") and math.isfinite(plan.budget):
        if plan.noise.event(plan.setting.steps).prv is None:
            raise InputError(
                f"discrete noise of so few units has no {plan.accountant.upper()}, so no budget by it: take "
                "accountant rdp or rdp_classic, or fewer hospitals"
            )


def _check_operating_point(plan: "Plan", point: OperatingPoint) -> None:
    if plan.setting.rounds < 2:
        raise InputError(f"specificity takes one of {plan.setting.name}'s rounds, which has no other: take more")
    if point.cells > plan.d:
        raise InputError(
            f"specificity asks for {point.cells} counts in a message, but the model's have {plan.d} numbers: take "
            "a larger model"
        )


def _check_local_steps(plan: "Plan") -> None:
    """Raise InputError where local steps under one sum's noise would have no bound, as ``privacy.local_steps`` has it.

    A step of a hospital, eta / (q N_k) for each patient, must be so short that it draws no two models apart.
    """
    name, setting, choice = plan.setting.name, plan.setting, plan.choice
    if not (setting.private and setting.federated) or setting.participation != 1 or plan.discrete:
        raise InputError(
            f"{name} has {setting.local_steps} local steps under one sum's noise, which have a bound with Gaussian "
            "noise and all hospitals in every round alone: take 1, or shared_noise = false"
        )
    longest = longest_step(choice.max_grad_norm) * setting.sample_rate * min(plan.sizes)
    if choice.learning_rate > longest:
        raise InputError(
            f"learning_rate is {choice.learning_rate:.4g}, but {name}'s {setting.local_steps} local steps have a bound "
            f"up to {longest:.4g} alone, 8 q N_k / C^2: take a smaller one, or a larger sample_rate"
        )
