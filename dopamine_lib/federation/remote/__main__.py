"""The same training between machines, over gRPC: hospitals dial the server's one port, and it never calls them.

    python -m dopamine_lib.federation.remote identity hospital-3 keys
    python -m dopamine_lib.federation.remote server --identities keys --address 10.0.0.1:50051 --out results …
    python -m dopamine_lib.federation.remote hospital 3 --identities keys --server 10.0.0.1:50051 --out results …

takes the options of ``reproduce``, which all parties give alike, and trains one federated setting once. Every party
makes its keys once, on its machine, and hands its ``.pub`` file to all others, who compare fingerprints
(``fingerprints keys``); each certificate is pinned, so that nobody else gets past the handshake.

With ``--least M`` a round goes on without hospitals as long as M are left: one that dies, is silent or loses its line
is left out, and comes back after an epoch. Start it again with ``--resume``; its ledger is compared with what the
others saw it charge. Without ``--least`` all are needed, and the others wait. A server that dies is started again with
``--resume``, and hospitals go on from the last epoch; the epoch that was begun is charged. Each party's ``--out`` is
its own: the server's gets results and model, a hospital's its checkpoint and its ledger.
"""

import importlib.util
import sys
from pathlib import Path

from dopamine_lib.encryption.codec import RangeError
from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.federation.arguments import Parser, chosen_options, party_arguments
from dopamine_lib.machine import safe_output

ADDRESS = "127.0.0.1:50051"
LOST_AFTER = 30.0


def _parser() -> Parser:
    about = "The same training between machines, over gRPC: hospitals dial the server's one port. "
    about += "First, each party makes keys (identity hospital-3 keys) and compares what it got (fingerprints keys)."
    top = Parser(prog="python -m dopamine_lib.federation.remote", description=about)
    roles = top.add_subparsers(dest="role", required=True, metavar="server | hospital")
    server = roles.add_parser("server", help="add up what hospitals send")
    server.add_argument("--address", default=ADDRESS, metavar="HOST:PORT", help=f"to listen on (default: {ADDRESS})")
    server.add_argument(
        "--lost-after",
        type=float,
        default=LOST_AFTER,
        metavar="S",
        help=f"seconds without a connection after which a hospital is left out (default: {LOST_AFTER:g})",
    )
    hospital = roles.add_parser("hospital", help="train on one's own patients")
    hospital.add_argument("number", type=int, metavar="NUMBER", help="from 0")
    hospital.add_argument("--server", default=ADDRESS, metavar="HOST:PORT", help=f"to dial (default: {ADDRESS})")
    for role in (server, hospital):
        role.add_argument("--identities", required=True, metavar="DIR", help="the parties' keys")
        role.add_argument("--least", type=int, metavar="M", help="hospitals that must arrive (default: all)")
        party_arguments(role)
        role.set_defaults(runs=1)
    return top


def _check(arguments) -> None:
    from dopamine_lib.federation.remote.service import check_address

    server = arguments.role == "server"
    check_address(arguments.address if server else arguments.server, "--address" if server else "--server")
    if not arguments.patience > 0:
        raise InputError(f"--patience is {arguments.patience}, but must be over 0: 1800 is half an hour")
    if server and not arguments.lost_after > 0:
        raise InputError(f"--lost-after is {arguments.lost_after}, but must be over 0: 30 is the default")


def _take_part(arguments) -> dict | None:
    """All that one party does."""
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.experiment import Experiment
    from dopamine_lib.federation.wires.identities import (
        read_certificates,
        read_credentials,
        read_identity,
        read_publics,
    )

    options = chosen_options(arguments)
    if len(options.settings) > 1:
        raise InputError(f"{arguments.setting} declares {', '.join(options.settings)}: one is trained at a time")
    if not options.setting(options.settings[0]).federated:
        raise InputError(f"{options.settings[0]} is not federated: choose FSCDP, FPDP or F")
    folder, number = arguments.identities, SERVER if arguments.role == "server" else arguments.number
    if options.hospitals is not None:
        _check_number(number, options.hospitals)
    experiment = Experiment.load(options, party=number, progress=False)
    hospitals = len(experiment.sizes)
    publics, certificates = read_publics(folder, hospitals), read_certificates(folder, hospitals)
    identity, credentials = read_identity(folder, number, publics), read_credentials(folder, number, certificates)
    take = _serve if number == SERVER else _train
    return take(arguments, experiment, identity, publics, credentials, certificates)


