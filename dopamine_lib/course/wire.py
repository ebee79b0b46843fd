"""Arguments and answers of homework as JSON, between the judge and the process in which a student's code runs.

    numbers, text, None, lists        themselves
    tuples, dicts, ranges, arrays     {"tuple": [...]}, {"dict": [[key, value], ...]}, {"range": [...]}, {"array": ...}
    random generators                 {"generator": seed}: a fresh one, so that the judge's own cannot be guessed
    functions and other objects       {"object": number}: they stay with the judge, who is asked to call them

Whatever comes back is one of these, so no answer brings methods of its own along.
"""

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np

#: Numbers of one array or range.
LONGEST = 10**7


def pack(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """What stands for ``value`` in JSON; ``keep`` gives an object that stays here its number.

    >>> pack((1, [2.5, None]))
    {'tuple': [1, [2.5, None]]}

    Raises TypeError for what is not plain data where there is no ``keep``.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "biufcU":
        array = np.asarray(value)
        text = base64.b64encode(array.tobytes()).decode()
        return {"array": text, "type": array.dtype.str, "shape": list(array.shape), "scalar": value.ndim == 0}
    if isinstance(value, list):
        return [pack(one, keep) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(one, keep) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key, keep), pack(one, keep)] for key, one in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if keep is None:
        raise TypeError(f"an answer is made of numbers, text, arrays, lists, tuples and dicts, not of {type(value)}")
    if isinstance(value, np.random.Generator):
        return {"generator": int(value.integers(2**62))}
    return {"object": keep(value)}


def unpack(message: Any, find: Callable[[int], Any] | None = None) -> Any:
    """The value that ``pack`` packed; ``find`` gives what stands for the object of a number.

    >>> unpack({"tuple": [1, [2.5, None]]})
    (1, [2.5, None])

    Raises ValueError, KeyError or TypeError for any other message, and for more than ``LONGEST`` numbers at once.
    """
    if isinstance(message, list):
        return [unpack(one, find) for one in message]
    if not isinstance(message, dict):
        return message
    if "array" in message:
        kind = np.dtype(message["type"])
        if kind.kind not in "biufcU":
            raise ValueError(f"an array of {kind}")
        if math.prod(max(1, length) for length in message["shape"]) > LONGEST:  # an empty array may have a long side
            raise ValueError(f"an array of more than {LONGEST} numbers")
        array = np.frombuffer(base64.b64decode(message["array"]), kind).reshape(message["shape"]).copy()
        if kind.kind == "U":
            array.tolist()  # a ValueError where a character is none
        return array[()] if message["scalar"] else array
    if "tuple" in message:
        return tuple(unpack(one, find) for one in message["tuple"])
    if "dict" in message:
        return {unpack(key, find): unpack(one, find) for key, one in message["dict"]}
    if "range" in message:
        numbers = range(*message["range"])
        if numbers[LONGEST:]:
            raise ValueError(f"a range of more than {LONGEST} numbers")
        return numbers
    if find is None:
        raise ValueError("an object that is no plain data")
    return np.random.default_rng(message["generator"]) if "generator" in message else find(message["object"])
