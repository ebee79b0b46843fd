"""Normal noise that is rounded exactly: N(0, std^2) as real numbers, of which as many digits are computed as matter.

A noisy sum in floating point betrays its sum: x + z, rounded to float32, lies on a lattice that depends on x, and a
float z takes values of its own lattice only, so most sums x cannot have led to what was released (Mironov 2012). Here
nothing is released but round(x + z) for a real z, on a grid that everybody knows, and it has exactly the probabilities
of a real normal variable. What that takes is to know z to both sides of the next half-integer:

    bits      Box and Muller: z = std sqrt(-2 ln(1 - u)) cos(2 pi v), or sin, for u and v uniform in [0, 1). They are
              real numbers, of infinitely many random bits. Their first 53 are drawn at once, the others if they matter
    float64   z computed from 53 bits is off by less than ``ERROR`` std, with room for the elementary functions to be
              off by 4 units in their last place (a test compares PyTorch's; they stay below 1). Pairs with u within
              2^-38 of 0 or 2^-21 of 1, where the missing bits alone move the radius further, get 64 more at once
    halves    where x + z is within that error of a half-integer, a few times in 10^9 values, more bits are drawn and
              z is computed to as many digits, until the integer is certain
"""

import mpmath
import torch

from dopamine_lib.privacy.randomness import WORD, Stream, unit

#: Bound on the error of ``Normals.values``, relative to std.
ERROR = 2.0**-33
#: Radii outside of these, where u is within 2^-38 of 0 or 2^-21 of 1, need more than 53 bits.
RADII = 2.0**-18.5, 5.39
#: Values that one thread works on at a time, so that they stay in its cache from one pass to the next.
BLOCK = 1 << 14


class Normals:
    """n independent variables from N(0, std^2), drawn from a stream: float64 approximations, and exact roundings.

    >>> from dopamine_lib.privacy.randomness import Randomness
    >>> drawn = Normals(Randomness(seed=0).stream("example"), n=10_000, std=64.0)
    >>> 62 < float(drawn.values.std()) < 66, drawn.nearest(7, 0.25) == round(drawn.values[7] + 0.25)
    (True, True)
    """

    def __init__(self, stream: Stream, n: int, std: float):
        self.std, self._stream, self._half = std, stream, (n + 1) // 2
        self._words, self._bits = stream.words(2 * self._half), {}
        values = torch.empty(2 * self._half, dtype=torch.float64)
        self.values = values.numpy()
        threads = torch.get_num_threads()
        block = BLOCK if threads == 1 else 2 * threads * BLOCK  # torch shares work out from 2^15 values a thread
        for at in range(0, self._half, block):
            self._fill(values, at, min(at + block, self._half))

    def nearest(self, index: int, x: float) -> int:
        """x plus the variable at ``index``, rounded to the nearest integer: exactly, whatever it takes."""
        while True:
            low, high = self._interval(index, x, 0.5)
            if mpmath.floor(low) == mpmath.floor(high):
                return int(mpmath.floor(low))

    def _fill(self, values: torch.Tensor, start: int, end: int) -> None:
        """Compute the pairs ``start`` to ``end``: in order to stay in the cache, not all of them at once."""
        half = self._half
        radius = unit(self._words[start:end]).neg_().log1p_().mul_(-2.0).sqrt_()
        angle = unit(self._words[half + start : half + end]).mul_(2 * torch.pi)
        least, most = radius.aminmax()
        far = ((radius < RADII[0]) | (radius > RADII[1])).nonzero() if least < RADII[0] or most > RADII[1] else ()
        radius.mul_(self.std)
        torch.mul(radius, angle.cos(), out=values[start:end])
        torch.mul(radius, angle.sin_(), out=values[half + start : half + end])
        for pair in far:
            for index in (start + int(pair), half + start + int(pair)):
                values[index] = float(sum(self._interval(index)) / 2)

    def _interval(self, index: int, *terms: float) -> tuple[mpmath.mpf, mpmath.mpf]:
        """What the terms plus the variable at ``index`` lie between, by 64 bits more than were drawn for it so far."""
        pair, part = index % self._half, mpmath.cos if index < self._half else mpmath.sin
        known = (int(self._words[at]) & ((1 << WORD) - 1) for at in (pair, self._half + pair))
        bits, *uv = self._bits.get(pair, (WORD, *known))
        more = (int(word) & ((1 << 64) - 1) for word in self._stream.words(2))
        bits, u, v = self._bits[pair] = bits + 64, *((old << 64) + new for old, new in zip(uv, more, strict=True))
        with mpmath.workprec(2 * bits + 64):  # of any sum below 2^64: float64 would round it
            last = mpmath.ldexp(1, -bits)
            near, far = (mpmath.sqrt(-2 * mpmath.log((2**bits - u - side) * last)) for side in (0, 1))
            value = sum(map(mpmath.mpf, terms), self.std * near * part(2 * mpmath.pi * v * last))
            error = self.std * (far - near + 8 * far * last)  # 2 pi, and more than enough for the rounding here
            return value - error, value + error
