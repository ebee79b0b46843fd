"""What all parties of a run must agree on before it begins: one experiment, and one ledger.

Each party sends each other one its ``terms``, sealed, and compares: options, the data sheet, the plan and the versions
of the code. A server that says epsilon 1 while hospitals add noise for 50, or a hospital that deals the patients by
another seed, is found here and named.

Hospitals also compare the split (who of all patients is where), which the server is not told, and how much of the
ledger each has on its own disk. Noise is drawn once all hospitals that are there have an epoch on disk, so what an
honest crash leaves differs by the last epoch at most. A hospital that was away may be further behind, but not behind
what the others saw it take part in. Anything else is a ledger that was lost or set back, and the run is refused.
"""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.run_folder import read_record, write_record
from dopamine_lib.federation.wires.wire import TERMS, Wire
from dopamine_lib.files import parse_json

#: Options that say where a party's files are, and not what is computed.
_PLACES = ("data_dir", "weights")


@cache
def code_version() -> str:
    """A hash of all source files of the library, 32 hexadecimal digits; the same in a checkout and from a wheel."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(set(root.rglob("*.py")) - set((root / "kit").rglob("*.py"))):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def asked(experiment: Experiment) -> dict[str, object]:
    """The options of a run, without those that say where a party's files are."""
    return {key: value for key, value in experiment.options.record().items() if key not in _PLACES}


def terms(experiment: Experiment, name: str) -> dict[str, object]:
    """Whatever determines a run of the setting called ``name``, as plain data."""
    named = {
        **asked(experiment),
        "weights": experiment.weights.sha256,
        "data sheet": asdict(experiment.dataset.sheet),
        "plan": repr(experiment.plan(name)),
        "code": code_version(),
        "versions": [platform.python_version(), np.__version__, torch.__version__],
    }
    return json.loads(json.dumps(named, default=str))


def split_terms(experiment: Experiment) -> dict[str, object]:
    """What hospitals alone compare, since it depends on every patient: who of them is where."""
    return {"split": experiment.split_hash}


def fingerprint(agreed: dict[str, object]) -> bytes:
    """32 bytes that stand for the terms of a run, to bind messages to."""
    return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).digest()


def agree_on_experiment(wire: Wire, experiment: Experiment, name: str) -> bytes:
    """Compare a run's terms with all other parties, which call this at once; returns their ``fingerprint``.

    Raises InputError that names the first party that differs, and in what.
    """
    own = terms(experiment, name) | {"hospitals that are here": list(wire.members)}
    remedy = "start all parties with the same options, data and version of this kit"
    _compare(wire, own, [*wire.members, SERVER], remedy)
    if wire.number != SERVER:
        _compare(wire, split_terms(experiment), wire.members, remedy, secret=True)
    return fingerprint(own)


def agree_on_model(wire: Wire, context: bytes) -> None:
    """Compare what stands for the final model; all hospitals that are present call it at once.

    Raises InputError where the server told hospitals different totals in the last round, or hid nothing and told them
    different ones before.
    """
    remedy = "the server has told them different totals, and the model is worth nothing"
    _compare(wire, {"model": context.hex()}, wire.present, remedy)