def _check_number(number: int, hospitals: int) -> None:
    from dopamine_lib.encryption.messages import SERVER

    if number != SERVER and not 0 <= number < hospitals:
        raise InputError(f"hospital {number} is unknown: of {hospitals} the first is 0 and the last {hospitals - 1}")


def _say(line: str) -> None:
    print(line, flush=True)


def _serve(arguments, experiment, identity, publics, credentials, certificates) -> dict:
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.remote.service import Service, longest_message, most_bytes
    from dopamine_lib.federation.wires.party import needed, take_part
    from dopamine_lib.federation.wires.relay import Relay
    from dopamine_lib.federation.wires.wire import Wire

    plan = experiment.plan(experiment.options.settings[0])
    certificates = {k: pem for k, pem in certificates.items() if k != SERVER}
    relay, limit = Relay(plan.hospitals, most_bytes(plan.d)), longest_message(plan.d)
    service = Service(relay, arguments.address, credentials, certificates, limit, arguments.lost_after)
    _say(f"listening on {service.address}")
    # a new run waits for all; one that goes on takes those that come back in time
    gather = [arguments.lost_after if arguments.resume else arguments.patience]

    def connect() -> Wire:
        end = relay.open(needed(plan), gather[0], arguments.patience, _say)
        gather[0] = 0.0 if plan.least else arguments.lost_after
        return Wire(end, identity, publics, _say)

    try:
        results = take_part(experiment, connect, arguments.out, party=SERVER, resume=arguments.resume, say=_say)
        relay.drain(10.0)
        return results
    finally:
        relay.close("the server has ended")
        service.close()


def _train(arguments, experiment, identity, publics, credentials, certificates) -> None:
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.remote.dial import Dialled
    from dopamine_lib.federation.remote.service import longest_message, most_bytes
    from dopamine_lib.federation.run_folder import claim, writing
    from dopamine_lib.federation.wires.hospital_end import HospitalEnd
    from dopamine_lib.federation.wires.party import take_part
    from dopamine_lib.federation.wires.wire import Wire

    number, plan, out = arguments.number, experiment.plan(experiment.options.settings[0]), Path(arguments.out)
    limit, patience = longest_message(plan.d), arguments.patience
    calls = Dialled(arguments.server, credentials, certificates[SERVER], limit, patience, _say)

    def connect() -> Wire:
        return Wire(HospitalEnd(number, plan.hospitals, calls, patience, most_bytes(plan.d)), identity, publics)

    begun = experiment.options.record() | {"weights_sha256": experiment.weights.sha256, "hospital": number}
    try:
        with writing(out), claim(out, begun, arguments.resume):
            take_part(experiment, connect, out, party=number, resume=arguments.resume, say=_say)
    finally:
        calls.close()
    _say(f"hospital {number} has done its part; the model is the server's to hand out")


def main(words: list[str] | None = None) -> int:
    """Run one party, or what ``words`` name; returns the exit status: 0, 2 for bad input, 1 for what ended the run."""
    safe_output()
    words = sys.argv[1:] if words is None else words
    try:
        if words[:1] in (["identity"], ["fingerprints"]):
            from dopamine_lib.federation.wires.identities import identity_command

            return identity_command(words)
        arguments = _parser().parse_args(words)
        arguments.settings = (arguments.setting,)
        if importlib.util.find_spec("grpc") is None:
            raise not_installed("grpc")
        _check(arguments)
        results = _take_part(arguments)
    except InputError as error:
        print(f"dopamine: {error}", file=sys.stderr, flush=True)
        return 2
    except RangeError:  # its text has a number of the message that encryption is there to hide
        print("dopamine: a message is too large for its layout; clip lower", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("dopamine: interrupted; the same command with --resume goes on", file=sys.stderr, flush=True)
        return 130
    except Exception as error:  # the others are told that this party has gone; its user is told why, in one line
        line = f"dopamine: {type(error).__name__}: {error}; the same command with --resume goes on"
        print(line, file=sys.stderr, flush=True)
        return 1
    if results is not None:
        from dopamine_lib.federation.results_table import table

        print(table(results))
        print(f"{results['seconds']} s; results.json, metrics.csv and the model are in {arguments.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
