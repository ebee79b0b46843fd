"""The one error a user is meant to read, and the check most of them come from."""

import math
import numbers


class InputError(ValueError):
    """Something the user gave is wrong: one line that names the value, the bound and the remedy."""


def check_within(name: str, value, low, high, remedy: str, *, low_open: bool = True, high_open: bool = False) -> None:
    """Raise InputError unless ``value`` is a finite number between ``low`` and ``high``; by default in (low, high]."""
    if isinstance(value, numbers.Real) and math.isfinite(value):
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        if above and below:
            return
    bounds = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
    raise InputError(f"{name} is {value}, but must lie in {bounds}: {remedy}")
