"""What users bring: a function or class of their own, named ``module:name`` on the command line."""

import importlib
import os
import sys
from typing import Any

from dopamine_lib.errors import InputError


def is_named(text: str) -> bool:
    """Whether ``text`` names something of the user's own, as ``module:name`` does.

    >>> is_named("my_model:small"), is_named("resnet18"), is_named("C:/data")
    (True, False, False)
    """
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_named(text: str, what: str) -> Any:
    """What ``module:name`` names; the module may lie in the working directory, or wherever Python finds it.

    what  what it is to be, for the message of an error
    Raises InputError where it cannot be imported, whatever the user's module raises.

    >>> load_named("math:hypot", "distance")(3, 4)
    5.0
    """
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:  # an installed command leaves it out
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's own code may raise anything
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{what} {text} cannot be had ({why}); name it as module:name, in a module of the working directory or on "
            "PYTHONPATH"
        ) from error
