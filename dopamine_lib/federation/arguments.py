"""The command-line arguments that become ``Options``, for ``reproduce`` and for MPI. Loads no torch."""

import argparse
from typing import TYPE_CHECKING, NoReturn

from dopamine_lib.errors import InputError

if TYPE_CHECKING:
    from dopamine_lib.federation.options import Options

#: Seconds without an answer after which a party is taken for silent.
PATIENCE = 1800.0


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and a line that says what was wrong."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def experiment_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of every training command: data, model, weights, hospitals, delta."""
    # choices are checked by Options, which names them: the parser stays quick and loads no torch
    command.add_argument(
        "--data",
        default="synthetic",
        help="synthetic (default), retinamnist, aptos, mnist, fashion-mnist, cifar10, heart; or your own: a folder, "
        "a .csv or .npz file, module:function",
    )
    command.add_argument("--data-dir", metavar="DIR", help="where the data set's files are")
    command.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of an image (default: the data set's own, but 224 for head and squeezenet on retinamnist or a .npz)",
    )
    command.add_argument(
        "--model",
        metavar="NAME",
        help="head (default), cnn, squeezenet, for tables linear (default), mlp; one of torchvision's (resnet18 …), or "
        "your module:function",
    )
    command.add_argument("--backbone", metavar="NAME:FILE", help="network under the head, as resnet50:FILE")
    command.add_argument("--weights", metavar="FILE", help="a .npz, .pth or .safetensors file, 'imagenet' or 'random'")
    command.add_argument(
        "--seed", type=int, metavar="N", help="repeatable, for teaching (default: the operating system's randomness)"
    )
    command.add_argument("--hospitals", type=int, metavar="K", help="how many; 10 in the paper (default)")
    command.add_argument(
        "--patients", type=int, metavar="N", help="training patients, declared to everybody (default: as published)"
    )
    command.add_argument("--split", metavar="NAME", help="iid (default), unequal, skewed, quality, site: as named")
    command.add_argument(
        "--loss", metavar="NAME", default="cross-entropy", help="balanced: rare classes count as much as common ones"
    )
    command.add_argument(
        "--specificity", type=float, metavar="S", help="find thresholds with it: the last rounds ask for counts"
    )
    command.add_argument(
        "--augment", type=int, default=0, metavar="N", help="views of an image in a step, for networks (default: none)"
    )
    command.add_argument("--delta", type=float, default=1e-4, metavar="D", help="of every bound (default: 1e-4)")
    command.add_argument(
        "--accountant", default="prv", help="for --epsilon: prv (default), pld, rdp, rdp_classic, module:function"
    )


def party_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of one party of a run between processes: the experiment's, and where its files are."""
    experiment_arguments(command)
    command.add_argument(
        "--setting", default="FSCDP", help="FSCDP (default), F, FPDP, or a TOML file that declares one"
    )
    command.add_argument("--aggregation", default="bfv", help="how messages are added: bfv (default), masks, plain")
    command.add_argument("--optimizer", default="momentum", help="of the server: momentum (default), module:name")
    command.add_argument("--noise", default="float", help="float: Gaussian, rounded to a grid; integer: Skellam")
    bound_arguments(command)
    command.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    command.add_argument(
        "--patience", type=float, default=PATIENCE, metavar="S", help="seconds to wait for a party that is silent"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="where results.json, model and checkpoint go")


def bound_arguments(command: argparse.ArgumentParser) -> None:
    """Add --epsilon, and what is free at a given one: --rounds, --sample-rate, --local-steps."""
    command.add_argument("--epsilon", type=float, metavar="E", help="recalibrate the noise to this bound")
    command.add_argument(
        "--rounds",
        type=_number_or_word,
        metavar="T",
        help="of the private settings, with --epsilon: a number, or auto for the fewest whose steps are stable",
    )
    command.add_argument(
        "--sample-rate",
        type=float,
        metavar="Q",
        help="of the private settings, with --epsilon (default: with --rounds as many gradients as before)",
    )
    command.add_argument(
        "--local-steps",
        type=int,
        metavar="E",
        help="of FSCDP in a round, with --epsilon: on all in turn, or for a network each patient's own (default: 1)",
    )


def _number_or_word(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def device_argument(command: argparse.ArgumentParser) -> None:
    """Add --device."""
    command.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, or auto (default): CUDA if it is there"
    )


def chosen_options(arguments: argparse.Namespace) -> "Options":
    """The options that were given. Raises InputError for values out of bounds, and for what would change nothing."""
    options = read_options(arguments)
    if not getattr(arguments, "resume", False):  # a run goes on with the options that it was begun with
        check_used(options)
    return options


def read_options(arguments: argparse.Namespace) -> "Options":
    """The options that were given, used or not. Raises InputError for values out of bounds."""
    from dataclasses import fields

    from dopamine_lib.federation.options import Options
    from dopamine_lib.federation.own_settings import read_file, read_settings, read_toml

    given = {field.name: getattr(arguments, field.name) for field in fields(Options) if hasattr(arguments, field.name)}
    model = Options(**{key: given[key] for key in ("data", "model") if key in given}).model
    config, own, names = getattr(arguments, "config", None), {}, []
    if config is not None:
        own = read_settings(read_toml(config).get("setting", {}), model, config)
    for name in given.get("settings", ()):  # a file stands for all the settings that it declares
        declared = read_file(name, model) if name.endswith(".toml") else {name: None}
        twice = [key for key, value in declared.items() if value and key in own]
        if twice:
            raise InputError(f"{name} declares {twice[0]}, which another file declares, too: rename one")
        names += list(declared)
        own |= {key: value for key, value in declared.items() if value}
    if len({name.casefold() for name in names}) < len(set(names)):
        raise InputError(f"settings {', '.join(names)}: two differ in capitals alone; give one of them another name")
    own = {name: own[name] for name in names if name in own}
    if own:
        given |= {"settings": tuple(dict.fromkeys(names)), "own": own}
    return Options(**given)


def check_used(options: "Options") -> None:
    """Raise InputError for what was asked for and would change nothing: whoever asks believes that it does."""
    from dopamine_lib.data import is_table

    settings = [options.setting(name) for name in options.settings]
    for name, idle, why in (
        ("data_dir", options.data == "synthetic", "synthetic eyes are drawn, not read"),
        ("size", is_table(options.data), f"{options.data} has rows, not images"),
        ("accountant", options.epsilon is None and ":" not in options.accountant, "it keeps --epsilon, which is none"),
        *((name, not any(one.private for one in settings), "no setting is private") for name in ("epsilon", "noise")),
        *(
            (name, not any(one.federated for one in settings), "no setting is federated")
            for name in ("aggregation", "least", "dropout")
        ),
    ):
        value = getattr(options, name)
        if idle and value != getattr(type(options), name):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {value}, but {why} ({', '.join(options.settings)}): leave it out")
