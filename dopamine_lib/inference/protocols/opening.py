"""What the patient is told at the end: scores under fresh noise, or the grade alone.

Scores. An exact answer is an integer that says more than the score it stands for. A head's is t u + b with t known to
the patient: modulo t it is b modulo t, and four answers gave the provider's biases exactly. So whatever the last layer
is, the provider adds noise to its share before it sends it:

    1. The provider draws e, a sum of 12 uniform integers below 2^k, less its mean, and sends z_1 + e; the patient adds
       z_0. e has the standard deviation 2^k and is never larger than 6 times that; k is public, in the plan.

Why this hides: e is independent of all else and used once, so the patient's view follows from the answer plus e. Shift
the answer by d: its distribution moves by at most d / 2^k in total variation, as that of any one of the twelve does. So
N answers tell nothing about what takes place below 2^k / N ring units, where a modulus t of some 20 bits lies while k
is about 45. What remains is an average: N answers on one picture give its scores to 2^k / sqrt(N).

The grade alone, a private argmax:

    1. Of its share of each score either party keeps the upper 16 bits, as the upper half of a word in Z_2^32, and
       writes the number c of the class into the lower half, which then stands for 2 c. No message.
    2. The larger of every pair of words goes on, until one is left (``pooling``): 3 rounds for each halving. A maximum
       is exactly one of its two, the lower half included.
    3. The provider sends the lower half of its share of the last word; the patient adds its own and has 2 c.

Why this hides: step 2 opens nothing beyond comparisons, and what the provider sends in step 3 is 2 c minus the
patient's own half, modulo 2^16: it follows from c. The upper half, the winner's score, stays shared. Of two scores
less than 2 units of the upper half apart, either may win.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.comparison import LIMIT
from dopamine_lib.inference.protocols.operation import Layer, Operation, Run, Shape
from dopamine_lib.inference.protocols.pooling import MaximumOperation
from dopamine_lib.inference.protocols.sharing import RINGS, random_ring

#: What may be opened: every score, or the number of the largest.
ANSWERS = SCORES, GRADE = "scores", "grade"
#: Uniform numbers in one of noise: their variances, 1/12 each, add up to 1.
TERMS = 12
#: Bits of a word's lower half, which holds twice the number of a class.
HALF = 16
MOST_CLASSES = 2 ** (HALF - 2)


def noise(bits: int, shape: tuple[int, ...], ring_bits: int = 64) -> np.ndarray:
    """Fresh ring elements of mean 0 and standard deviation 2^bits, none larger than 6 times that; 1 <= bits <= 58.

    >>> e = noise(20, (10000,)).view(np.int64)
    >>> bool(abs(e.std() / 2**20 - 1) < 0.05), bool(abs(e).max() <= 6 * 2**20)
    (True, True)
    """
    terms = random_ring((TERMS, *shape), 64) >> np.uint64(64 - bits)
    mean = np.uint64(TERMS // 2 * (2**bits - 1))
    return (terms.sum(0, dtype=np.uint64) - mean).astype(RINGS[ring_bits])


@dataclass(frozen=True)
class ArgMax(Layer):
    """The number of the largest score, in Z_2^16 at the scale 2.

    dropped  bits of a score that are not looked at: all but the upper 16
    """

    dropped: int

    bits = HALF

    @property
    def uncompared(self) -> bool:
        """Differences of scores may fill the ring of 32 bits, so the scores themselves are asked about."""
        return self.dropped == HALF

    def output_shape(self, *inputs: Shape) -> Shape:
        if self.dropped not in (bits - HALF for bits in (32, 64)) or prod(inputs[0]) > MOST_CLASSES:
            raise InputError(
                f"layer '{self.name}' takes the largest of {prod(inputs[0])} without {self.dropped} bits; it takes at "
                f"most {MOST_CLASSES} without 16 or 48"
            )
        return (1, 1, 1)

    def operations(self, input_shape: Shape) -> list[Operation]:
        left, rounds = prod(input_shape), []
        while left > 1:
            rounds.append(MaximumOperation(left // 2, watch=False))  # they may fill the ring
            left -= left // 2
        return rounds

    def private(self, inputs: list[np.ndarray], runs: list[Run]) -> np.ndarray:
        words = (inputs[0].reshape(-1) >> self.dropped).astype(np.uint32) << HALF
        words += np.arange(len(words), dtype=np.uint32)
        for run in runs:
            pairs = len(words) // 2
            words = np.concatenate([run(words[:pairs], words[pairs : 2 * pairs]), words[2 * pairs :]])
        return words.astype(np.uint16).reshape(self.shape)

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return np.full(self.shape, self.scale * inputs[0].argmax())

    def room(self, inputs: list[np.ndarray], output: np.ndarray) -> float:
        # the room is for differences of two scores
        return float(np.ptp(inputs[0])) / 2.0 ** (self.dropped - HALF) / LIMIT
