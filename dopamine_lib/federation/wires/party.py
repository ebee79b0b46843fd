"""One party of a run: its side of the training, and what it leaves on disk, whatever carries the messages.

Every party walks the same ``Training``. A hospital contributes its own message, gets the total back and steps; so all
hospitals hold the same model, and the server, which has none, needs none: it walks along to know whose turn it is and
what is charged.

Where a session can be followed by another (threads, gRPC; ``wire``), each is gone on with as a run that was
interrupted: hospitals come with what they have on disk, compare their ledgers, and take the state of the one whose
model is furthest. An epoch that was begun is charged, and its rounds are not run again.
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
from dopamine_lib.federation.plan import Plan
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
    furthest,
)
from dopamine_lib.federation.wires.relay import who
from dopamine_lib.federation.wires.sums import fewest, make_wire_aggregation, read_vector
from dopamine_lib.federation.wires.wire import DONE, MODEL, STATE, SessionOver, Silence, Wire
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint, save_model
from dopamine_lib.progress import say_last_line


def check_plan(plan: Plan) -> None:
    """Raise InputError for dropouts by chance, and where every round would have a single hospital."""
    if plan.dropout:
        raise InputError(f"dropout is {plan.dropout}, but between processes hospitals vanish by themselves: take 0")
    if plan.hidden and plan.invited < 2:
        raise InputError(
            f"{plan.setting.name} invites one of {plan.hospitals} hospitals a round, and a sum of one hides nothing: "
            "take more hospitals, or --aggregation plain"
        )


def needed(plan: Plan) -> int:
    """How many hospitals a session needs: all, or as many as ``--least`` says."""
    return plan.hospitals if plan.least is None else fewest(plan)


def party_training(experiment: Experiment, name: str, wire: Wire) -> Training:
    """This party's side of a run of a federated setting, keys exchanged; all parties call it at once.

    experiment  loaded for this party. Raises InputError as ``check_plan``
    """
    plan = experiment.plan(name)
    check_plan(plan)
    return experiment.training(name, aggregation=make_wire_aggregation(plan, wire))


def take_part(
    experiment: Experiment,
    connect: Callable[[], Wire],
    out: str | Path,
    *,
    party: int,
    resume: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> dict | None:
    """Train one run of the one setting in the options with all other parties; the server returns the results.

    connect  this party's wire of the next session; waits for it
    party    its number
    say      is told how far the run has come, and of what ends a session

    The server writes ``results.json``, ``metrics.csv``, the model and the run's record into ``out``. Every hospital
    writes there what it has charged, and at every epoch the checkpoint: over MPI, where ``out`` may be one folder for
    all, hospital 0 alone. On several hosts that is each its own host's ``out``.
    """
    out, began = Path(out), time.monotonic()
    check_plan(experiment.plan(experiment.options.settings[0]))
    if party != SERVER:
        _sessions(connect, say, resume, lambda wire, again: _train(experiment, wire, out, again))
        say_last_line(who(party), began, out)
        return None
    begun = experiment.options.record() | {"weights_sha256": experiment.weights.sha256}
    if (out / "results.json").exists():
        raise InputError(f"{out} already holds a finished run; choose another --out")
    start = time.perf_counter()
    with writing(out), claim(out, begun, resume):
        results = _sessions(connect, say, resume, lambda wire, again: _serve(experiment, wire, out, begun, say, start))
    say_last_line(who(party), began, out)
    return results


def _sessions(
    connect: Callable[[], Wire], say: Callable[[str], object], resume: bool, do: Callable[[Wire, bool], dict | None]
) -> dict | None:
    """``do(wire, resume)`` in one session after another, until it is done."""
    while True:
        reopens = True
        try:
            wire = connect()
            reopens = wire.carrier.reopens
            return do(wire, resume)
        except SessionOver as over:
            if not reopens:
                raise Silence(f"{over}: the run is given up") from None
            say(f"the session is over: {over}")
            resume = True


def _train(experiment: Experiment, wire: Wire, out: Path, resume: bool) -> None:
    """A hospital's part in a session."""
    (name,) = experiment.options.settings
    wire.barrier()  # the server has claimed the directory
    run = agree_on_experiment(wire, experiment, name)
    training, checkpoint = party_training(experiment, name, wire), run_files(out, name, 0)[1]
    wire.fewest = min(wire.fewest, needed(training.plan))
    charge = OwnCharge(out / "runs" / f"{name}-0-hospital-{wire.number}.json", asked(experiment))
    keeps = wire.number == 0 or wire.carrier.reopens
    _go_on(training, wire, checkpoint if keeps else None, charge, resume)
    training.aggregation.follow(run + state_bytes(training.state()[0], {}))

    def save() -> None:
        charge.save(training.progress.reserved, wire.present)
        if keeps:
            save_checkpoint(checkpoint, training)
        wire.barrier()  # nobody draws noise that is not in every ledger on disk

    def after(epoch: int) -> None:
        if keeps:
            save_checkpoint(checkpoint, training)
        if wire.carrier.reopens:
            wire.barrier(pause=True)

    training.run(save, after)
    agree_on_model(wire, training.aggregation.context)
    if wire.number == wire.present[0]:
        final = torch.cat([_final_parameters(training), _final_counts(training)])
        wire.send(SERVER, MODEL, final.numpy().astype("<f4").tobytes())
        wire.receive(SERVER, DONE)
    wire.barrier()  # the results are on disk
    if keeps:
        checkpoint.unlink(missing_ok=True)
    charge.path.unlink(missing_ok=True)
    wire.carrier.close("the run is over")


