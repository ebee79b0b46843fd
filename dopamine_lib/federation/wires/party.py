"""One party of a run over MPI: its side of the training, and what it leaves on disk.

Every rank walks the same ``Training``. A hospital contributes its own message, gets the total back and steps; so all
hospitals hold the same model, and the server, which has none, needs none: it walks along to know whose turn it is and
what is charged. All parties must arrive: a rank that dies ends the run, so nothing is sized for dropouts.

``python -m dopamine_lib.federation.mpi`` starts these, one per rank.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.mpi.ranks import DONE, MODEL, STATE, Wire
from dopamine_lib.federation.results import assemble, do_account, epoch_record, run_record
from dopamine_lib.federation.run_folder import claim, run_files, write_json, writing
from dopamine_lib.federation.tidy import write_metrics
from dopamine_lib.federation.training import Training
from dopamine_lib.federation.wires.agreement import (
    OwnCharge,
    agree_on_charge,
    agree_on_experiment,
    agree_on_model,
    asked,
)
from dopamine_lib.federation.wires.sums import make_wire_aggregation, read_vector
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint, save_model


def party_training(experiment: Experiment, name: str, wire: Wire) -> Training:
    """This party's side of a run of a federated setting, keys exchanged; all parties call it at once.

    experiment  loaded for this party
    Raises InputError where every round would have a single hospital, and for dropouts, which end a run over MPI.
    """
    plan = experiment.plan(name)
    if plan.dropout:
        raise InputError(f"dropout is {plan.dropout}, but over MPI a hospital that vanishes ends the run: take 0")
    if plan.hidden and plan.invited < 2:
        raise InputError(
            f"{name} invites one of {plan.hospitals} hospitals a round, and a sum of one hides nothing: "
            "start more ranks, or take --aggregation plain"
        )
    return experiment.training(name, aggregation=make_wire_aggregation(plan, wire))


def take_part(
    experiment: Experiment,
    wire: Wire,
    out: str | Path,
    *,
    resume: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> dict | None:
    """Train one run of the one setting in the options with all other ranks; the server returns the results.

    The server writes ``results.json``, ``metrics.csv``, the model and the run's record into ``out``. Hospital 0 writes
    the checkpoint there, at every epoch, for it has the model; and every hospital writes what it has charged. On
    several hosts that is each its own host's ``out``.
    say  is told, at the server, how far the run has come
    """
    out = Path(out)
    if wire.number == SERVER:
        begun = experiment.options.record() | {"weights_sha256": experiment.weights.sha256}
        if (out / "results.json").exists():
            raise InputError(f"{out} already holds a finished run; choose another --out")
        with writing(out), claim(out, begun, resume):
            return _serve(experiment, wire, out, begun, say)
    (name,) = experiment.options.settings
    wire.barrier()  # the server has claimed the directory
    run = agree_on_experiment(wire, experiment, name)
    training, checkpoint = party_training(experiment, name, wire), run_files(out, name, 0)[1]
    charge = OwnCharge(out / "runs" / f"{name}-0-hospital-{wire.number}.json", asked(experiment))
    _go_on(training, wire, checkpoint, charge, resume)
    training.aggregation.follow(run + state_bytes(training.state()[0], {}))

    def save() -> None:
        charge.save(training.progress.reserved)
        if wire.number == 0:
            save_checkpoint(checkpoint, training)
        wire.barrier()  # nobody draws noise that is not in every ledger on disk

    training.run(save, lambda epoch: save_checkpoint(checkpoint, training) if wire.number == 0 else None)
    agree_on_model(wire, training.aggregation.context)
    if wire.number == 0:
        wire.send(SERVER, MODEL, _final_parameters(training).numpy().astype("<f4").tobytes())
        wire.receive(SERVER, DONE)
        checkpoint.unlink(missing_ok=True)
    wire.barrier()  # the results are on disk
    charge.path.unlink(missing_ok=True)
    return None


def _go_on(training: Training, wire: Wire, checkpoint: Path, charge: OwnCharge, resume: bool) -> None:
    """Take up where all hospitals have been: the model is hospital 0's, the ledger what any of them has charged.

    Hospital 0 reads its checkpoint, if there is one, and the others go on from there: the server without a model.
    Raises InputError where a hospital's record, or the checkpoint, is missing or behind.
    """
    own = charge.read(resume)
    if wire.number == 0:
        if checkpoint.exists():
            load_checkpoint(checkpoint, training)
        own = min(own, training.progress.reserved)
    most = agree_on_charge(wire, own)
    if wire.number == 0:
        training.reserve(most)
        vectors, record = training.state()
        for k in range(1, wire.hospitals):
            wire.send(k, STATE, state_bytes(vectors, record))
        wire.send(SERVER, STATE, state_bytes({}, record))
    else:
        _take_up(training, wire)
        if training.progress.reserved != most:
            raise InputError(f"hospital 0 says {training.progress.reserved} epochs are charged, but {most} are: end")


def _take_up(training: Training, wire: Wire) -> None:
    """Go on from the state that hospital 0 sends. Raises InputError where that is none of this run."""
    body = wire.receive(0, STATE)
    try:
        training.restore(*read_state(body))
    except Exception as error:  # whatever is wrong with bytes from elsewhere, they are no state
        raise InputError(
            f"hospital 0 sends a state that cannot be gone on from ({type(error).__name__}): start all ranks with the "
            "same version"
        ) from None


def _final_parameters(training: Training) -> Tensor:
    """The model handed out, as the parameters (d,) of the net, whatever the features were centred on."""
    training.task.load(training.server.model)
    return torch.nn.utils.parameters_to_vector(training.task.net.parameters()).detach().clone()


def _serve(experiment: Experiment, wire: Wire, out: Path, begun: dict, say: Callable[[str], object]) -> dict:
    (name,), start = experiment.options.settings, time.perf_counter()
    wire.barrier()
    agree_on_experiment(wire, experiment, name)
    training = party_training(experiment, name, wire)
    _take_up(training, wire)
    say(f"{name}, {wire.hospitals} hospitals, from epoch {training.progress.epoch}")

    def after(epoch: int) -> None:
        if epoch % 10 == 0:
            say(f"{name}, epoch {epoch}, {time.perf_counter() - start:.0f} s")

    training.run(wire.barrier, after)
    # the final model is the only one that the server ever sees, so the history is of the last epoch alone
    final = torch.from_numpy(read_vector(wire.receive(0, MODEL), "<f4", len(training.server.w), 0))
    training.server.w = training.server.mean = final
    training.progress.history = [epoch_record(experiment, training)]

    def account(jobs: list[dict]) -> list:
        return [do_account(experiment, job, apart=True) for job in jobs]

    record = run_record(experiment, training)
    results = assemble(experiment, begun, {name: [record]}, account, randomness="operating systems of the parties")
    training.task.load(training.server.model)
    metadata = experiment.metadata(name, results["settings"][name]["statement"])
    save_model(out / f"{name}-0.safetensors", training.task.net, metadata)
    results |= {
        "processes": wire.hospitals + 1,
        "server_bytes": {"sent": wire.sent, "received": wire.received},
        "device": "cpu",
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(out / "results.json", results)
    write_metrics(out / "metrics.csv", {(name, 0): record})
    wire.send(0, DONE, b"")
    wire.barrier()
    return results


def state_bytes(vectors: dict[str, Tensor], record: dict) -> bytes:
    """A ``Training.state`` as bytes for other ranks."""
    text = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    return save({**{key: value.contiguous() for key, value in vectors.items()}, "record": text})


def read_state(body: bytes) -> tuple[dict[str, Tensor], dict]:
    """The inverse of ``state_bytes``."""
    vectors = load(body)
    return vectors, json.loads(vectors.pop("record").numpy().tobytes())
