"""One party of a distributed run: the rows it keeps, its part of the training, and what it leaves on disk.

``python -m dopamine_lib.federation.mpi`` starts these, one a rank.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from dopamine_lib import data
from dopamine_lib.data.dataset import Dataset
from dopamine_lib.data.hospitals import split_hospitals
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment, Options
from dopamine_lib.federation.mpi.roles import HospitalPart, Part, ServerPart, read_state, state_bytes
from dopamine_lib.federation.mpi.sums import make_end
from dopamine_lib.federation.mpi.wire import DONE, MODEL, STATE, Wire
from dopamine_lib.federation.run_folder import claim, run_files, write_json, writing
from dopamine_lib.federation.statement import between_processes
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint, save_model
from dopamine_lib.models.networks import extract_features, load_weights
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.reproduction.run import promise, run_record, setting_result


def own_rows(whole: Dataset, keep: np.ndarray) -> Dataset:
    """A data set of the rows ``keep`` alone, copied, so that nothing of the others stays in memory."""
    position = {part: np.flatnonzero(np.isin(keep, getattr(whole, part))) for part in ("train", "validation", "test")}
    return replace(
        whole,
        images=np.array(whole.images[keep]),
        labels=whole.labels[keep],
        person=whole.person[keep],
        attributes={name: values[keep] for name, values in whole.attributes.items()},
        **position,
    )


class Share(Experiment):
    """What one party has of an experiment: a hospital its own patients, the server the test images.

    The source is read whole, since the split is made here; what is not this party's is dropped before anything is
    computed from it. ``number`` is the hospital's, or SERVER.
    """

    def __init__(self, options: Options, number: int):
        self.options, self.number = options, number
        size = options.size
        if size is None and options.data == "retinamnist" and options.model != "cnn":
            size = 224  # as Experiment has it
        whole = data.load(options.data, options.data_dir, size=size, seed=options.public_seed)
        # numbers in the source, as public as the split: the others' rows are not here
        self.patients = split_hospitals(whole, options.hospitals, split=options.split, seed=options.public_seed)
        self.dataset = own_rows(whole, whole.test if number == SERVER else self.patients[number])
        self.train, self.test = np.concatenate(self.patients), self.dataset.test
        self.weights = load_weights("random" if options.model == "cnn" else options.weights)
        self.labels = torch.from_numpy(np.array(self.dataset.labels))
        if options.model == "head":
            self.features = extract_features(
                self.weights, self.dataset.images, seed=options.public_seed, progress=False
            )
        self._calibrated, self._integer = {}, {}

    def part(self, name: str, wire: Wire, *, transcript=None) -> Part:
        """This party's part in a run of a federated setting, keys exchanged; all parties call this at once."""
        declared, choice, task, integer = self.setting(name), self.choice(name), self.task(), self.integer(name)
        options, at_server = self.options, self.number == SERVER
        if options.aggregation != "plain" and round(declared.participation * options.hospitals) < 2:
            raise InputError(
                f"{name} invites one of {options.hospitals} hospitals a round, and a sum of one hides nothing: "
                "start more ranks, or take --aggregation plain"
            )
        least = options.hospitals if declared.shared_noise else 2
        extra = {"transcript": transcript} if at_server else {}
        return (ServerPart if at_server else HospitalPart)(
            None if at_server else self.number,
            self.sizes,
            make_end(wire, options.aggregation, choice, task.d, least=least, integer=integer, **extra),
            setting=declared,
            choice=choice,
            task=task,
            integer=integer,
            least=options.hospitals,
            randomness=Randomness(options.seed),
            delta=options.delta,
            budget=np.inf if options.epsilon is None else options.epsilon,
            accountant=options.accountant,
            seed=options.public_seed,
        )


