"""``bench wires``: the same rounds over threads, MPI and gRPC: rounds a second, and the bytes of one hospital.

Rounds that only aggregate, with all parties on this machine, whose cores they share: threads in one process; over MPI
and gRPC a process for each party, gRPC over loopback with mutual TLS. The wires take turns. Bytes are those of sealed
messages, sent and received, which no wire changes; what TLS or MPI adds is not in them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from os import PathLike
from pathlib import Path
from time import perf_counter

import numpy as np

from dopamine_lib.benchmarks.measure import row, write
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError
from dopamine_lib.federation.wires.identities import (
    make_identity,
    party_name,
    party_number,
    read_certificates,
    read_credentials,
    read_identity,
    read_publics,
)
from dopamine_lib.federation.wires.wire import Wire
from dopamine_lib.progress import progress_bar

HOSPITALS, SIZES, KINDS = (2, 4, 10), (2_565, 725_061), ("plain", "bfv", "masks")
WIRES = ("MPI", "threads", "gRPC")
_PATIENCE, _LISTENING = 600.0, "listening on "


def run(
    path: str | PathLike | None = None,
    *,
    hospitals: tuple[int, ...] = HOSPITALS,
    sizes: tuple[int, ...] = SIZES,
    kinds: tuple[str, ...] = KINDS,
    rounds: int = 3,
    turns: int = 2,
) -> dict:
    """All rows, also written to ``path`` if one is given; figures are medians over ``turns`` of each wire.

    Raises InputError if mpiexec, mpi4py or grpcio is missing, or where a party ends without its figures.
    """
    rows, bar = [], progress_bar(title="measuring", unit="turn", total=len(hospitals) * turns * len(WIRES))
    for k in hospitals:
        job = {"K": k, "sizes": list(sizes), "kinds": list(kinds), "rounds": rounds}
        found = {wire: [] for wire in WIRES}
        for _ in range(turns):
            for wire in WIRES:
                found[wire].append(_over(wire, job))
                bar.update()
        for case in found["MPI"][0]:
            seconds = {wire: statistics.median(turn[case][0] for turn in found[wire]) for wire in WIRES}
            (size,) = {turn[case][1] for wire in WIRES for turn in found[wire]}
            rows.append(row(f"bytes of a hospital, {case}", size, "bytes"))
            for wire in WIRES:
                peer = () if wire == "MPI" else ("MPI", 1 / seconds["MPI"], seconds["MPI"] / seconds[wire])
                rows.append(row(f"rounds a second over {wire}, {case}", 1 / seconds[wire], "1/s", *peer))
    bar.close()
    return write(rows, path)


def _over(wire: str, job: dict) -> dict[str, tuple[float, float]]:
    """Of each case the median seconds of a round, as the server sees it, and the bytes of hospital 0."""
    names = [party_name(number) for number in [SERVER, *range(job["K"])]]
    if wire == "threads":
        from dopamine_lib.federation.wires.threads import Threads

        said = Threads(job["K"], patience=_PATIENCE).run(lambda end: _rounds(end, job))
        return {case: (seconds, said[0][case][1]) for case, (seconds, _) in said[SERVER].items()}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            make_identity(folder, name)
        party = [sys.executable, "-W", "ignore", "-m"]
        words = [__name__, json.dumps(job), folder]
        if wire == "MPI":
            beside = Path(sys.executable).with_name("mpiexec")
            mpiexec = [str(beside) if beside.exists() else "mpiexec", "-n", str(len(names))]
            started = [_start([*mpiexec, *party, "mpi4py", "-m", *words])]
        else:
            started = [_start([*party, *words, names[0]])]
            lines = (line.partition(_LISTENING) for line in started[0].stdout)
            address = next((found.strip() for _, said, found in lines if said), None)
            started += [_start([*party, *words, name, address]) for name in names[1:] if address]
        try:
            for one in started:
                _, said = one.communicate()
                if one.returncode:
                    said = (said.splitlines() or ["killed"])[-1]
                    raise InputError(
                        f'a party of the rounds over {wire} failed: {said}; run: pip install "dopamine-kit[grpc,mpi]"'
                    )
        finally:
            for one in started:
                one.kill()
        server, first = (json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8")) for name in names[:2])
        return {case: (seconds, first[case][1]) for case, (seconds, _) in server.items()}


def _start(command: list[str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        told = f"{command[0]} cannot be run ({error.strerror})"
        raise InputError(f'{told}; run: pip install "dopamine-kit[mpi]"') from None


def _rounds(wire: Wire, job: dict) -> dict[str, tuple[float, float]]:
    """One party's part: of each case the median seconds of a round, and the bytes that this party exchanges in it."""
    import torch

    from dopamine_lib.federation.plan import Plan
    from dopamine_lib.federation.settings import SETTINGS, Choice
    from dopamine_lib.federation.wires.sums import make_wire_aggregation

    torch.set_num_threads(1)
    found = {}
    for kind in job["kinds"]:
        for d in job["sizes"]:
            plan = Plan(SETTINGS["FSCDP"], Choice(0.1, 1.0, reach=1.0), (1,) * job["K"], d, aggregation=kind)
            side, spent = make_wire_aggregation(plan, wire), []
            own = {} if wire.number == SERVER else {wire.number: np.full(d, wire.number)}
            for number in range(job["rounds"] + 1):  # the first warms up
                wire.barrier()
                before, begin = wire.sent + wire.received, perf_counter()
                side.total(number, range(job["K"]), own)
                size = wire.sent + wire.received - before
                wire.barrier()
                spent.append(perf_counter() - begin)
            found[f"{kind}, K = {job['K']}, d = {d}"] = statistics.median(spent[1:]), size
    return found