def _go_on(training: Training, wire: Wire, checkpoint: Path | None, charge: OwnCharge, resume: bool) -> None:
    """Take up where hospitals have been: the model is that of the furthest, the ledger what any of them has charged.

    checkpoint  this hospital's, if it keeps one
    Raises InputError where a hospital's record, or its checkpoint, is missing or behind.
    """
    own = charge.read(resume)
    if checkpoint is not None:
        if checkpoint.exists():
            load_checkpoint(checkpoint, training)
        own = min(own, training.progress.reserved)
    most = agree_on_charge(wire, own, charge.taken)
    if most > training.plan.setting.epochs:
        raise InputError(f"{most} epochs are said to be charged, but the run has {training.plan.setting.epochs}: end")
    first = furthest(wire, training.progress.epoch)
    if wire.number == first:
        training.reserve(most)
        vectors, record = training.state()
        for k in wire.members:
            if k != first:
                wire.send(k, STATE, state_bytes(vectors, record))
        wire.send(SERVER, STATE, state_bytes({}, record))
    else:
        _take_up(training, wire, first)
        if training.progress.reserved != most:
            raise InputError(
                f"{wire.names([first])} says {training.progress.reserved} epochs are charged, but {most} are: end"
            )
    if most:  # before others note that this hospital charges more: it may die again before it does
        charge.save(most)
        if checkpoint is not None:
            save_checkpoint(checkpoint, training)
    wire.barrier()


def _go_along(training: Training, wire: Wire) -> None:
    """The server's part while hospitals ``_go_on``."""
    _take_up(training, wire, furthest(wire, None))
    wire.barrier()  # hospitals have on disk what they go on from


def _take_up(training: Training, wire: Wire, first: int) -> None:
    """Go on from the state that hospital ``first`` sends. Raises InputError where that is none of this run."""
    body = wire.receive(first, STATE)
    try:
        training.restore(*read_state(body))
    except Exception as error:  # whatever is wrong with bytes from elsewhere, they are no state
        raise InputError(
            f"{wire.names([first])} sends a state that cannot be gone on from ({type(error).__name__}): start all "
            "parties with the same version"
        ) from None


def _final_parameters(training: Training) -> Tensor:
    """The model handed out, as the parameters (d,) of the net, whatever the features were centred on."""
    training.task.load(training.server.model)
    return torch.nn.utils.parameters_to_vector(training.task.net.parameters()).detach().clone()


def _final_counts(training: Training) -> Tensor:
    """The noisy counts (cells,) for its operating point, empty without one; NaN where no round was opened."""
    point = training.plan.operating_point
    if point is None:
        return torch.zeros(0)
    return torch.full((point.cells,), torch.nan) if training.histogram is None else training.histogram


def _serve(
    experiment: Experiment, wire: Wire, out: Path, begun: dict, say: Callable[[str], object], start: float
) -> dict:
    """The server's part in a session."""
    (name,) = experiment.options.settings
    wire.barrier()
    agree_on_experiment(wire, experiment, name)
    training = party_training(experiment, name, wire)
    _go_along(training, wire)
    asks, progress = training.plan.choice.mean_noise_multiplier is not None, training.progress
    lost = asks and progress.reserved and not progress.centred  # the session in which they were asked for
    without = ", without mean features, which are asked for once" if lost else ""
    say(f"{name}, {len(wire.members)} hospitals, from epoch {progress.epoch}{without}")

    def after(epoch: int) -> None:
        if epoch % 10 == 0:
            say(f"{name}, epoch {epoch}, {time.perf_counter() - start:.0f} s")
        if wire.carrier.reopens:
            wire.barrier(pause=True)

    if wire.carrier.reopens:
        wire.tolerate(needed(training.plan))
    training.run(wire.barrier, after)
    wire.tolerate(None)
    # the final model is the only one that the server ever sees, so the history is of the last epoch alone
    first = wire.present[0]
    d, point = training.plan.d, training.plan.operating_point
    final = read_vector(wire.receive(first, MODEL), "<f4", d + (point.cells if point else 0), wire.names([first]))
    final, counts = torch.from_numpy(final).tensor_split([d])
    training.server.w = training.server.mean = final
    training.histogram = counts if point and counts.isfinite().all() else None
    training.progress.history = [epoch_record(experiment, training)]

    def account(jobs: list[dict]) -> list:
        return [do_account(experiment, job, apart=True) for job in jobs]

    record = run_record(experiment, training)
    results = assemble(experiment, begun, {name: [record]}, account, randomness="operating systems of the parties")
    training.task.load(training.server.model)
    metadata = experiment.metadata(name, results["settings"][name]["statement"], training.thresholds)
    save_model(out / f"{name}-0.safetensors", training.task.net, metadata)
    results |= {
        "processes": wire.hospitals + 1,
        "server_bytes": {"sent": wire.sent, "received": wire.received},
        "device": "cpu",
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(out / "results.json", results)
    write_metrics(out / "metrics.csv", {(name, 0): record})
    wire.send(first, DONE, b"")
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
