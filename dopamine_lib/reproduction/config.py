"""A whole experiment in a file, and sweeps: ``reproduce --config experiment.toml``.

    data = "synthetic"
    settings = ["C", "FSCDP-150"]
    runs = 3

    [setting.FSCDP-150]
    like = "FSCDP"
    rounds = 150

    [sweep]
    epsilon = [1, 3, 10]

A key is an option of ``reproduce`` without its dashes; the command line's own words come after the file's, so they
win. Tables under ``setting`` are settings of one's own (``federation.own_settings``). A sweep is one run for each
combination of the values listed, in a folder of its own.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.federation.own_settings import read_toml

#: A run's folder below --out, and the words that the file says for it.
Words = tuple[str, list[str]]


def config_words(path: str | Path, given: Sequence[str] = ()) -> Iterator[Words]:
    """What a file says, as words of the command line: once, or for each combination of its sweep.

    given  the command line's own words: an option among them is not swept
    Raises InputError where the file cannot be read or says what no option can be.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
    ...     _ = file.write('runs = 2\\n[sweep]\\nepsilon = [1, 3]'), file.flush()
    ...     list(config_words(file.name))
    [('epsilon=1', ['--runs', '2', '--epsilon', '1']), ('epsilon=3', ['--runs', '2', '--epsilon', '3'])]
    """
    said = read_toml(path)
    sweep, own = (_table(said, key, path) for key in ("sweep", "setting"))
    if "config" in {*said, *sweep}:
        raise InputError(f"{path} says config, but one file is all of an experiment: take that line out")
    if own and "settings" not in said:
        said["settings"] = list(own)
    fixed = [word for key, value in said.items() for word in _words(key, value, path)]
    for key, values in sweep.items():
        if not isinstance(values, list) or not values or len({str(value) for value in values}) < len(values):
            raise InputError(f"{path} sweeps {key} over {values!r}; give a list of different values: [1, 3, 10]")
    told = {word.partition("=")[0] for word in given}
    swept = [key for key in sweep if _option(key) not in told]
    for values in itertools.product(*(sweep[key] for key in swept)):
        pairs = list(zip(swept, values, strict=True))
        folder = ",".join(f"{key}={str(value).replace('/', '-')}" for key, value in pairs)
        yield folder, [*fixed, *(word for key, value in pairs for word in _words(key, value, path))]


def _table(said: dict, key: str, path: str | Path) -> dict:
    table = said.pop(key, {})
    if not isinstance(table, dict):
        raise InputError(f"{path} says {key} = {table!r}, but it must be a table: [{key}]")
    return table


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")


def _words(key: str, value: object, path: str | Path) -> list[str]:
    """One key as words: a list is joined by commas, true is the option alone, false is nothing."""
    if isinstance(value, dict):
        raise InputError(f"{path} has a table [{key}], but knows only [sweep] and [setting.NAME]")
    if isinstance(value, bool):
        return [_option(key)] if value else []
    return [_option(key), ",".join(map(str, value)) if isinstance(value, list) else str(value)]