def _party(job: dict, folder: str, name: str = "", address: str = "127.0.0.1:0") -> None:
    """One party over gRPC, or a rank without a name; the server over gRPC prints its address first."""
    import torch  # noqa: F401  before gRPC's threads start

    publics, leave = read_publics(folder, job["K"]), lambda: None
    if not name:
        from mpi4py import MPI

        from dopamine_lib.federation.mpi.ranks import Ranks

        carrier = Ranks(MPI.COMM_WORLD, _PATIENCE)
        name = party_name(carrier.number)
    else:
        carrier, leave = _dialled(job, folder, party_number(name), address)
    wire = Wire(carrier, read_identity(folder, carrier.number, publics), publics)
    (Path(folder) / f"{name}.json").write_text(json.dumps(_rounds(wire, job)), encoding="utf-8")
    leave()


def _dialled(job: dict, folder: str, number: int, address: str) -> tuple:
    """A party's carrier over gRPC, and what ends it."""
    from dopamine_lib.federation.remote.dial import Dialled
    from dopamine_lib.federation.remote.service import Service, longest_message, most_bytes
    from dopamine_lib.federation.wires.hospital_end import HospitalEnd
    from dopamine_lib.federation.wires.relay import Relay

    d, certificates = max(job["sizes"]), read_certificates(folder, job["K"])
    credentials = read_credentials(folder, number, certificates)
    if number != SERVER:
        calls = Dialled(address, credentials, certificates[SERVER], longest_message(d), _PATIENCE)
        return HospitalEnd(number, job["K"], calls, _PATIENCE, most_bytes(d)), calls.close
    relay, pinned = Relay(job["K"], most_bytes(d)), {k: certificates[k] for k in range(job["K"])}
    service = Service(relay, address, credentials, pinned, longest_message(d), 60.0)
    print(f"{_LISTENING}{service.address}", flush=True)
    end = relay.open(job["K"], 0.0, _PATIENCE, lambda line: None)

    def leave() -> None:
        relay.drain(10.0)
        service.close()

    return end, leave


if __name__ == "__main__":
    _party(json.loads(sys.argv[1]), *sys.argv[2:])
