"""A hospital's program with Flower as its courier: SuperLink and SuperNodes carry what hospitals and server seal.

    python -m dopamine_lib.federation.flower app APP                    Flower's app: a pyproject.toml, and no code
    python -m dopamine_lib.federation.flower identity hospital-3 keys   keys, as for gRPC: made once, by each party
    python -m dopamine_lib.federation.flower hospital 3 --identities keys --out results …

and ``flwr run APP CONNECTION -c 'identities="keys" out="results" …'`` at the server, with the options of ``reproduce``
by their names. Stock Flower starts a process for every message, some ten seconds an exchange, so it is for runs of few
rounds. What a hospital keeps between messages is in a program of its own, which ``hospital`` starts: under an account
that Flower's processes are not in, it keeps patients and keys from whatever code a run brings. Where none listens in
``out``, the app starts one. With ``--superlink`` a program is a node of its own, for masks and many rounds (``node``).
"""

import importlib.util
import sys
from argparse import Namespace
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.federation.arguments import Parser
from dopamine_lib.federation.flower.config import flower_arguments, write_app
from dopamine_lib.federation.wires.program import load_party, run_program, tell, train_hospital

if TYPE_CHECKING:
    from dopamine_lib.federation.flower.box import Box

PROGRAM = "python -m dopamine_lib.federation.flower"
#: Where a hospital's program listens, in its --out.
SOCKET = "hospital.sock"


def _parser() -> Parser:
    about = "The same training with Flower as its courier. "
    about += "First, each party makes keys (identity hospital-3 keys) and compares what it got (fingerprints keys)."
    top = Parser(prog=PROGRAM, description=about)
    roles = top.add_subparsers(dest="role", required=True, metavar="app | hospital")
    app = roles.add_parser("app", help="write Flower's app, for flwr run")
    app.add_argument("folder", type=Path, metavar="APP", help="where its pyproject.toml goes")
    hospital = roles.add_parser("hospital", help="train on one's own patients")
    hospital.add_argument("number", type=int, metavar="NUMBER", help="from 0")
    hospital.add_argument("--superlink", metavar="HOST:PORT", help="take its messages without a SuperNode")
    hospital.add_argument("--node-key", metavar="FILE", help="with --superlink: the node's registered key")
    hospital.add_argument("--root-certificates", metavar="FILE", help="with --superlink: who signed its certificate")
    flower_arguments(hospital)
    hospital.set_defaults(runs=1)
    return top


def _letters(box: "Box", arguments: Namespace) -> AbstractContextManager:
    """Answers letters: from Flower's client in ``out``, or from the SuperLink itself."""
    if arguments.superlink is None:
        from dopamine_lib.federation.flower.box import listening

        return listening(box, Path(arguments.out) / SOCKET)
    from dopamine_lib.federation.flower.node import answering, read_node_key

    key = read_node_key(arguments.node_key)
    return answering(box, arguments.number, arguments.superlink, key, arguments.root_certificates, tell)


def _train(arguments: Namespace) -> None:
    from dopamine_lib.federation.flower.box import DONE, Box, Boxed
    from dopamine_lib.federation.wires.wire import Wire

    if arguments.superlink is not None:
        if importlib.util.find_spec("flwr") is None:
            raise not_installed("flwr")
        if not arguments.node_key or not arguments.root_certificates:
            raise InputError("--superlink needs --node-key and --root-certificates: its TLS, and this node's own key")
    number = arguments.number
    experiment, identity, publics = load_party(arguments, number)
    hospitals, box = len(experiment.sizes), Box(arguments.patience)
    with ExitStack() as until_the_end:

        def connect() -> Wire:
            if not box.answers:  # the folder is claimed by now
                box.answers = True
                until_the_end.enter_context(_letters(box, arguments))
            return Wire(Boxed(number, hospitals, box, arguments.patience), identity, publics)

        try:
            train_hospital(arguments, number, experiment, connect, tell)
        except BaseException:  # why is for this hospital's eyes
            box.close("it gave up, and its own log says why")
            raise
        box.close(DONE)


def _do(words: list[str]) -> None:
    arguments = _parser().parse_args(words)
    if arguments.role == "app":
        tell(f"{write_app(arguments.folder)} is Flower's app")
    else:
        _train(arguments)


def main(words: list[str] | None = None) -> int:
    """Run a hospital's program, or what ``words`` name; returns the exit status, as ``program.ended``."""
    return run_program(words, _do, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
