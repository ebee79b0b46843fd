"""What the programs of one party share, whatever carries its messages: what they read first, and how they end."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dopamine_lib.encryption.codec import RangeError
from dopamine_lib.errors import InputError
from dopamine_lib.federation.arguments import check_used, read_options
from dopamine_lib.federation.wires.identities import identity_command, read_identity, read_publics
from dopamine_lib.machine import safe_output

if TYPE_CHECKING:
    from dopamine_lib.encryption.keys import Identity
    from dopamine_lib.federation.experiment import Experiment
    from dopamine_lib.federation.options import Options
    from dopamine_lib.federation.wires.relay import Relay
    from dopamine_lib.federation.wires.wire import Wire


def one_setting(arguments: Namespace) -> "Options":
    """The options of a run of one federated setting. Raises InputError for others."""
    arguments.settings = (arguments.setting,)
    options = read_options(arguments)
    if len(options.settings) > 1:
        raise InputError(f"{arguments.setting} declares {', '.join(options.settings)}: one is trained at a time")
    if not options.setting(options.settings[0]).federated:
        raise InputError(f"{options.settings[0]} is not federated: choose FSCDP, FPDP or F")
    if not arguments.patience > 0:
        raise InputError(f"--patience is {arguments.patience}, but must be over 0: 1800 is half an hour")
    if not arguments.resume:
        check_used(options)  # last: a party's --aggregation has a default of its own
    return options


def load_party(arguments: Namespace, number: int) -> tuple["Experiment", "Identity", dict[int, bytes]]:
    """What party ``number`` needs: its experiment, its key pair in ``--identities``, and everybody's public keys.

    Raises InputError as ``one_setting``, and for an unknown hospital, and for files that lack.
    """
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.experiment import Experiment

    options = one_setting(arguments)

    def check_number(hospitals: int) -> None:
        if number != SERVER and not 0 <= number < hospitals:
            raise InputError(
                f"hospital {number} is unknown: of {hospitals} the first is 0 and the last {hospitals - 1}"
            )

    if options.hospitals is not None:
        check_number(options.hospitals)
    experiment = Experiment.load(options, party=number, progress=False)
    check_number(len(experiment.sizes))
    publics = read_publics(arguments.identities, len(experiment.sizes))
    return experiment, read_identity(arguments.identities, number, publics), publics


def serve(
    arguments: Namespace,
    experiment: "Experiment",
    keys: tuple["Identity", dict[int, bytes]],
    relay: "Relay",
    late: float,
    say: Callable[[str], object],
) -> dict:
    """The server's part of a run whose hospitals call ``relay``; returns the results.

    keys  its own pair, and everybody's public keys
    late  seconds that a session after the first waits for hospitals that come back
    """
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.wires.party import needed, take_part
    from dopamine_lib.federation.wires.wire import Wire

    plan = experiment.plan(experiment.options.settings[0])
    # a new run waits for all; one that goes on takes those that come back in time
    gather = [late if arguments.resume else arguments.patience]

    def connect() -> Wire:
        end = relay.open(needed(plan), gather[0], arguments.patience, say)
        gather[0] = 0.0 if plan.least else late
        return Wire(end, *keys, say)

    return take_part(experiment, connect, arguments.out, party=SERVER, resume=arguments.resume, say=say)


def train_hospital(
    arguments: Namespace,
    number: int,
    experiment: "Experiment",
    connect: Callable[[], "Wire"],
    say: Callable[[str], object],
) -> None:
    """A hospital's part of a run, with ``--out`` claimed for it."""
    from dopamine_lib.federation.run_folder import claim, writing
    from dopamine_lib.federation.wires.party import take_part

    out = Path(arguments.out)
    begun = experiment.options.record() | {"weights_sha256": experiment.weights.sha256, "hospital": number}
    with writing(out), claim(out, begun, arguments.resume):
        take_part(experiment, connect, out, party=number, resume=arguments.resume, say=say)
    say(f"hospital {number} has done its part; the model is the server's to hand out")


def ended(do: Callable[[], object]) -> tuple[int, str]:
    """Do a party's part: the exit status, and in a line what ended it before its time.

    0  done; 2  bad input; 130  Ctrl-C; 1  whatever else
    """
    try:
        do()
    except InputError as error:
        return 2, str(error)
    except RangeError:  # its text has a number of the message that encryption is there to hide
        return 2, "a message is too large for its layout; clip lower"
    except KeyboardInterrupt:
        return 130, "interrupted; the same command with --resume goes on"
    except Exception as error:  # the others are told that this party has gone; its user is told why
        return 1, f"{type(error).__name__}: {error}; the same command with --resume goes on"
    return 0, ""


def run_program(words: list[str] | None, take_part: Callable[[list[str]], object], program: str) -> int:
    """A party's program: does ``identity`` or ``fingerprints``, else ``take_part(words)``; its status as ``ended``.

    words    the command line; None: this process's
    program  what was called, for help and refusals
    """
    safe_output()
    words = sys.argv[1:] if words is None else words
    keys = words[:1] in (["identity"], ["fingerprints"])
    status, line = ended(lambda: identity_command(words, program) if keys else take_part(words))
    complain(line)
    return status


def tell(line: str) -> None:
    """Print a line at once: it may be read in a log, while the program runs."""
    print(line, flush=True)


def complain(line: str) -> None:
    """Say on stderr why a program ends, if there is anything to say."""
    if line:
        print(f"dopamine: {line}", file=sys.stderr, flush=True)


def show(results: dict, out: str | Path) -> None:
    """Print a run's table, and where the rest is."""
    from dopamine_lib.federation.results_table import table

    print(table(results))
    print(f"{results['seconds']} s; results.json, metrics.csv and the model are in {out}", flush=True)
