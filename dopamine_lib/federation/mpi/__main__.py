"""The same training between processes, over MPI: rank 0 is the server, ranks 1 to K are the hospitals.

    mpiexec -n 11 python -m dopamine_lib.federation.mpi --data synthetic --aggregation bfv --out results

takes the options of ``reproduce`` and trains one federated setting once (FSCDP, or ``--setting F`` or ``FPDP``). What
comes out is what ``reproduce`` gives: with a seed the same numbers, but for the order in which F's floats are added in
the clear.

Several hosts: ``mpiexec -f hosts -n 11 ...`` with a file of one host per line, the server's first, and one rank per
host (``host:1``). Each needs the same version of this kit.

Keys: on one machine they are made for the run. On several, each party makes its own once, on its machine,

    python -m dopamine_lib.federation.mpi identity hospital-3 keys

and hands ``keys/hospital-3.pub`` to all others. They compare the fingerprint that it printed with their copy's,

    python -m dopamine_lib.federation.mpi fingerprints keys

and all run with ``--identities keys``. MPI must not carry public keys: a relay could swap them.

Data: every rank reads its host's ``--data-dir``, which must be the same data set everywhere, keeps its own patients
(the server the test images) and drops the rest before it computes anything. A public data set is split that way into
make-believe hospitals. Into ``--out``, each on its host, rank 0 writes results and model, rank 1 the checkpoint, and
every hospital what it has charged: a run in which one of these is lost or set back is not gone on with. Before anything
else all ranks compare options, data, plan and version; who differs is named.

What is protected: all messages are sealed and counted between the two parties they are for (``wires/wire.py``). What is
not: MPI itself. Its own traffic is neither encrypted nor authenticated, so anyone on the network sees who sends
how much and when, can end the run, and may attack the MPI library; ``mpiexec`` reaches other hosts by ssh and starts
what it is told there. Run it on a network that only the parties use.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.federation.arguments import Parser, chosen_options, party_arguments
from dopamine_lib.federation.wires.program import one_setting, show, tell
from dopamine_lib.machine import safe_output

PROGRAM = "python -m dopamine_lib.federation.mpi"
#: Where MPICH 5.0 has ranks of one host exchange messages, and the bytes it takes for each; Docker gives 64 MB in all.
SHARED, SHARED_BY_A_RANK = Path("/dev/shm"), 5_400_000


def _parser(hospitals: int) -> Parser:
    about = "The same training between processes, over MPI: rank 0 is the server, ranks 1 to K are the hospitals."
    top = Parser(prog=PROGRAM, description=about)
    party_arguments(top)
    top.add_argument("--identities", metavar="DIR", help="the parties' keys; needed on several hosts")
    top.set_defaults(hospitals=hospitals, runs=1)
    return top


def _keys(comm, folder, patience: float):
    """This rank's identity and everybody's public keys: from ``folder``, or new ones where all share a machine."""
    import numpy as np
    from mpi4py import MPI

    from dopamine_lib.encryption.keys import Identity
    from dopamine_lib.federation.mpi.ranks import number_of, wait_for_all
    from dopamine_lib.federation.wires.identities import party_name, read_identity, read_publics, write_public

    number, hospitals = number_of(comm.rank), comm.size - 1
    if folder is not None:
        publics = read_publics(folder, hospitals)
        return read_identity(folder, number, publics), publics
    wait_for_all(comm, patience)  # what follows blocks, and a blocked rank spins
    if comm.Split_type(MPI.COMM_TYPE_SHARED).size < comm.size:
        raise InputError("the ranks are on several hosts: make a key for each party and give --identities DIR")
    # public keys go through a folder that only this user can write, and not through MPI
    place = np.zeros(4096, np.uint8)
    if comm.rank == 0:
        made = os.fsencode(tempfile.mkdtemp(prefix="dopamine-keys-"))
        place[: len(made)] = np.frombuffer(made, np.uint8)
    comm.Bcast(place)
    shared, identity = Path(os.fsdecode(place.tobytes().rstrip(b"\0"))), Identity()
    try:
        write_public(shared, party_name(number), identity.public)
        wait_for_all(comm, patience)
        publics = read_publics(shared, hospitals)
        wait_for_all(comm, patience)
    finally:
        if comm.rank == 0:
            shutil.rmtree(shared, ignore_errors=True)
    return identity, publics


def _rank(arguments, rank: int) -> int:
    """All that one rank does."""
    from dopamine_lib.encryption.codec import RangeError
    from dopamine_lib.federation.mpi.watch import Watcher

    who = "the server (rank 0)" if rank == 0 else f"hospital {rank - 1} (rank {rank})"
    watcher = Watcher(who, _remedy(arguments))
    import torch
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)  # ranks share the cores
    try:
        results = _train(comm, arguments)
    except RangeError:  # its text has a number of the message that encryption is there to hide
        return _abort(comm, watcher, f"dopamine: {who}: a message is too large for its layout; clip lower", 2)
    except InputError as error:
        return _abort(comm, watcher, f"dopamine: {who}: {error}", 2)
    except Exception as error:  # without this the others would wait for a rank that is gone
        message = f"dopamine: {who} gave up: {type(error).__name__}: {error}. {_remedy(arguments)}"
        return _abort(comm, watcher, message, 1)
    from dopamine_lib.federation.mpi.ranks import wait_for_all

    if results is not None:
        show(results, arguments.out)
    wait_for_all(comm, arguments.patience)  # the server has more to do, and a rank that waits in Finalize spins
    watcher.ended()
    MPI.Finalize()
    return 0


def _abort(comm, watcher, message: str, status: int) -> int:
    """Say why, and end all ranks."""
    print(message, file=sys.stderr, flush=True)
    watcher.explained()
    time.sleep(1)  # mpiexec passes on what a rank has said, but no longer once it is ending them
    comm.Abort(status)
    return status


def _train(comm, arguments):
    from dopamine_lib.federation.experiment import Experiment
    from dopamine_lib.federation.mpi.ranks import Ranks, number_of, wait_for_all
    from dopamine_lib.federation.wires.party import take_part
    from dopamine_lib.federation.wires.wire import Wire

    if comm.rank:
        wait_for_all(comm, arguments.patience)  # what is wrong with the options is said once, by rank 0
    party = number_of(comm.rank)
    experiment = Experiment.load(chosen_options(arguments), party=party, progress=False)
    if not comm.rank:
        wait_for_all(comm, arguments.patience)  # from here on the others find in the cache what was drawn
    keys = _keys(comm, arguments.identities, arguments.patience)

    def connect() -> Wire:
        return Wire(Ranks(comm, arguments.patience), *keys)

    return take_part(experiment, connect, arguments.out, party=party, resume=arguments.resume, say=tell)


def _remedy(arguments) -> str:
    return (
        f"The last epoch's checkpoint is in {Path(arguments.out) / 'runs'} of rank 1, once training has begun: "
        "the same command with --resume goes on from there"
    )


def _check(arguments, size: int) -> None:
    if size < 3:
        were = "rank was" if size == 1 else "ranks were"
        raise InputError(f"{size} {were} started, but a server and two hospitals need 3: mpiexec -n 3 python -m ...")
    if arguments.hospitals != size - 1:
        raise InputError(f"--hospitals is {arguments.hospitals}, but {size} ranks are a server and {size - 1}")
    one_setting(arguments)


def _check_shared_memory(ranks: int) -> None:
    """Raise InputError where MPICH's ``ranks`` of this host would be killed (SIGBUS) for want of shared memory."""
    if ranks and SHARED.is_dir():
        room, needed = shutil.disk_usage(SHARED).free, ranks * SHARED_BY_A_RANK
        if room < needed:
            raise InputError(
                f"{SHARED} has {room / 1e6:.0f} MB left, but {ranks} ranks take {needed / 1e6:.0f}; make room, or give "
                "the container more (docker run --shm-size=1g)"
            )


