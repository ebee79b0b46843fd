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

from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.federation.arguments import Parser, party_arguments
from dopamine_lib.federation.wires.program import load_party, run_program, serve, show, tell, train_hospital

PROGRAM, ADDRESS = "python -m dopamine_lib.federation.remote", "127.0.0.1:50051"
LOST_AFTER = 30.0


def _parser() -> Parser:
    about = "The same training between machines, over gRPC: hospitals dial the server's one port. "
    about += "First, each party makes keys (identity hospital-3 keys) and compares what it got (fingerprints keys)."
    top = Parser(prog=PROGRAM, description=about)
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
    if server and not arguments.lost_after > 0:
        raise InputError(f"--lost-after is {arguments.lost_after}, but must be over 0: 30 is the default")


def _take_part(arguments) -> None:
    """All that one party does."""
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.wires.identities import read_certificates, read_credentials

    if importlib.util.find_spec("grpc") is None:
        raise not_installed("grpc")
    _check(arguments)
    number = SERVER if arguments.role == "server" else arguments.number
    experiment, identity, publics = load_party(arguments, number)
    certificates = read_certificates(arguments.identities, len(experiment.sizes))
    credentials = read_credentials(arguments.identities, number, certificates)
    take = _serve if number == SERVER else _train
    take(arguments, experiment, identity, publics, credentials, certificates)


def _serve(arguments, experiment, identity, publics, credentials, certificates) -> None:
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.remote.service import Service, longest_message, most_bytes
    from dopamine_lib.federation.wires.relay import Relay

    d = experiment.plan(experiment.options.settings[0]).d
    certificates = {k: pem for k, pem in certificates.items() if k != SERVER}
    relay, limit = Relay(len(certificates), most_bytes(d)), longest_message(d)
    service = Service(relay, arguments.address, credentials, certificates, limit, arguments.lost_after)
    tell(f"listening on {service.address}")
    try:
        results = serve(arguments, experiment, (identity, publics), relay, arguments.lost_after, tell)
        relay.drain(10.0)
        show(results, arguments.out)
    finally:
        relay.close("the server has ended")
        service.close()


def _train(arguments, experiment, identity, publics, credentials, certificates) -> None:
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.remote.dial import Dialled
    from dopamine_lib.federation.remote.service import longest_message, most_bytes
    from dopamine_lib.federation.wires.hospital_end import HospitalEnd
    from dopamine_lib.federation.wires.wire import Wire

    number, plan = arguments.number, experiment.plan(experiment.options.settings[0])
    limit, patience = longest_message(plan.d), arguments.patience
    calls = Dialled(arguments.server, credentials, certificates[SERVER], limit, patience, tell)

    def connect() -> Wire:
        return Wire(HospitalEnd(number, plan.hospitals, calls, patience, most_bytes(plan.d)), identity, publics)

    try:
        train_hospital(arguments, number, experiment, connect, tell)
    finally:
        calls.close()


def main(words: list[str] | None = None) -> int:
    """Run one party, or what ``words`` name; returns the exit status: 0, 2 for bad input, 1 for what ended the run."""
    return run_program(words, lambda given: _take_part(_parser().parse_args(given)), PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
