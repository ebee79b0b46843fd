"""One worker: ``python -m dopamine_lib.inference.workers.worker ROLE``, told what to do on standard input.

Standard input and output carry one JSON object a line; the log goes to standard error. In this order:

    out  {"certificate": …}
    in   {"weights": …, "backbone": …, "size": …}    for the provider only: which model to serve
    in   {"certificates": …, "addresses": …}         the other workers
    out  {"address": …}, from the patient {"ready": 0}
    in   {"prepare": n} or {"image": FILE}           for the patient, any number of times
    out  {"ready": n} or {"answer": …}

What goes wrong is one line too: {"wrong input": …} or {"broken": …}.
"""

import json
import sys

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.inference.workers import tls

LOOPBACK = ("127.0.0.1", 0)
#: How the only patient of a local run is called.
PATIENT = "patient"
_OUT = sys.stdout


def main(role: str) -> int:
    """Play one role until standard input ends; returns the exit status."""
    play = {"hospital": _hospital, "provider": _provider, "patient": _patient}[role]
    identity = tls.Identity.make(role)
    sys.stdout = sys.stderr  # whatever a library prints must not stand between the messages
    try:
        _say(certificate=identity.certificate)
        play(identity)
    except InputError as error:
        _say(**{"wrong input": str(error)})
        return 2
    except ChannelError as error:
        _say(broken=str(error))
        return 1
    except (BrokenPipeError, EOFError):  # whoever started this worker is gone
        return 1
    return 0


# Each role loads what it needs and compiles its kernels before it is told the rest: the three do that side by side.


def _hospital(identity) -> None:
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.crypto_provider import HospitalServer

    kernels.active()
    certificates = _hear()["certificates"]
    _serve(HospitalServer(LOOPBACK, identity, certificates["provider"], {PATIENT: certificates["patient"]}))


def _provider(identity) -> None:
    from dopamine_lib.inference.network.serving import load
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.provider import ProviderServer

    model = _hear()
    served = load(model["weights"], model["backbone"], model["size"])
    kernels.active()
    told = _hear()
    certificates = told["certificates"]
    hospital = (tuple(told["addresses"]["hospital"]), certificates["hospital"])
    _serve(ProviderServer(LOOPBACK, identity, {PATIENT: certificates["patient"]}, hospital, *served))


def _serve(server) -> None:
    with server:
        _say(address=server.address)
        sys.stdin.read()


def _patient(identity) -> None:
    from dopamine_lib.data.images import read_image
    from dopamine_lib.inference.protocols import kernels
    from dopamine_lib.inference.workers.client import PatientClient

    kernels.active()
    told = _hear()
    provider, hospital = ((tuple(told["addresses"][r]), told["certificates"][r]) for r in ("provider", "hospital"))
    with PatientClient(identity, provider, hospital) as client:
        _say(ready=0)
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                if "prepare" in asked:
                    _say(ready=client.prepare(asked["prepare"]))
                else:
                    _say(answer=client.infer(read_image(asked["image"], client.size)).record())
            except InputError as error:  # found before anything was sent: the session goes on
                _say(**{"wrong input": str(error)})


def _say(**message) -> None:
    print(json.dumps(message), file=_OUT, flush=True)


def _hear() -> dict:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return json.loads(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
