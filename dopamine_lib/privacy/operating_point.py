"""An operating point: thresholds with a given specificity, from a histogram that the last rounds ask for.

A classifier that calls the likeliest grade hardly ever calls a rare one, and noise makes that worse. A screening
programme decides otherwise: it fixes the share of healthy eyes that it lets through, the specificity, and calls an eye
whose severity, the expected grade sum of c p_c, exceeds the threshold that belongs to it. That threshold depends on the
patients, so it costs privacy like the model. Here the last rounds pay for it, in place of gradients:

    cell     of a patient who lacks at least one of the diseases: which, and where on a public grid the severity is
    vector   one-hot but for a severity between two knots, which counts for both, the nearer one more: so rounding moves
             nobody from one cell to the next. Its norm is at most 1, and it is stretched to C
    message  the sum over a round's sample, with the same noise as a sum of clipped gradients

To the accountant such a round is any other: the same sample, the same C, the same noise. So ledger, statement,
encryption and transport know nothing of it. What the server reads off the noisy histogram is post-processing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dopamine_lib.errors import InputError, check_within

#: Knots of the grid of severities in one grade: with fewer it is coarse, with more, more noise adds up.
KNOTS = 8
#: The part of the rounds that asks for histograms.
SHARE = 0.1


def severity(logits: Tensor) -> Tensor:
    """The expected grade (B,), in [0, classes - 1], under the softmax of logits (B, classes).

    >>> severity(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 9.0]]))
    tensor([1.0000, 1.9996])
    """
    return torch.softmax(logits, 1) @ torch.arange(logits.shape[1]).to(logits)


@dataclass(frozen=True)
class OperatingPoint:
    """What thresholds are asked for.

    specificity  of each of them, in (0, 1)
    firsts       the first grade that counts as disease, for each, ascending
    classes      grades that the model knows
    Raises InputError for a specificity out of its bounds, and where nothing is screened for.

    >>> point = OperatingPoint(specificity=0.75, firsts=(1,), classes=2)
    >>> healthy = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> counted = point.histogram(healthy, torch.zeros(4, dtype=torch.int64))
    >>> [round(found, 2) for found in point.thresholds(counted)]  # of severities 0.12, 0.27, 0.5 and 0.73
    [0.61]
    """

    specificity: float
    firsts: tuple[int, ...]
    classes: int

    def __post_init__(self):
        check_within("specificity", self.specificity, 0, 1, "0.9 lets nine of ten healthy eyes through", high_open=True)
        if not self.firsts:
            raise InputError(
                "specificity is for two classes, or the five grades of diabetic retinopathy: leave it out, for of "
                f"these {self.classes} classes nobody has said which count as disease"
            )

    @property
    def cells(self) -> int:
        """Numbers in a histogram: a grid for each group of grades that the ``firsts`` tell apart, but for the last."""
        return len(self.firsts) * self._knots

    @property
    def _knots(self) -> int:
        return KNOTS * (self.classes - 1) + 1

    def histogram(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum float64 (cells,) of patients' vectors, from logits (B, classes) and labels int64 (B,).

        Each vector has a norm of at most 1; it is zero where a logit is not finite, and for the last group of grades.
        """
        place = KNOTS * severity(logits.double()).cpu()
        group = torch.bucketize(labels.cpu(), torch.tensor(self.firsts), right=True)
        counted = place.isfinite() & (group < len(self.firsts))
        hats = (1 - (place[counted, None] - torch.arange(self._knots)).abs()).clamp_min(0)
        return (F.one_hot(group[counted], len(self.firsts)).double().T @ hats).flatten()

    def thresholds(self, histogram: Tensor) -> list[float]:
        """The lowest severities beyond which at most 1 - specificity of those without the disease are, for each first.

        histogram  noisy counts (cells,), in any unit
        What lies beyond a severity decreases with it but for noise, which isotonic regression smooths away. Between two
        knots a count is spread evenly. Where noise has eaten all counts, a threshold is the highest grade.
        """
        from scipy.optimize import isotonic_regression

        counts, found = histogram.double().view(len(self.firsts), -1), []
        for number in range(1, len(self.firsts) + 1):
            healthy = counts[:number].sum(0)
            beyond = healthy.flip(0).cumsum(0).flip(0) - healthy / 2  # half of a knot's own lies above it
            beyond = torch.from_numpy(isotonic_regression(beyond.numpy(), increasing=False).x.copy())
            allowed = (1 - self.specificity) * healthy.sum()
            above = (beyond > allowed).nonzero()
            last = int(above.max()) if len(above) else -1
            if last == self._knots - 1 or allowed <= 0:
                found.append(float(self.classes - 1))
            elif last < 0:
                found.append(0.0)
            else:
                part = (beyond[last] - allowed) / (beyond[last] - beyond[last + 1])
                found.append(float(last + part) / KNOTS)
        return found


def counting_rounds(rounds: int) -> int:
    """How many of a run's rounds ask for histograms: a tenth, and at least one.

    >>> counting_rounds(3001), counting_rounds(100), counting_rounds(10)
    (300, 10, 1)
    """
    return max(1, int(SHARE * rounds))
