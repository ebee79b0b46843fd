"""The command line: ``python -m dopamine_lib COMMAND``. Bad input ends with status 2 and one line."""

import argparse
import contextlib
import errno
import json
import os
import sys
import time

from dopamine_lib import __version__
from dopamine_lib.course.commands import add_course_commands
from dopamine_lib.errors import EXTRAS, InputError, not_installed
from dopamine_lib.federation.arguments import (
    Parser,
    bound_arguments,
    check_used,
    chosen_options,
    device_argument,
    experiment_arguments,
    read_options,
)
from dopamine_lib.inference.workers.commands import add_infer, add_party
from dopamine_lib.machine import keep_to_cores, place_for, safe_output
from dopamine_lib.page.app import add_app
from dopamine_lib.progress import say_last_line


def _settings(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(prog="python -m dopamine_lib", description="Differentially private secure federated learning.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    every = ("C", "CDP", "F", "FPDP", "FSCDP")
    settings = {
        "type": _settings,
        "default": every,
        "metavar": "C,CDP,…",
        "help": "which settings (default: all five); a TOML file declares its own",
    }

    run = commands.add_parser("reproduce", allow_abbrev=False, help="train the five settings and draw Figure 1")
    experiment_arguments(run)
    run.add_argument("--config", metavar="FILE", help="a TOML file with any of these options, and sweeps over them")
    run.add_argument("--settings", **settings)
    run.add_argument("--runs", type=int, default=5, metavar="R", help="runs of each setting (default: 5)")
    run.add_argument(
        "--aggregation", default="plain", metavar="NAME", help="plain (default), bfv, masks, module:function"
    )
    run.add_argument(
        "--optimizer", default="momentum", metavar="NAME", help="of the server: momentum (default), module:name"
    )
    run.add_argument("--noise", default="float", metavar="NAME", help="float: Gaussian (default); integer: Skellam")
    run.add_argument("--least", type=int, metavar="M", help="hospitals that must survive a round (default: all)")
    run.add_argument("--dropout", type=float, default=0.0, metavar="P", help="probability that a hospital vanishes")
    bound_arguments(run)
    device_argument(run)
    run.add_argument("--minutes", type=float, metavar="M", help="stop at the end of an epoch; --resume goes on")
    run.add_argument("--workers", type=int, metavar="W", help="processes side by side (default: as many as fit)")
    run.add_argument("--hourly", type=float, metavar="USD", help="what an hour of this machine costs, to print a price")
    run.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    run.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard, too, if it is installed")
    run.add_argument("--out", required=True, metavar="DIR", help="where results.json, metrics.csv, … and models go")
    run.set_defaults(call=_reproduce)

    search = commands.add_parser("tune", help="compare learning rates and clips on validation patients")
    experiment_arguments(search)
    search.add_argument("--settings", **settings)
    bound_arguments(search)
    search.add_argument("--runs", type=int, default=1, metavar="R", help="runs of each candidate (default: 1)")
    device_argument(search)
    search.add_argument("--out", metavar="FILE", help="a .toml file of each setting's best, for reproduce --settings")
    search.set_defaults(call=_tune)

    account = commands.add_parser("epsilon", help="compute what DP-SGD spends, by four accountants")
    account.add_argument("--noise-multiplier", type=float, required=True, metavar="S", help="sigma")
    account.add_argument("--sample-rate", type=float, required=True, metavar="Q", help="Poisson sampling rate q")
    account.add_argument("--steps", type=int, required=True, metavar="T", help="noisy steps")
    account.add_argument("--delta", type=float, required=True, metavar="D", help="much less than 1 / patients")
    account.add_argument("--json", action="store_true", help="print JSON")
    account.set_defaults(call=_epsilon)

    teach = commands.add_parser("pretrain", help="make the embedded weights from public synthetic patients")
    teach.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    teach.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    device_argument(teach)
    teach.set_defaults(call=_pretrain)

    add_infer(commands)
    add_party(commands)
    add_app(commands)

    card = commands.add_parser("report", help="write the privacy statement and model card of a run")
    card.add_argument("results", metavar="RESULTS", help="the folder that reproduce wrote, or its results.json")
    card.add_argument("--out", metavar="DIR", help="where report.md and report.html go (default: beside the results)")
    card.add_argument("--data-dir", metavar="DIR", help="where the data set is now, for the table of subgroups")
    card.add_argument("--model", metavar="module:function", help="your network that was trained, to be run again")
    card.add_argument("--audit", action="store_true", help="train once more with canaries and report the result")
    card.set_defaults(call=_report)

    beside = commands.add_parser("compare", help="put the results of several runs into one table and one picture")
    beside.add_argument("results", nargs="+", metavar="DIR", help="folders that reproduce wrote")
    beside.add_argument("--out", metavar="DIR", help="where compare.csv and compare.png go (default: none are written)")
    beside.set_defaults(call=_compare)

    measure = commands.add_parser("bench", help="measure the kit on this machine, beside its peers")
    measure.add_argument("what", choices=("dp", "aggregation", "scaling", "wires", "inference", "reproduce"))
    measure.add_argument("--json", metavar="FILE", help="write the figures there as well")
    measure.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the image, for inference or dp --model (64)"
    )
    text = "for dp and for inference --images: one network alone, the kit's, torchvision's or, for dp, yours"
    measure.add_argument("--model", metavar="NAME", help=text)
    text = "for inference: only whether the answers to N pictures are plain torch's"
    measure.add_argument("--images", type=int, metavar="N", help=text)
    measure.add_argument("--device", metavar="D", help="for dp: cpu (default) or cuda")
    measure.set_defaults(call=_bench)

    add_course_commands(commands)
    return top


def _reproduce(arguments) -> None:
    from dopamine_lib.federation.results_table import table
    from dopamine_lib.reproduction.run import reproduce

    terms = {"device": arguments.device, "minutes": arguments.minutes, "workers": arguments.workers}
    terms["tensorboard"] = arguments.tensorboard
    read = chosen_options if arguments.config is None else read_options  # a file's are checked together
    results = reproduce(read(arguments), arguments.out, resume=arguments.resume, **terms)
    print(table(results))
    hours = results["seconds"] / 3600
    price = f", {hours * arguments.hourly:.2f} USD" if arguments.hourly else ""
    where = f"results.json, metrics.csv, figure1.png and the models are in {arguments.out}"
    print(f"{results['seconds']} s on {results['device']}{price}; {where}")


def _tune(arguments) -> None:
    from dopamine_lib.federation.experiment import Experiment
    from dopamine_lib.reproduction.tuning import tune, tuned_table, writing_tables

    options = chosen_options(arguments)
    with writing_tables(arguments.out, options.settings) as write:  # what cannot be is refused before the search
        experiment = Experiment.load(options, device=arguments.device).held_out()
        for name in experiment.options.settings:
            scored = tune(experiment, name)
            for score, choice in scored:
                print(f"{name:6} validation accuracy {100 * score:5.1f} %  {choice}", flush=True)
            write(tuned_table(experiment, name, scored[0][1]))
    print("These scores are exact, of patients who are trained on afterwards: no epsilon covers them.")


def _epsilon(arguments) -> None:
    from dopamine_lib.federation.statement import ACCOUNTANT_NAMES
    from dopamine_lib.privacy.accounting import SampledGaussian, epsilons

    event = SampledGaussian(arguments.noise_multiplier, arguments.sample_rate, arguments.steps)
    spent = epsilons(event, arguments.delta)
    if arguments.json:
        print(json.dumps({"epsilon": spent, "delta": arguments.delta, **vars(event)}))
    else:
        numbers = {key: "-" if value is None else f"{value:.3f}" for key, value in spent.items()}
        said = "  ".join(f"{numbers[key]} ({name})" for key, name in ACCOUNTANT_NAMES.items())
        print(f"epsilon {said}  at delta {arguments.delta:g}")


def _pretrain(arguments) -> None:
    from dopamine_lib.models.pretraining import pretrain

    accuracy = pretrain(arguments.out, seed=arguments.seed, device=arguments.device)
    print(f"accuracy on public patients held out: {accuracy:.3f}")


def _report(arguments) -> None:
    from dopamine_lib.report.collect import write_report

    where = {"data_dir": arguments.data_dir, "model": arguments.model}
    for written in write_report(arguments.results, arguments.out, audit=arguments.audit, **where):
        print(written)


def _compare(arguments) -> None:
    from dopamine_lib.report.comparison import compare, table, write_comparison

    rows = compare(arguments.results)
    print(table(rows))
    if arguments.out is not None:
        for written in write_comparison(rows, arguments.out):
            print(written)


def _bench(arguments) -> None:
    import importlib
    import inspect

    module = importlib.import_module(f"dopamine_lib.benchmarks.{arguments.what}")
    given = {name: getattr(arguments, name) for name in ("size", "model", "images", "device")}
    terms = {name: value for name, value in given.items() if value is not None}
    for name in terms.keys() - inspect.signature(module.run).parameters.keys():
        raise InputError(f"--{name} is {terms[name]}, but bench {arguments.what} has no such choice: leave it out")
    with place_for(arguments.json, "--json") if arguments.json else contextlib.nullcontext() as temporary:
        result = module.run(temporary, **terms)
    print(result["machine"])
    for row in result["rows"]:
        peer = ""
        if row["ratio"] is not None:
            peer = f"; {row['peer']}: {row['peer_value']:.4g} {row['unit']}, ratio {row['ratio']:.3g}"
        target = f" (target {row['target']}: {'holds' if row['holds'] else 'MISSED'})" if row["target"] else ""
        print(f"{row['name']}: {row['value']:.4g} {row['unit']}{peer}{target}")


def _commands(argv: list[str]) -> list[argparse.Namespace]:
    """The commands that a command line stands for: one, or one for each combination of a configuration's sweep."""
    scan = Parser(add_help=False, allow_abbrev=False)
    scan.add_argument("--config")
    file = scan.parse_known_args(argv)[0].config if argv[:1] == ["reproduce"] else None
    if file is None:
        return [parser().parse_args(argv)]
    from dopamine_lib.reproduction.config import config_words

    found, idle = [], []
    for folder, words in config_words(file, argv):
        arguments, unknown = parser().parse_known_args(["reproduce", *words, *argv[1:]])
        if unknown:
            raise InputError(f"{file} or the command line says {unknown[0]}, which is no option of reproduce")
        options = read_options(arguments)  # what is wrong anywhere in a sweep is said before its first run
        try:
            check_used(options)
        except InputError as error:
            idle.append(error)
        arguments.out = os.path.join(arguments.out, folder) if folder else arguments.out
        found.append(arguments)
    if len(idle) == len(found):  # what one combination has no use for, another may
        raise idle[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for bad input, 130 for an interrupt."""
    safe_output()
    keep_to_cores()
    argv, began = sys.argv[1:] if argv is None else argv, time.monotonic()
    try:
        for arguments in _commands(argv):
            arguments.call(arguments)
        sys.stdout.flush()
        say_last_line(argv[0], began, _place(arguments))
    except InputError as error:
        print(f"dopamine: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # a part that this command needs and a small install lacks
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise
        print(f"dopamine: {not_installed(name)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dopamine: interrupted{_goes_on(argv)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe is gone, which is no error
        _drop_output()
        return 0
    except Exception as error:  # a full disk, which safetensors reports by an exception of its own
        if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise
        print(f"dopamine: {error}; make room and run the command again{_goes_on(argv)}", file=sys.stderr)
        _drop_output()
        return 2
    return 0


def _place(arguments: argparse.Namespace) -> str | None:
    """Where a command's results are; None where it has none, or prints their paths."""
    return getattr(arguments, "to" if arguments.command == "homework" and arguments.folder else "out", None)


def _goes_on(argv: list[str]) -> str:
    return "; --resume goes on from the last checkpoint" if argv[:1] == ["reproduce"] else ""


def _drop_output() -> None:
    """What is still to be printed goes nowhere, so that it fails nothing at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
