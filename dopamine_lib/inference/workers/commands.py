"""The commands ``infer`` and ``party``: private inference on one machine, and one worker on a machine of its own.

Three machines, one worker each. First every worker makes its key and shows its fingerprint:

    party crypto-provider --identity crypto.pem --fingerprint          (likewise for provider and patient)

The files ``crypto.crt``, ``provider.crt`` and ``patient.crt`` are public; they go to the other two, and people
compare the fingerprints over another channel. Then, in this order:

    party crypto-provider --identity crypto.pem --listen HOST:PORT --provider-certificate provider.crt
                   --patient-certificate patient.crt
    party provider --identity provider.pem --listen HOST:PORT --weights FILE --crypto-provider HOST:PORT
                   --crypto-provider-certificate crypto.crt --patient-certificate patient.crt
    party patient IMAGE --identity patient.pem --provider HOST:PORT --provider-certificate provider.crt
                   --crypto-provider HOST:PORT --crypto-provider-certificate crypto.crt

The paper's crypto-provider is a hospital: ``hospital`` is understood as well, as the role and in the options.
"""

import argparse
import contextlib
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dopamine_lib.errors import InputError
from dopamine_lib.inference.workers.printing import print_answers

CRYPTO_PROVIDER_PORT, PROVIDER_PORT = 7100, 7101


def add_infer(commands: Any) -> None:
    """Add ``infer`` to the subparsers of the command line."""
    infer = commands.add_parser("infer", help="grade images without showing them, by three processes on this machine")
    text = "PNG or JPEG files, or for a model of a table's rows CSV files; only the patient's process opens them"
    infer.add_argument("files", metavar="IMAGE", nargs="+", help=text)
    _model_arguments(infer)
    text = "what makes the randomness: a third process, or none, the other two alone (much slower; default: process)"
    infer.add_argument("--crypto-provider", choices=("process", "none"), default="process", help=text)
    text = "how many images at once share their rounds; each takes the memory of one (default: 4)"
    infer.add_argument("--together", type=int, default=4, metavar="N", help=text)
    _json_argument(infer)
    infer.set_defaults(call=_infer)