def _compare(
    wire: Wire, own: dict[str, object], everybody: Iterable[int], remedy: str, *, secret: bool = False
) -> None:
    """Exchange what must be the same at all of these parties, this one among them; all of them call it at once.

    secret  whether values depend on patients, so that no error shows them
    Raises InputError that names the parties that differ, and in what.
    """
    others = [number for number in everybody if number != wire.number]
    for number in others:
        wire.send(number, TERMS, json.dumps(own).encode())
    for number, body in sorted(wire.arrivals(others, TERMS)):
        try:
            theirs = dict(parse_json(body))
        except (ValueError, TypeError):
            raise InputError(f"{wire.names([number])} sends terms that cannot be read: {remedy}") from None
        for key in own:
            if theirs.get(key) != own[key]:
                values = _short(theirs.get(key)), _short(own[key])
                if secret:
                    values = "of its own", "another"
                they, this = wire.names([number]), wire.names([wire.number])
                raise InputError(f"{they} has {key} = {values[0]}, but {this} has {values[1]}: {remedy}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


class OwnCharge:
    """What a hospital has charged, on its own disk: the epochs whose noise may have been drawn.

    path   its file, of this hospital alone
    asked  the run's options, so that it is not taken for another's
    taken  the epochs that this hospital has seen others charge, by number
    """

    def __init__(self, path: Path, asked: dict[str, object]):
        self.path, self.asked, self.taken = path, json.loads(json.dumps(asked)), {}

    def save(self, reserved: int, present: Iterable[int] = ()) -> None:
        """Have it on disk that ``reserved`` epochs are charged, here and by the hospitals that are ``present``."""
        self.taken |= dict.fromkeys(present, reserved)
        taken = {str(k): epochs for k, epochs in sorted(self.taken.items())}
        write_record(self.path, {"options": self.asked, "reserved": reserved, "taken": taken})

    def read(self, resume: bool) -> int:
        """Epochs charged so far. Raises InputError for a record of another run, or without ``resume``."""
        if not self.path.exists():
            return 0
        if not resume:
            raise InputError(f"{self.path} is of a run that was begun; add --resume, or choose another --out")
        try:
            record = read_record(self.path)
            options, reserved = record["options"], int(record["reserved"])
            self.taken = {int(k): int(epochs) for k, epochs in record.get("taken", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path} cannot be read, and the ledger in it is lost: choose another --out"
            ) from error
        if options != self.asked:
            raise InputError(f"{self.path} is of another run; resume with the same options, or choose another --out")
        return reserved


def agree_on_charge(wire: Wire, reserved: int, taken: dict[int, int] | None = None) -> int:
    """The epochs that any hospital has charged; all hospitals call it at once.

    reserved  epochs in this hospital's own record
    taken     those that it has seen others charge, by number; by default as many as its own
    Raises InputError that names the hospitals whose ledger is missing or behind.
    """
    taken = dict.fromkeys(wire.members, reserved) | {wire.number: reserved} if taken is None else taken
    own = {"reserved": reserved, "taken": [[k, epochs] for k, epochs in sorted(taken.items())]}
    found, seen, others = {wire.number: reserved}, [taken], [k for k in wire.members if k != wire.number]
    for k in others:
        wire.send(k, TERMS, json.dumps(own).encode())
    for k, body in wire.arrivals(others, TERMS):
        try:
            theirs = parse_json(body)
            found[k] = _count(theirs["reserved"])
            seen.append({_count(number): _count(epochs) for number, epochs in theirs["taken"]})
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{wire.names([k])} says of its ledger what is no number: start all parties with the same version"
            ) from None
    due = {k: max(own.get(k, 0) for own in seen) for k in wire.members}
    behind = [k for k in wire.members if found[k] < due[k] - 1]
    if behind:
        raise InputError(
            f"{wire.names(behind)} have {' and '.join(str(found[k]) for k in behind)} epochs in the ledger "
            f"on disk, but others {max(due[k] for k in behind)}: noise was drawn for them. Put the files under --out "
            "back, or begin anew in another --out, which spends epsilon anew"
        )
    return max(found.values())


def furthest(wire: Wire, epoch: int | None) -> int:
    """The hospital whose model has most epochs in it, from whose state all go on; all parties call it at once.

    epoch  the epochs in this hospital's model; None at the server
    """
    peers = [k for k in [*wire.members, SERVER] if k != wire.number]
    if epoch is not None:
        for peer in peers:
            wire.send(peer, TERMS, json.dumps(epoch).encode())
    epochs = {} if epoch is None else {wire.number: epoch}
    for k, body in wire.arrivals([k for k in peers if k != SERVER], TERMS):
        try:
            epochs[k] = _count(parse_json(body))
        except (ValueError, TypeError):
            raise InputError(
                f"{wire.names([k])} says of its model what is no number: start all parties with the same version"
            ) from None
    return max(wire.members, key=lambda k: (epochs[k], -k))


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 10**9:
        raise ValueError(value)
    return value
