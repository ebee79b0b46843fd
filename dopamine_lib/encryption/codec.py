"""Updates as integers, and integers as plaintext slots: a range check, one rounding, exact sums back.

Only integers are encrypted or masked. The codec turns an update x (floats) into round(scale * x) and refuses, before
anything is encrypted, values with which the sum over all hospitals could leave the layout's range: there a sum wraps,
silently, and decrypts to something else (register, row 7).
"""

from dataclasses import dataclass

import numpy as np

from dopamine_lib.errors import InputError

SLOTS = 4096  # integers in one ciphertext: the degree n of the polynomials


class RangeError(InputError):
    """A value too large for the sum; the message names its index, its size, the limit, and what to do."""


@dataclass(frozen=True)
class Layout:
    """How an update's integers are packed into plaintext slots, and the BFV parameters that carry them.

    name           as on the command line
    number         names the layout in a message
    total_range    R: a total in [-R, R] comes back exactly
    fields         values in a slot
    field_bits     bits of each; field f of a slot is the multiple of 2^(f * field_bits)
    plain_modulus  t, a prime = 1 mod 2n, so that a plaintext has n slots; None without encryption
    modulus_bits   the primes of the coefficient modulus; SEAL sets the last one aside. () for SEAL's default
    public_key     encrypt with the public key, as the paper does. Otherwise with the secret key, which every
                   hospital holds anyway, in half the time and with a quarter of the noise
    """

    name: str
    number: int
    total_range: int
    fields: int = 1
    field_bits: int = 0
    plain_modulus: int | None = None
    modulus_bits: tuple[int, ...] = ()
    public_key: bool = False

    def slots(self, d: int) -> int:
        """The number of slots that d values take."""
        return -(-d // self.fields)

    def ciphertexts(self, d: int) -> int:
        """The number of ciphertexts that d values take.

        >>> LAYOUTS["paper"].ciphertexts(725_061), LAYOUTS["packed"].ciphertexts(725_061)
        (178, 60)
        """
        return -(-self.slots(d) // SLOTS)

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Integers int64 (d,) in slots int64 (slots(d),).

        >>> LAYOUTS["packed"].pack(np.array([1, -2, 3])).tolist()  # three fields of 16 bits
        [12884770817]
        >>> 1 - 2 * 2**16 + 3 * 2**32
        12884770817

        Neighbours go to neighbouring slots, so field f holds one contiguous stretch of the values. Sums of packed
        slots are packed sums, negative ones included, as long as each field's total stays in range.
        """
        width = self.slots(len(values))
        slots = values[:width].copy()
        for f in range(1, self.fields):
            part = values[f * width : (f + 1) * width]
            slots[: len(part)] += part << (f * self.field_bits)
        return slots

    def unpack(self, slots: np.ndarray, d: int) -> np.ndarray:
        """The d integers in ``slots``: the inverse of ``pack``, on sums as well."""
        rows = np.empty((self.fields, len(slots)), np.int64)
        half, rest = 1 << self.field_bits >> 1, slots.copy()
        for field in rows[:-1]:
            # the balanced remainder: a negative field borrowed from the field above, which is given back here
            np.add(rest, half, out=field)
            field &= 2 * half - 1
            field -= half
            rest -= field
            rest >>= self.field_bits
        rows[-1] = rest
        return rows.reshape(-1)[:d]


#: The paper's t = 40961, and the smallest prime = 1 mod 8192 over 2^48: three signed fields of 16 bits, or two of 24.
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("paper", 1, 20480, plain_modulus=40961, public_key=True),
        Layout("packed", 2, 2**15 - 1, 3, 16, plain_modulus=281474976768001, modulus_bits=(60, 20)),
        Layout("wide", 3, 2**23 - 1, 2, 24, plain_modulus=281474976768001, modulus_bits=(60, 20)),
        Layout("ring32", 4, 2**31 - 1),
    )
}
PAPER_SCALE = 1000.0


def find_layout(name: str) -> Layout:
    """The layout of that name. Raises InputError, naming the others, for an unknown one."""
    if name not in LAYOUTS:
        raise InputError(f"layout is {name!r}, but must be one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


class Codec:
    """Floats to integers, and totals back to floats, for K hospitals that add up.

    layout     its name
    hospitals  K, all that may take part
    bound      B, the largest |x| that must fit
    clamped    whether values over the limit are sent as the limit, and NaN as 0, instead of being refused: for messages
               that are noisy already, where a refusal would tell of the patients

    ``scale``, integer units in 1.0, is the largest with which K values of size B add up within the range; 1000 in
    the paper's layout, as there. One hospital's value may be ``limit`` units at most, since K of them stay within
    the range. The only loss is the rounding: at most 1/2 unit in a value, K/2 units in a total.

    >>> codec = Codec("packed", hospitals=10, bound=0.5)
    >>> codec.limit, codec.scale, codec.encode(np.array([0.5, -0.1, 0.0])).tolist()
    (3276, 6552.0, [3276, -655, 0])

    Raises InputError for an unknown layout, no hospital or a bound that is not a finite number over 0; RangeError
    where the layout is too narrow for K hospitals or for the bound.
    """

    def __init__(self, layout: str, *, hospitals: int, bound: float, clamped: bool = False):
        self.layout, self.hospitals, self.clamped = find_layout(layout), hospitals, clamped
        if hospitals < 1:
            raise InputError(f"hospitals is {hospitals}, but a sum needs at least 1")
        if not (np.isfinite(bound) and bound > 0):
            raise InputError(f"bound is {bound}, but must be a finite number over 0: the largest |x| to be sent")
        self.limit = limit_of(self.layout, hospitals)
        self.scale = PAPER_SCALE if layout == "paper" else float(self.limit / bound)
        if np.rint(bound * self.scale) > self.limit:
            raise RangeError(
                f"a value of {bound} is {bound * self.scale:.0f} units at scale {self.scale:g}, but {hospitals} "
                f"hospitals in layout {layout!r} leave {self.limit} to each: take a smaller bound or a wider layout"
            )

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Floats (d,) as int64 (d,): round(scale * x), half to even, computed in float64.

        Raises RangeError, naming the first such value, for one over the limit or a NaN, unless these are clamped;
        InputError for more axes.
        """
        units = np.multiply(x, self.scale, dtype=np.float64)
        if units.ndim != 1:
            raise InputError(f"an update of shape {units.shape} was given, but it must have one axis: flatten it")
        np.rint(units, out=units)
        if self.clamped:
            np.nan_to_num(units, copy=False).clip(-self.limit, self.limit, out=units)
        # a NaN fails both comparisons
        if units.size and not (units.max() <= self.limit and units.min() >= -self.limit):
            index = int(np.flatnonzero(~(np.abs(units) <= self.limit))[0])
            raise RangeError(
                f"value {index} is {float(x[index]):g}, {units[index]:.0f} units, but {self.hospitals} hospitals "
                f"in layout {self.layout.name!r} leave {self.limit} to each: clip lower, scale less "
                f"(now {self.scale:g}) or take a wider layout"
            )
        return units.astype(np.int64)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """A total int64 (d,) as float64 (d,): total / scale."""
        return total / self.scale


def limit_of(layout: Layout, hospitals: int) -> int:
    """The largest |integer| that one of K hospitals may send, R // K. Raises RangeError where that is 0."""
    limit = layout.total_range // hospitals
    if limit < 1:
        raise RangeError(
            f"{hospitals} hospitals were given, but layout {layout.name!r} holds totals up to {layout.total_range}: "
            f"take at most {layout.total_range}, or a wider layout"
        )
    return limit


def check_limit(values: np.ndarray, limit: int) -> None:
    """Raise RangeError unless all integers (d,) lie in [-limit, limit]."""
    if values.size and (values.max() > limit or values.min() < -limit):
        index = int(np.flatnonzero((values > limit) | (values < -limit))[0])
        raise RangeError(
            f"value {index} is {values[index]} units, but one hospital may send at most {limit}: "
            "clip lower, scale less or take a wider layout"
        )
