"""``bench scaling``: what a round between processes costs with K hospitals and d parameters, and with 100 hospitals.

Real rounds over MPI, each party in its own process: the bytes that a hospital exchanges with the server, and the
processor time of a hospital and of the server. Processor time, because all parties share the cores of one machine here
and would not in a real deployment; waiting takes almost none. Each figure is fitted by

    y = a + b K + c d + e K d,      a, b, c, e >= 0, least squares of relative errors,

linear in K and in d, as rounds are: an update is linear in d; a hospital makes K masks of d values; the server adds K
updates. The fit leaves out the K^2 small boxes that the masks' server relays.
"""

import json
import subprocess
import sys
import tempfile
import time
from os import PathLike
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from dopamine_lib.benchmarks.measure import row, write
from dopamine_lib.errors import InputError
from dopamine_lib.progress import progress_bar

HOSPITALS, SIZES, KINDS = (2, 5, 10, 20), (25_000, 725_061), ("bfv", "masks")
PREDICTED = 100
FIGURES = {"hospital's bytes": "bytes", "hospital's seconds": "s", "server's seconds": "s"}


def run(
    path: str | PathLike | None = None,
    *,
    hospitals: tuple[int, ...] = HOSPITALS,
    sizes: tuple[int, ...] = SIZES,
    kinds: tuple[str, ...] = KINDS,
    rounds: int = 3,
) -> dict:
    """All rows, also written to ``path`` if one is given; figures are one round's, as medians over ``rounds``.

    Raises InputError if mpiexec or mpi4py is missing.
    """
    federations = progress_bar(hospitals, title="measuring", unit="federation")
    measured = [one for k in federations for one in _measure(k, sizes, kinds, rounds)]
    rows = []
    for kind in kinds:
        mine = [one for one in measured if one["kind"] == kind]
        for one in mine:
            where = f"{kind}, K = {one['K']}, d = {one['d']}"
            rows += [row(f"{name}, {where}", one[name], unit) for name, unit in FIGURES.items()]
            rows.append(row(f"round with all parties on this machine, {where}", one["seconds"], "s"))
        at = np.array([(one["K"], one["d"]) for one in mine], float)
        for name, unit in FIGURES.items():
            coefficients, worst = fit(at, np.array([one[name] for one in mine]))
            rows.append(row(f"largest error of the fit, {name}, {kind}", worst, "of the value"))
            for d in sizes:
                value = float(_terms(np.array([[PREDICTED, d]], float))[0] @ coefficients)
                rows.append(row(f"predicted {name}, {kind}, K = {PREDICTED}, d = {d}", value, unit))
    return write(rows, path)


def fit(at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients (4,) of 1, K, d, K d for ``values`` (n,) at (K, d) (n, 2), and the largest relative error.

    >>> coefficients, worst = fit(np.array([[2, 10], [2, 20], [5, 10], [5, 20]]), np.array([24, 44, 54, 104]))
    >>> coefficients.round(6).tolist(), round(worst, 6)  # y = 4 + K d
    ([4.0, 0.0, 0.0, 1.0], 0.0)
    """
    terms = _terms(at) / values[:, None]
    size = np.maximum(np.abs(terms).max(0), 1e-300)  # or d would weigh a thousand times as much as K
    coefficients, _ = nnls(terms / size, np.ones(len(values)))
    coefficients = coefficients / size
    return coefficients, float(np.abs(terms @ coefficients - 1).max())


def _terms(at: np.ndarray) -> np.ndarray:
    K, d = at.T
    return np.stack([np.ones(len(at)), K, d, K * d], 1)


def _measure(hospitals: int, sizes: tuple[int, ...], kinds: tuple[str, ...], rounds: int) -> list[dict]:
    """Start the ranks, and read the server's file."""
    beside = Path(sys.executable).with_name("mpiexec")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        job = json.dumps({"sizes": list(sizes), "kinds": list(kinds), "rounds": rounds, "out": str(out)})
        command = [str(beside) if beside.exists() else "mpiexec", "-n", str(hospitals + 1), sys.executable]
        try:
            subprocess.run([*command, "-m", "mpi4py", "-m", __name__, job], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise InputError(
                f'mpiexec with {hospitals + 1} ranks failed ({said[-1]}); run: pip install "dopamine-kit[mpi]"'
            ) from error
        return json.loads(out.read_text(encoding="utf-8"))


def _rank(job: dict) -> None:
    """One rank: rounds of every kind and size that only aggregate."""
    import torch
    from mpi4py import MPI

    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.mpi.__main__ import _keys
    from dopamine_lib.federation.mpi.ranks import Ranks
    from dopamine_lib.federation.plan import Plan
    from dopamine_lib.federation.settings import SETTINGS, Choice
    from dopamine_lib.federation.wires.sums import make_wire_aggregation
    from dopamine_lib.federation.wires.wire import Wire
    from dopamine_lib.privacy.randomness import Randomness

    torch.set_num_threads(1)
    comm, results = MPI.COMM_WORLD, []
    wire = Wire(Ranks(comm, 600.0), *_keys(comm, None, 600.0))
    everybody, choice = list(range(wire.hospitals)), Choice(0.1, 1.0, reach=1.0)
    for kind in job["kinds"]:
        for d in job["sizes"]:
            plan = Plan(SETTINGS["FSCDP"], choice, (1,) * wire.hospitals, d, aggregation=kind)
            side = make_wire_aggregation(plan, wire)
            noise = plan.noise.draw(Randomness().stream("noise"))[0]
            messages = {} if wire.number == SERVER else {wire.number: plan.noise.combine(torch.rand(d) - 0.5, noise)}
            spent, walls, before = [], [], 0
            for number in range(job["rounds"] + 1):
                if number == 1:  # the first round warms up
                    before = wire.sent + wire.received
                wire.barrier()
                wall, began = time.perf_counter(), time.process_time()
                side.total(number, everybody, messages)
                spent.append(time.process_time() - began)
                wire.barrier()
                walls.append(time.perf_counter() - wall)
            own = np.array([np.median(spent[1:]), np.median(walls[1:]), (wire.sent + wire.received - before)])
            all_of_them = np.empty((comm.size, 3))
            comm.Gather(own, all_of_them)
            if comm.rank == 0:
                results.append(
                    {
                        "kind": kind,
                        "K": wire.hospitals,
                        "d": d,
                        "seconds": float(own[1]),
                        "server's seconds": float(own[0]),
                        "hospital's seconds": float(np.median(all_of_them[1:, 0])),
                        "hospital's bytes": float(np.median(all_of_them[1:, 2])) / job["rounds"],
                    }
                )
    if comm.rank == 0:
        Path(job["out"]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
