"""How exact a sum of clipped gradients is: what rounding adds to one patient's part, and when float32 will not do.

Noise of sigma C hides a patient who moves a sum by C. Sums as computed may differ by a little more, because with one
patient more everybody's are added in another order. Let a sum have n vectors of length C at most. Whatever the order,
each addition is off by at most 2^-24 of its result in float32, which is as long as C times the vectors that are in it,
so all together by 2^-24 (2 + 3 + ... + n) C at most (Higham 2002, equation 4.3). With one more rounding of each vector
before the sum, and one of the sum after it, that is below 2^-24 n (n + 5) / 2 C, for each of the two neighbours:

    up to ``FEW`` patients    float32 keeps within ``FLOAT_SLACK``
    more                      float64 does, for any number below 10^6

A gradient that is itself a sum, of products at P positions, may be longer on its way than at its end: see
``linear_map``, which has ``room`` for that. The slack is paid for with as much more noise, so that sigma and every
epsilon stay what they are. One thing is not proven: a network computes several patients at once, and how it rounds one
patient's gradient may depend on who else is there. That is measured to be a thousandth of the slack, and named in every
statement; a head trained by ``head_loop`` computes everybody alone.
"""

import torch
from torch import Tensor

#: How much further than C one patient moves a sum, relatively: clipped to a millionth, and rounded.
FLOAT_SLACK, CLIP_SLACK = 1e-3, 1e-6
#: The most patients whose vectors are added in float32.
FEW = 120


def most_together(index: Tensor, group: Tensor | None) -> int:
    """The most patients of ``index`` (B,) in one sum, by their ``group`` (B,); their number where that is ``FEW``.

    >>> most_together(torch.arange(300), torch.arange(300) % 2)
    150
    """
    return len(index) if group is None or len(index) <= FEW else int(group.bincount().max())


def sum_type(most: int, given: torch.dtype) -> torch.dtype:
    """What a sum of ``most`` vectors of the type ``given`` is added in."""
    return given if most <= FEW else torch.float64


def room(most: int) -> float:
    """What is left of the slack for each of ``most`` vectors, in units of C, in either neighbour's sum; 0 for float64.

    >>> f"{room(10):.1e} {room(120):.1e} {room(121)}"
    '5.0e-05 4.4e-07 0'
    """
    return (FLOAT_SLACK - CLIP_SLACK) / (2 * most) - (most + 5) / 2 * 2**-24 if 0 < most <= FEW else 0