def take_part(share: Share, wire: Wire, out, *, resume: bool = False, say=lambda line: None) -> dict | None:
    """Train one run of the one setting in the options with all other ranks; the server returns the results.

    The server writes ``results.json``, the model and the run's record into ``out``. Hospital 0 writes the checkpoint
    there, at every epoch, for it has the model; on several hosts that is its own host's ``out``.
    say  is told at the server how far the run is
    """
    out = Path(out)
    if share.number == SERVER:
        asked = json.loads(json.dumps(asdict(share.options))) | {"weights_sha256": share.weights.sha256}
        if (out / "results.json").exists():
            raise InputError(f"{out} already holds a finished run; choose another --out")
        with writing(out), claim(out, asked, resume):
            return _serve(share, wire, out, asked, say)
    (name,) = share.options.settings
    wire.barrier()  # the server has claimed the directory
    part, checkpoint = share.part(name, wire), run_files(out, name, 0)[1]
    _go_on(part, wire, checkpoint)

    def save() -> None:
        if wire.number == 0:
            save_checkpoint(checkpoint, part)
        wire.barrier()  # nobody draws noise that is not in the ledger on disk

    for _ in part.epochs(save):
        if wire.number == 0:
            save_checkpoint(checkpoint, part)
    if wire.number == 0:
        wire.send(SERVER, MODEL, part.model().numpy().astype("<f4").tobytes())
        wire.receive(SERVER, DONE)
        checkpoint.unlink(missing_ok=True)
    return None


def _go_on(part: Part, wire: Wire, checkpoint: Path) -> None:
    """Hospital 0 reads its checkpoint, if there is one, and the others go on from there: the server without a model."""
    if wire.number == 0:
        if checkpoint.exists():
            load_checkpoint(checkpoint, part)
        vectors, record = part.state()
        for k in range(1, wire.hospitals):
            wire.send(k, STATE, state_bytes(vectors, record))
        wire.send(SERVER, STATE, state_bytes({}, record))
    else:
        part.restore(*read_state(wire.receive(0, STATE)))


def _serve(share: Share, wire: Wire, out: Path, asked: dict, say) -> dict:
    (name,), began = share.options.settings, time.perf_counter()
    wire.barrier()
    part = share.part(name, wire)
    _go_on(part, wire, out)
    say(f"{name}, {wire.hospitals} hospitals, from epoch {part.progress.epoch}")
    for epoch in part.epochs(wire.barrier):
        if epoch % 10 == 0:
            say(f"{name}, epoch {epoch}, {time.perf_counter() - began:.0f} s")
    part.finish(torch.from_numpy(np.frombuffer(wire.receive(0, MODEL), "<f4").astype(np.float32)))
    classic = part.epsilons("rdp_classic")
    part.progress.history = [  # of the last epoch alone: the server has seen no other model
        {
            "epoch": part.progress.epoch,
            "accuracy": share.accuracy(part),
            "epsilon_rdp_classic": float(np.mean(classic)) if classic else None,
        }
    ]
    record = run_record(share, part)
    spent = {steps: share.bound(name).epsilons(steps) for steps in set(record["charged"])}
    said = promise(share, name, max(spent, default=share.setting(name).steps))
    result = setting_result(share, name, [record], said, spent)
    result["statement"] = between_processes(result["statement"])
    part.task.load(part.server.model)
    save_model(out / f"{name}-0.safetensors", part.task.net, share.metadata(name, result["statement"]))
    results = {
        "data": share.options.data,
        "model": share.options.model,
        "weights": share.weights.source,
        "weights_sha256": share.weights.sha256,
        "delta": share.options.delta,
        "patients": {"train": sum(share.sizes), "test": len(share.test)},
        "hospitals": share.sizes,
        "randomness": "operating systems of the parties"
        if share.options.seed is None
        else f"seeded with {share.options.seed}: for teaching only",
        "options": asked,
        "settings": {name: result},
        "processes": wire.hospitals + 1,
        "server_bytes": {"sent": wire.sent, "received": wire.received},
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / "results.json", results)
    wire.send(0, DONE, b"")
    return results
