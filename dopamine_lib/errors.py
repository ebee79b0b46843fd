"""The one error that a user is meant to read, and the checks that most of them come from."""

import math
import numbers

#: Which extra of pyproject.toml brings a module that training and accounting do without.
EXTRAS = {
    **dict.fromkeys(("tenseal",), "encryption"),
    **dict.fromkeys(("mpi4py",), "mpi"),
    **dict.fromkeys(("grpc",), "grpc"),
    **dict.fromkeys(("flwr",), "flower"),
    **dict.fromkeys(("syft", "syft_perms", "voila", "ipywidgets", "IPython", "tornado"), "inference"),
    **dict.fromkeys(("jupyterlab", "nbformat", "nbgrader", "nbconvert", "traitlets", "psutil"), "course"),
    **dict.fromkeys(("sphinx", "myst_nb", "furo", "sphinx_revealjs", "jupyter_server_mathjax"), "course"),
}


class InputError(ValueError):
    """Something the user gave is wrong: one line that names the value, the bound and the remedy."""


def check_within(
    name: str, value: object, low: float, high: float, remedy: str, *, low_open: bool = True, high_open: bool = False
) -> None:
    """Raise InputError unless ``value`` is a finite number between ``low`` and ``high``; by default in (low, high].

    >>> check_within("sample rate", 1.5, 0, 1, "it is a probability, batch / patients")
    Traceback (most recent call last):
    dopamine_lib.errors.InputError: sample rate is 1.5, but must lie in (0, 1]: it is a probability, batch / patients
    """
    if isinstance(value, numbers.Real) and math.isfinite(value):
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        if above and below:
            return
    bounds = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
    raise InputError(f"{name} is {value}, but must lie in {bounds}: {remedy}")


def not_installed(module: str) -> InputError:
    """The refusal where a module of an extra is missing.

    >>> raise not_installed("mpi4py")
    Traceback (most recent call last):
    dopamine_lib.errors.InputError: mpi4py is not installed; run: pip install "dopamine-kit[mpi]"
    """
    return InputError(f'{module} is not installed; run: pip install "dopamine-kit[{EXTRAS[module]}]"')


def table_model(path: object, architecture: str) -> InputError:
    """The refusal of a model of a table's rows, which lies in the file ``path``, where an image is asked for.

    >>> raise table_model("FSCDP-0.safetensors", "linear")
    Traceback (most recent call last):
    dopamine_lib.errors.InputError: FSCDP-0.safetensors is a model of a table's rows (linear); give one of images
    """
    return InputError(f"{path} is a model of a table's rows ({architecture}); give one of images")


def check_whole(name: str, value: object, low: float, high: float, remedy: str) -> None:
    """Raise InputError unless ``value`` is a whole number in [low, high]."""
    check_within(name, value, low, high, remedy, low_open=False)
    if value != int(value):
        raise InputError(f"{name} is {value}, but must be whole: {remedy}")


def check_epsilon(epsilon: float, *, zero: bool = False, high: float = 1000) -> None:
    """Raise InputError unless 0 < epsilon <= ``high``, or 0 <= epsilon <= ``high`` where ``zero`` is allowed."""
    check_within("epsilon", epsilon, 0, high, "a useful bound is below 10", low_open=not zero)


def check_delta(delta: float, *, zero: bool = False) -> None:
    """Raise InputError unless 0 < delta < 1, or 0 <= delta < 1 where ``zero`` is allowed."""
    remedy = "take much less than 1 / patients, e.g. 1e-6" + (", or 0 for pure DP" if zero else "")
    check_within("delta", delta, 0, 1, remedy, low_open=not zero, high_open=True)
