"""A function of the user's own, named ``module:function`` on the command line.

It makes data or a network, or takes the place of a sum, the server's step or an accountant (``INTERFACES.md``).
"""

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dopamine_lib.errors import InputError

_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def is_function(text: str) -> bool:
    """Whether ``text`` is of the form ``module:function``: using it runs the user's code.

    >>> is_function("my_model:small"), is_function("resnet18"), is_function("C:/scans")
    (True, False, False)
    """
    return bool(_FUNCTION.fullmatch(text))


def call_function(text: str, what: str, *arguments: object, **offered: object) -> Any:
    """What ``module:function`` returns for ``arguments`` and those of the ``offered`` ones that it takes by name.

    Raises InputError as ``find_function`` and what that finds.

    >>> call_function("math:hypot", "distance", 3, 4)
    5.0
    """
    return find_function(text, what)(*arguments, **offered)


def find_function(text: str, what: str) -> Callable[..., Any]:
    """``module:function``, to be called like ``call_function``, more than once; a class is as good as a function.

    what  such as "model" or "data", for the message of an error
    Raises InputError, then and when it is called, with the line, for whatever the user's code raises, and where there
    is no such function; the module may lie in the working directory or anywhere on PYTHONPATH.
    """
    module, name = _FUNCTION.fullmatch(text).groups()
    if "" not in sys.path and os.getcwd() not in sys.path:  # an installed command leaves it out
        sys.path.insert(0, os.getcwd())
    with users_code(text, what):
        function = getattr(importlib.import_module(module), name)
        try:
            takes = inspect.signature(function).parameters
        except ValueError:  # some that are written in C have none
            takes = {}

    def call(*arguments: object, **offered: object) -> Any:
        with users_code(text, what):
            return function(*arguments, **{key: value for key, value in offered.items() if key in takes})

    return call


@contextmanager
def users_code(text: str, what: str) -> Iterator[None]:
    """Turn whatever the code behind ``text``, ``module:function``, raises into an InputError, with its line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the user's own code may raise anything
        library, stack = Path(__file__).parents[1], traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in stack if library not in Path(frame.filename).parents]
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        why = (str(error).strip() or "no message").splitlines()[0]
        raise InputError(
            f"{what} {text}: {type(error).__name__}: {why}{where}; it must be a function in a module of the working "
            "directory or on PYTHONPATH: put it right there"
        ) from error
