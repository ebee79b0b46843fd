"""Flower's run-config, which is this kit's command line: a key for every option of a party.

``flwr run APP CONNECTION -c 'epsilon=3.0 rounds=100'`` gives options by their names without dashes. What an option is
not given is "" there, since TOML has no word for nothing. Where a hospital's files are is its own affair (``PLACES``):
its node's config says it, and the run's is not asked.
"""

import argparse
import json
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.federation.arguments import party_arguments

#: What a hospital's node-config says, and a run's cannot: where its keys, its results and its files are.
PLACES = ("identities", "out", "data-dir", "weights")
#: Of these the run-config's apply to the server, and of the last also to hospitals that have none of their own.
_OF_ALL = ("weights",)


def flower_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of one party: the experiment's, its keys, and how many hospitals a round needs."""
    command.add_argument("--identities", required=True, metavar="DIR", help="the parties' keys")
    command.add_argument("--least", type=int, metavar="M", help="hospitals that must arrive (default: all)")
    party_arguments(command)


class _Names:
    """Takes in what a parser is given: (default, help) of every option, by its name without dashes."""

    def __init__(self):
        self.found: dict[str, tuple[object, str]] = {}

    def add_argument(self, name: str, *, default: object = None, action: str = "", help: str, **terms: object) -> None:
        """As ``ArgumentParser.add_argument``."""
        given = False if action == "store_true" else default
        self.found[name.removeprefix("--")] = ("" if given is None else given, help)


def defaults() -> dict[str, tuple[object, str]]:
    """Every key of the run-config: its default and what it means.

    >>> defaults()["aggregation"][0], defaults()["epsilon"][0], defaults()["resume"][0]
    ('bfv', '', False)
    """
    names = _Names()
    flower_arguments(names)
    return names.found


def words(config: dict[str, object]) -> list[str]:
    """The command line that a run-config stands for. Raises InputError for a key that is no option.

    >>> words({"epsilon": 3.0, "rounds": 100, "resume": True, "loss": ""})
    ['--epsilon', '3.0', '--rounds', '100', '--resume']
    """
    known, found = defaults(), []
    for key, value in config.items():
        if key not in known:
            raise InputError(f"run-config has {key}, which is no option: {', '.join(known)}")
        if isinstance(value, bool) != isinstance(known[key][0], bool):
            takes = "true or false" if isinstance(known[key][0], bool) else "a value, not a yes or no"
            raise InputError(f"{key} is {str(value).lower()} in the run-config, but it takes {takes}")
        if value is True:
            found.append(f"--{key}")
        elif value is not False and value != "":
            found += [f"--{key}", str(value)]
    return found


def hospital_words(run: dict[str, object], node: dict[str, object]) -> list[str]:
    """The command line of a hospital: the run's options, and its own places. Raises InputError where these lack.

    >>> node = {"partition-id": 3, "identities": "keys", "out": "mine"}
    >>> hospital_words({"data": "heart", "out": "theirs", "data-dir": "/etc"}, node)
    ['3', '--data', 'heart', '--identities', 'keys', '--out', 'mine']
    """
    missing = [key for key in ("partition-id", "identities", "out") if key not in node]
    if missing:
        raise InputError(
            f"this node's config lacks {' and '.join(missing)}: flower-supernode --node-config 'partition-id=3 "
            'identities="/…/keys" out="/…/results"\''
        )
    own = {key: node[key] for key in PLACES if key in node}
    shared = {key: value for key, value in run.items() if key not in PLACES or (key in _OF_ALL and key not in node)}
    return [str(node["partition-id"]), *words(shared), *words(own)]


def write_app(folder: Path) -> Path:
    """Write Flower's app into ``folder``: a ``pyproject.toml`` and no code, which every party has installed.

    Raises InputError where one is there already.
    """
    path = folder / "pyproject.toml"
    if path.exists():
        raise InputError(f"{path} is there already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(pyproject(), encoding="utf-8")
    return path


def pyproject() -> str:
    """The text of the app's ``pyproject.toml``."""
    import dopamine_lib

    options = [f"# {help}\n{key} = {json.dumps(default)}" for key, (default, help) in defaults().items()]
    return f'''# Written by: python -m dopamine_lib.federation.flower app
[project]
name = "dopamine"
version = "{dopamine_lib.__version__}"
description = "Differentially private, encrypted federated training"
license = "MIT"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "dopamine"

[tool.flwr.app.components]
serverapp = "dopamine_lib.federation.flower.app:server"
clientapp = "dopamine_lib.federation.flower.app:client"

# Where a key is "", its option is not given. Hospitals take {", ".join(PLACES)} from their node's config.
[tool.flwr.app.config]
{chr(10).join(options)}
'''