def main(words: list[str] | None = None) -> int:
    """Run this rank, or what ``words`` name; returns the exit status: 0, or 2 for bad input."""
    safe_output()
    words = sys.argv[1:] if words is None else words
    # MPICH and Open MPI both tell a process its place before MPI itself is started
    rank, size = (
        int(next((os.environ[name] for name in names if name in os.environ), default))
        for names, default in ((("PMI_RANK", "OMPI_COMM_WORLD_RANK"), 0), (("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"), 1))
    )
    first = int(os.environ.get("MPI_LOCALRANKID", rank)) == 0  # of this host
    try:
        if words[:1] in (["identity"], ["fingerprints"]):
            from dopamine_lib.federation.wires.identities import identity_command

            return identity_command(words, PROGRAM)
        arguments = _parser(size - 1).parse_args(words)
        _check(arguments, size)
        _check_shared_memory(int(os.environ.get("MPI_LOCALNRANKS", 0)))  # taken once all ranks have come this far
        if importlib.util.find_spec("mpi4py") is None:
            raise not_installed("mpi4py")
    except InputError as error:
        if first:  # one line, not one per rank
            print(f"dopamine: {error}", file=sys.stderr, flush=True)
        return 2
    return _rank(arguments, rank)


if __name__ == "__main__":
    sys.exit(main())