def add_party(commands: Any) -> None:
    """Add ``party`` to the subparsers of the command line."""
    party = commands.add_parser(
        "party",
        help="run one of the three workers, on a machine of its own",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    roles = party.add_subparsers(dest="role", required=True, metavar="ROLE")

    crypto_provider = roles.add_parser(
        "crypto-provider", aliases=["hospital"], help="makes the correlated randomness; sees neither image nor model"
    )
    _identity_argument(crypto_provider)
    _listen_argument(crypto_provider, CRYPTO_PROVIDER_PORT)
    crypto_provider.add_argument("--provider-certificate", metavar="FILE", help="the provider's .crt")
    _patients_argument(crypto_provider)
    crypto_provider.set_defaults(call=_crypto_provider)

    provider = roles.add_parser("provider", help="holds the model and serves patients")
    _identity_argument(provider)
    _listen_argument(provider, PROVIDER_PORT)
    _model_arguments(provider, required=False)
    _peer_arguments(provider, "crypto-provider", CRYPTO_PROVIDER_PORT)
    _patients_argument(provider)
    provider.add_argument(
        "--sessions", type=int, default=4, help="sessions at once, half of them of one patient (default: 4)"
    )
    provider.add_argument("--ahead", type=int, default=2, help="queries prepared ahead for all of them (default: 2)")
    provider.set_defaults(call=_provider)

    patient = roles.add_parser("patient", help="holds the image and gets the answer")
    patient.add_argument("files", metavar="IMAGE", nargs="*", help="PNG or JPEG files, or CSV files of a table's rows")
    _identity_argument(patient)
    _peer_arguments(patient, "provider", PROVIDER_PORT)
    _peer_arguments(patient, "crypto-provider", CRYPTO_PROVIDER_PORT)
    _json_argument(patient)
    patient.set_defaults(call=_patient)


def _json_argument(command) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, a line for each image")


def _model_arguments(command, required: bool = True) -> None:
    command.add_argument("--weights", required=required, metavar="FILE", help="a model that reproduce wrote")
    text = "for weights of another origin: their network, torchvision's by name or yours as module:function"
    command.add_argument("--model", metavar="NAME", help=text)
    command.add_argument("--backbone", metavar="FILE", help="for a head: its SqueezeNet (default: the embedded one)")
    command.add_argument("--size", type=int, metavar="PIXELS", help="side of an image (default: the model's own)")
    add_answer(command)


def add_answer(command: argparse.ArgumentParser) -> None:
    """Add ``--answer``, the provider's choice of what its patients are told."""
    text = "what the patient is told: a score for each grade, or the grade alone (default: scores)"
    command.add_argument("--answer", choices=("scores", "grade"), default="scores", help=text)


def _identity_argument(command) -> None:
    command.add_argument("--identity", required=True, metavar="FILE", help="this worker's key; made if missing")
    command.add_argument("--fingerprint", action="store_true", help="print the certificate's SHA-256 and end")


def _listen_argument(command, port: int) -> None:
    text = f"where to listen (default: 127.0.0.1:{port}, this machine only)"
    command.add_argument("--listen", default=f"127.0.0.1:{port}", metavar="HOST:PORT", help=text)


def _peer_arguments(command, role: str, port: int) -> None:
    text = f"where the {role} listens (default: 127.0.0.1:{port})"
    words = (role,)
    if role == "crypto-provider":
        text += "; none: the provider and each patient make the randomness alone"
        words = (role, "hospital")
    address, certificate = ([f"--{word}{end}" for word in words] for end in ("", "-certificate"))
    command.add_argument(*address, default=f"127.0.0.1:{port}", metavar="HOST:PORT", help=text)
    command.add_argument(*certificate, metavar="FILE", help=f"the {role}'s .crt")


def _patients_argument(command) -> None:
    command.add_argument(
        "--patient-certificate", action="append", default=[], metavar="FILE", help="a patient's .crt; once for each"
    )


def _infer(arguments) -> None:
    from dopamine_lib.inference.workers.client import MOST_TOGETHER
    from dopamine_lib.inference.workers.processes import Workers

    for file in (*arguments.files, arguments.weights):  # said now rather than after the workers' start
        if not Path(file).is_file():
            raise InputError(f"{file} does not exist; give an image and --weights with a model that reproduce wrote")
    if not 1 <= arguments.together <= MOST_TOGETHER:
        raise InputError(f"--together is {arguments.together}, but must be 1 to {MOST_TOGETHER}: images at once")
    with (
        _one_line_for_a_break(),
        Workers(
            arguments.weights,
            backbone=arguments.backbone,
            size=arguments.size,
            answer=arguments.answer,
            model=arguments.model,
            crypto_provider=arguments.crypto_provider != "none",
            ahead=arguments.together - 1,
        ) as workers,
    ):
        begin = time.perf_counter()
        answers = workers.infer_all(arguments.files)
        print_answers(answers, time.perf_counter() - begin, arguments.json)


def _crypto_provider(arguments) -> None:
    credentials = _credentials(arguments, "crypto-provider")
    if credentials is None:
        return
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.crypto_provider import CryptoProviderServer

    provider = _certificate(arguments, "provider")
    patients = _patients(arguments)
    address = parse_address(arguments.listen)
    kernels.active()
    _serve(CryptoProviderServer(address, credentials, provider, patients))


def _provider(arguments) -> None:
    credentials = _credentials(arguments, "provider")
    if credentials is None:
        return
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.compiling import compile_apart
    from dopamine_lib.inference.workers.provider import ProviderServer

    if arguments.weights is None:
        raise InputError("the provider has no model; give --weights with a file that reproduce wrote")
    for name, least in (("sessions", 1), ("ahead", 0)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} is {getattr(arguments, name)}, but must be at least {least}")
    crypto_provider = _endpoint(arguments, "crypto-provider")
    patients, address = _patients(arguments), parse_address(arguments.listen)
    model = {name: getattr(arguments, name) for name in ("weights", "backbone", "size", "answer", "model")}
    with _one_line_for_a_break():
        served = compile_apart(**model, meanwhile=kernels.active)
    limits = {"sessions": arguments.sessions, "ahead": arguments.ahead}
    _serve(ProviderServer(address, credentials, patients, crypto_provider, *served, **limits))


def _patient(arguments) -> None:
    credentials = _credentials(arguments, "patient")
    if credentials is None:
        return
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.client import PatientClient

    if not arguments.files:
        raise InputError("no image was named; give a PNG or JPEG file")
    for file in arguments.files:
        if not Path(file).is_file():
            raise InputError(f"the image {file} does not exist; give a PNG or JPEG file")
    peers = [_endpoint(arguments, role) for role in ("provider", "crypto-provider")]
    kernels.active()
    with _one_line_for_a_break(), PatientClient(credentials, *peers) as client:
        queries = [(file + part, x) for file in arguments.files for part, x in client.read(file)]
        begin = time.perf_counter()
        answers = client.infer_all([x for _, x in queries])
        seconds = time.perf_counter() - begin
        named = [(name, answer.record()) for (name, _), answer in zip(queries, answers, strict=True)]
        print_answers(named, seconds, arguments.json)


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` as (host, port). Raises InputError for anything else.

    >>> parse_address("[::1]:7100")
    ('::1', 7100)
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"'{text}' is no address; write HOST:PORT, for example 127.0.0.1:{CRYPTO_PROVIDER_PORT}")
    return host.strip("[]"), int(port)


def _credentials(arguments, role: str):
    """The worker's credentials, or None after printing its fingerprint, where that is all that was asked for."""
    from dopamine_lib.encryption.certificates import Credentials

    credentials = Credentials.at(arguments.identity, role)
    if arguments.fingerprint:
        print(credentials.fingerprint)
        return None
    return credentials


def _endpoint(arguments, role: str):
    """Address and certificate of another worker, from the command line; None where there is to be none."""
    address = getattr(arguments, role.replace("-", "_"))
    if address == "none" and role == "crypto-provider":
        if arguments.crypto_provider_certificate is not None:
            raise InputError("--crypto-provider is none, but there is a --crypto-provider-certificate: leave one out")
        return None
    return parse_address(address), _certificate(arguments, role)


def _certificate(arguments, role: str) -> str:
    from dopamine_lib.encryption.certificates import read_certificate

    path = getattr(arguments, f"{role.replace('-', '_')}_certificate")
    if path is None:
        raise InputError(f"the {role} is not known here; give --{role}-certificate with the .crt file it wrote")
    return read_certificate(path)


def _patients(arguments) -> dict[str, str]:
    from dopamine_lib.encryption.certificates import fingerprint, read_certificate

    if not arguments.patient_certificate:
        raise InputError("no patient is known here; give --patient-certificate with the .crt file of each")
    certificates = [read_certificate(path) for path in arguments.patient_certificate]
    return {f"patient {fingerprint(certificate)[:8]}": certificate for certificate in certificates}


def _serve(server) -> None:
    """Serve until an interrupt or a request to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with server:
        host, port = server.address
        print(f"the {server.role} listens on {host}:{port}; Ctrl-C ends it", flush=True)
        ended.wait()


@contextlib.contextmanager
def _one_line_for_a_break():
    """A broken connection is not bad input: it ends with status 1 and one line."""
    from dopamine_lib.inference.protocols.channel import ChannelError

    try:
        yield
    except ChannelError as error:
        sys.exit(f"dopamine: {error}")
