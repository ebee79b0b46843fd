"""A program for ``mpiexec``: several short runs, one after the other, in the same ranks.

    mpiexec -n K+1 python -m mpi4py mpi_rounds.py JOBS      each job: {"options": …, "rounds": …, "out": …}

With "keep" the server writes all bytes it receives, opened, into ``out``/seen.safetensors, and hospital 0 its keys and
the integers it sent. With "impostor" nothing is trained: rank 2 has another key pair than the one known to all.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from safetensors.numpy import save_file

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.messages import SERVER, MessageError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.mpi.__main__ import _keys
from dopamine_lib.federation.mpi.ranks import Ranks, number_of, wait_for_all
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.wires import party
from dopamine_lib.federation.wires.party import party_training, take_part
from dopamine_lib.federation.wires.wire import DOWN, UP, Wire

PATIENCE = 120.0


class KeepingWire(Wire):
    """Keeps what it receives."""

    def __init__(self, *arguments, **more):
        self.seen = []
        super().__init__(*arguments, **more)

    def _take(self, peer, kind):
        body = super()._take(peer, kind)
        self.seen.append(body)
        return body


class Kept:
    """The keys and the integers of hospital 0, kept while it trains."""

    def __init__(self):
        self.group, self.sent = None, []

    def training(self, experiment, name, wire):
        """In the place of ``party.party_training``."""
        training = party_training(experiment, name, wire)
        if wire.number == 0 and experiment.options.aggregation == "bfv":
            hospital = training.aggregation.hospital
            self.group, encrypt = hospital.group, hospital.message
            hospital.message = lambda number, values, context: (
                self.sent.append(values) or encrypt(number, values, context)
            )
        return training


def shorten(name: str, rounds: int) -> None:
    """Fewer rounds, all hospitals where two would hide nothing, and room in messages for few patients' large steps."""
    more = {"participation": 1.0} if name == "F" else {}
    SETTINGS[name] = replace(SETTINGS[name], rounds=rounds, **more)
    CHOICES["head"][name] = replace(CHOICES["head"][name], reach=64.0)


def do(job: dict) -> None:
    """One run."""
    comm, out = MPI.COMM_WORLD, Path(job["out"])
    options = Options(**{**job["options"], "settings": tuple(job["options"]["settings"])})
    (name,) = options.settings
    shorten(name, job["rounds"])
    kept, experiment = Kept(), Experiment.load(options, party=number_of(comm.rank), progress=False)
    party.party_training = kept.training
    wire = KeepingWire(Ranks(comm, PATIENCE), *_keys(comm, None, PATIENCE))
    take_part(experiment, lambda: wire, out, party=wire.number)
    if job.get("keep") and wire.number == SERVER:
        save_file(
            {f"{i:06}": np.frombuffer(body, np.uint8) for i, body in enumerate(wire.seen)}, out / "seen.safetensors"
        )
    if job.get("keep") and wire.number == 0:
        keys = {"secret": kept.group.hospital_bytes(), "public": kept.group.server_bytes()}
        arrays = {key: np.frombuffer(value, np.uint8) for key, value in keys.items()}
        save_file(arrays | {"sent": np.array(kept.sent)}, out / "hospital.safetensors")


def impostor(out: Path) -> None:
    """Rank 2 is an impostor: what it sends is refused, and so is a message of the wrong kind."""
    comm = MPI.COMM_WORLD
    identity, publics = _keys(comm, None, PATIENCE)
    wire = Wire(Ranks(comm, PATIENCE), Identity() if comm.rank == 2 else identity, publics)
    said = []
    if comm.rank in (1, 2):
        wire.send(SERVER, UP, b"a message")
    if comm.rank == 1:
        wire.send(SERVER, UP, b"another")
    if comm.rank == 0:
        assert wire.receive(0, UP) == b"a message"
        for peer, kind in ((1, UP), (0, DOWN)):
            try:
                wire.receive(peer, kind)
            except MessageError as error:
                said.append(str(error))
        out.mkdir(parents=True)
        (out / "refused.json").write_text(json.dumps(said))
    wait_for_all(comm, PATIENCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        impostor(Path(job["out"])) if job.get("impostor") else do(job)
