"""A program for ``mpiexec``: runs with what carries noise held constant; every rank writes down what it sent.

    mpiexec -n K+1 python -m mpi4py mpi_neighbours.py JOBS      each job: {"options": …, "out": …}

Of sealed, encrypted and masked messages the lengths are kept, of messages that the server reads the bytes. Keys are
left out, whose length is as random as they are, and so is the order, which is that of arrivals.
"""

import json
import sys
import time
from pathlib import Path

import torch
from held_noise import hold, shorten
from mpi4py import MPI

from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.mpi.__main__ import _keys
from dopamine_lib.federation.mpi.ranks import Ranks, number_of
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.wires.party import take_part
from dopamine_lib.federation.wires.wire import KEYS, TOTAL, UP, Wire

PATIENCE = 120.0


class NotingWire(Wire):
    """Keeps what it sends."""

    noted: list[str]

    def send(self, peer: int, kind: int, body: bytes) -> None:
        """As ``Wire.send``."""
        if kind != KEYS:
            what = bytes(body).hex() if self.plain and kind in (UP, TOTAL) else len(body)
            self.noted.append(f"{peer} {kind} {what}")
        super().send(peer, kind, body)


if __name__ == "__main__":
    torch.set_num_threads(1)
    hold()
    shorten()
    time.perf_counter = lambda: 0.0
    for job in json.loads(Path(sys.argv[1]).read_text()):
        comm, out = MPI.COMM_WORLD, Path(job["out"])
        options = Options(**{**job["options"], "settings": tuple(job["options"]["settings"])})
        experiment = Experiment.load(options, party=number_of(comm.rank), progress=False)
        NotingWire.noted, NotingWire.plain = [], options.aggregation == "plain"
        wire = NotingWire(Ranks(comm, PATIENCE), *_keys(comm, None, PATIENCE))
        take_part(experiment, lambda wire=wire: wire, out, party=wire.number)
        (out / f"rank-{comm.rank}.txt").write_text("\n".join(sorted(wire.noted)))
