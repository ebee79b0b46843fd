"""Totals that hide every message: sums under BFV and behind masks, with all parties in this process.

The server sees no message. What passes between the parties is bytes, as it would be between processes
(``mpi.sums``).
"""

from dopamine_lib.encryption.codec import Codec
from dopamine_lib.encryption.transcript import Transcript
from dopamine_lib.errors import InputError
from dopamine_lib.federation.aggregation import Aggregation, IntegerAggregation, in_the_clear
from dopamine_lib.federation.plan import Plan
from dopamine_lib.privacy.integer_noise import IntegerNoise


def message_limit(codec: Codec | IntegerNoise) -> int:
    """The largest |integer| that one hospital may send.

    Discrete noise may take one hospital past its share of the range: what overflows was computed and charged to delta.
    """
    return codec.total_range if isinstance(codec, IntegerNoise) else codec.limit


def least_in_a_total(plan: Plan) -> int:
    """The fewest hospitals whose total is opened: those whose noise makes up sigma; a sum of one hides nothing."""
    return max(2, plan.survivors) if plan.setting.shared_noise else 2


def make_aggregation(plan: Plan, transcript: Transcript | None = None) -> Aggregation:
    """The aggregation of a plan in this process, with fresh keys.

    transcript  records all that the server sees
    """
    if plan.aggregation == "plain":
        return in_the_clear(plan)
    terms = {"least": least_in_a_total(plan), "transcript": transcript}
    if plan.aggregation == "masks":
        from dopamine_lib.encryption.masks import MaskSum

        return IntegerAggregation(MaskSum(plan.hospitals, plan.d, **terms), plan.codec)
    if plan.aggregation != "bfv":
        raise InputError(f"aggregation is '{plan.aggregation}', but must be plain, bfv or masks, which are made here")
    from dopamine_lib.encryption.aggregation import BfvSum  # tenseal takes a second to load

    sums = BfvSum(plan.hospitals, plan.d, plan.layout, limit=message_limit(plan.codec), **terms)
    return IntegerAggregation(sums, plan.codec)
