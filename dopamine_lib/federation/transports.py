"""Totals that hide every message: sums under BFV and behind masks, with all parties in this process.

The server sees no message. What passes between the parties is bytes, as it would be between processes
(``wires.sums``).
"""

from dopamine_lib.federation.aggregation import Aggregation, IntegerAggregation, in_the_clear
from dopamine_lib.federation.plan import Plan


def make_aggregation(plan: Plan) -> Aggregation:
    """The aggregation of a plan in this process, with fresh keys."""
    if not plan.hidden:
        return in_the_clear(plan)
    if plan.aggregation == "masks":
        from dopamine_lib.encryption.masks import MaskSum

        return IntegerAggregation(MaskSum(plan.hospitals, plan.d, least=plan.least_in_a_total), plan)
    from dopamine_lib.encryption.bfv_sum import BfvSum  # tenseal takes a second to load

    terms = {"least": plan.least_in_a_total, "limit": plan.message_limit}
    return IntegerAggregation(BfvSum(plan.hospitals, plan.d, plan.layout, **terms), plan)
