"""A function of the user's own, named ``module:function`` on the command line: it makes data, or a network."""

import importlib
import inspect
import os
import re
import sys
import traceback
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

    what  "model" or "data", for the message of an error
    Raises InputError, with the line, for whatever the user's code raises, and where there is no such function; the
    module may lie in the working directory or anywhere on PYTHONPATH.

    >>> call_function("math:hypot", "distance", 3, 4)
    5.0
    """
    module, name = _FUNCTION.fullmatch(text).groups()
    if "" not in sys.path and os.getcwd() not in sys.path:  # an installed command leaves it out
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
        try:
            takes = inspect.signature(function).parameters
        except ValueError:  # some that are written in C have none
            takes = {}
        return function(*arguments, **{key: value for key, value in offered.items() if key in takes})
    except InputError:
        raise
    except Exception as error:  # the user's own code may raise anything
        last, library = traceback.extract_tb(error.__traceback__)[-1], Path(__file__)
        where = "" if last.filename == str(library) else f" ({Path(last.filename).name}, line {last.lineno})"
        why = (str(error).strip() or "no message").splitlines()[0]
        raise InputError(
            f"{what} {text}: {type(error).__name__}: {why}{where}; it must be a function in a module of the working "
            "directory or on PYTHONPATH: put it right there"
        ) from error
