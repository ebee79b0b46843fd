"""``bench inference``: SqueezeNet-1.1 on one image by three processes over TLS, beside plain torch, CrypTen and SPU.

They take turns, so that a busy machine is as busy for each. CrypTen and SPU are measured where ``DOPAMINE_CRYPTEN`` and
``DOPAMINE_SPU`` say where they are (see ``peers``); else their rows are left out. What they answer is held against
plain torch, as what the kit answers is. At 224 pixels one turn of either takes minutes; at 64, the default, seconds.

At 64 pixels the same without a crypto-provider, whose randomness patient and provider then make ahead; beside it SPU's
Cheetah, which has none either.

Then the same over a network, made by a ``link`` between patient and provider that delays and throttles; beside it, what
the messages themselves take on it: half a round trip for each that must wait for another, and the patient's bytes.
"""

import contextlib
import statistics
import tempfile
import time
from os import PathLike
from pathlib import Path

from dopamine_lib.benchmarks import peers
from dopamine_lib.benchmarks.agreement import agreement
from dopamine_lib.benchmarks.link import Link
from dopamine_lib.benchmarks.measure import PROC, at_most, interleaved, medians, processor_seconds, row, write
from dopamine_lib.errors import InputError
from dopamine_lib.inference.workers.processes import Workers
from dopamine_lib.page.process_memory import together

#: Times faster than a peer, by the image's size.
TARGETS = {"CrypTen": {64: 30, 224: 100}, "SPU's ABY3": {64: 60}, "SPU's SEMI2K": {64: 60}}
#: Networks between patient and provider: seconds of a round trip, bits a second, and the most seconds at 224 pixels.
NETWORKS = ((0.02, 100e6, 4), (0.05, 20e6, None))
#: Images that share their rounds.
TOGETHER = 4
#: The size at which the randomness is also made without a crypto-provider.
ALONE = 64


def run(
    path: str | PathLike | None = None,
    *,
    size: int = 64,
    repeats: int = 10,
    warm_up: int = 2,
    images: int | None = None,
    model: str | None = None,
) -> dict:
    """All rows, also written to ``path`` if one is given. ``size`` is the image's side in pixels.

    images, model  instead: whether this many pictures get the answers of plain torch, by one network (``agreement``)
    Raises InputError for a model without pictures: the others are SqueezeNet's figures.
    """
    if images is not None:
        return write(agreement(model or "squeezenet", size, images), path)
    if model is not None:
        raise InputError(f"--model is {model}, but is for --images N: give both, or leave it out")
    import torch

    peers.spu_python()  # one that is not there is told before anything is measured
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dopamine-")))
        model, image, net, x = _model_and_image(folder, size)
        workers = stack.enter_context(Workers(model, ahead=TOGETHER - 1))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        answers, memory = [], []

        def private():
            before = processor_seconds(workers.pids.values())
            answer = workers.infer(image)
            answers.append(answer | {"processor": processor_seconds(workers.pids.values()) - before})
            if PROC:
                memory.append(together(workers.pids.values()))

        def plain():
            return _plain(net, x)

        seconds = medians(interleaved({"private": private, "plain": plain}, repeats, warm_up))
        logits, counted = plain(), answers[warm_up:]
        workers.infer_all([image] * TOGETHER)  # memory for them is there from now on
        begin = time.perf_counter()
        workers.infer_all([image] * 2 * TOGETHER)
        several = (time.perf_counter() - begin) / (2 * TOGETHER)
        held = together(workers.pids.values()) if PROC else 0
        beside = _beside_peers(folder, size, private, answers, logits, max(1, repeats // 3))
    online, total = _median(counted, "seconds_online"), _median(counted, "seconds_offline", "seconds_online")
    amounts = counted[0]["bytes"]
    rows = [
        at_most(f"online, {size} px", online, "s", 0.4 if size == 224 else None),
        at_most(f"offline and online, {size} px", total, "s", 0.8 if size == 224 else None),
        row("online against plain torch, 1 thread", online, "s", "torch", seconds["plain"], online / seconds["plain"]),
        at_most("both directions online", (amounts["online_sent"] + amounts["online_received"]) / 1e6, "MB", 60),
        at_most("crypto-provider to provider", amounts["offline_to_provider"] / 1e6, "MB", 100),
        at_most("crypto-provider to patient, once a session", amounts["offline_to_patient"], "bytes", 16),
        row("rounds online", counted[0]["rounds"], "rounds"),
        row(f"images a minute, {TOGETHER} at once", 60 / several, "images", "one", 60 / total, total / several),
        at_most(
            "largest error of a logit, of the logits' range",
            max(_error(answer["logits"], logits) for answer in counted),
            "of 1",
            1e-3,
        ),
    ]
    if PROC:
        rows += [
            at_most("three processes together, proportional set size", max(memory) / 1e9, "GB", 2),
            at_most(f"the same, {TOGETHER} at once", held / 1e9, "GB", 2),
            row("processor time of the three, a query", _median(counted, "processor"), "s"),
        ]
    rows += beside
    if size == ALONE:
        rows += _without_crypto_provider(size)
    return write(rows + _over_networks(size, max(1, repeats // 3)), path)


def _without_crypto_provider(size: int, queries: int = 2, warm_up: int = 1) -> list[dict]:
    """What ``queries`` cost between two processes, after some that are not counted, and SPU's Cheetah: medians."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dopamine-")))
        model, image, net, x = _model_and_image(folder, size)
        workers = stack.enter_context(Workers(model, crypto_provider=False))
        answers = []

        def private():
            before = processor_seconds(workers.pids.values())
            answers.append(workers.infer(image) | {"processor": processor_seconds(workers.pids.values()) - before})

        cheetah = peers.spu(folder, size, "Cheetah")
        functions = {"private": private} | ({} if cheetah is None else {"peer": stack.enter_context(cheetah)})
        interleaved(functions, queries, warm_up)
        offline, online = (_median(answers[warm_up:], f"seconds_{when}") for when in ("offline", "online"))
        name, amounts = f"without a crypto-provider, {size} px", answers[-1]["bytes"]
        ahead = (amounts["offline_to_provider"] + amounts["offline_to_patient"]) / 1e6
        rows = [
            at_most(f"{name}, offline", offline, "s", 60 if size == ALONE else None),
            at_most(f"{name}, online", online, "s", 0.2 if size == ALONE else None),
            at_most(f"{name}, both directions offline", ahead, "MB", 400 if size == ALONE else None),
        ]
        if PROC:
            spent = _median(answers[warm_up:], "processor")
            rows.append(row(f"{name}, processor time of the two, a query", spent, "s"))
        if cheetah is not None:
            rows += _against(f"{name}: ", cheetah, answers[warm_up:], warm_up, 1)
            rows.append(_error_of(cheetah, _plain(net, x)))
    return rows


def _over_networks(size: int, repeats: int) -> list[dict]:
    """A row for each of ``NETWORKS``; the patient is this process."""
    from dopamine_lib.data.images import read_image
    from dopamine_lib.encryption.certificates import Credentials
    from dopamine_lib.inference.workers.client import PatientClient

    rows, patient = [], Credentials.make("patient")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dopamine-")))
        model, file, *_ = _model_and_image(folder, size)
        image = read_image(file, size)
        (provider, certificate), crypto_provider = stack.enter_context(
            Workers(model, patient=patient.certificate, ahead=max(TOGETHER - 1, repeats))
        ).peers
        for round_trip, rate, most in NETWORKS:
            with (
                Link(provider, round_trip, rate) as link,
                PatientClient(patient, (link.address, certificate), crypto_provider) as client,
            ):
                client.prepare(1 + repeats)
                answers = [client.infer(image) for _ in range(1 + repeats)][1:]
                several = client.infer_all([image] * TOGETHER)[0].seconds_online / TOGETHER
                costs = client.plan.costs()
            alone = costs["rounds"] * round_trip / 2 + 8 * costs["online_to_provider"] / rate
            name = f"online, {size} px, {1e3 * round_trip:g} ms and {rate / 1e6:g} Mbit/s"
            seconds = statistics.median(answer.seconds_online for answer in answers)
            rows.append(at_most(name, seconds, "s", most if size == 224 else None, "messages alone", alone))
            rows.append(row(f"{name}, {TOGETHER} at once, an image", several, "s", "one", seconds, several / seconds))
    return rows


def _beside_peers(folder: Path, size: int, private, answers: list[dict], logits, repeats: int) -> list[dict]:
    """Rows for each library that is there, in turns with ``private``, whose answers arrive in ``answers``."""
    with contextlib.ExitStack() as stack:
        found = [peers.crypten(folder), *(peers.spu(folder, size, protocol) for protocol in ("ABY3", "SEMI2K"))]
        found = [stack.enter_context(peer) for peer in found if peer is not None]
        if not found:
            return []
        begin = len(answers) + 1  # after the first turn, which is not counted
        interleaved({"private": private} | {peer.title: peer for peer in found}, repeats)
    rows = []
    for peer in found:
        rows += _against("", peer, answers[begin:], 1, TARGETS[peer.title].get(size)) + [_error_of(peer, logits)]
    return rows


def _against(prefix: str, peer: peers.Peer, answers: list[dict], warm_up: int, least: float | None) -> list[dict]:
    """The kit's answers against a peer's seconds after ``warm_up``; in all faster by ``least`` times or more."""
    online, total = _median(answers, "seconds_online"), _median(answers, "seconds_offline", "seconds_online")
    taken = statistics.median(peer.seconds[warm_up:])
    target = None if least is None else f"at least {least:g} times faster"
    holds = None if least is None else taken / total >= least
    against = f"against {peer.title}"
    rows = [
        row(f"{prefix}offline and online {against}", total, "s", peer.name, taken, taken / total, target, holds),
        row(f"{prefix}online alone {against}", online, "s", peer.name, taken, taken / online),
    ]
    if PROC:
        spent, theirs = _median(answers, "processor"), statistics.median(peer.processor[warm_up:])
        rows.append(row(f"{prefix}processor time {against}", spent, "s", peer.name, theirs, theirs / spent))
    return rows


def _error_of(peer: peers.Peer, logits) -> dict:
    """Whether a peer computes what plain torch does."""
    return at_most(
        f"{peer.title}: largest error of a logit, of the logits' range", _error(peer.logits, logits), "of 1", 0.01
    )


def _median(answers: list[dict], *names: str) -> float:
    """Of the sum of an answer's figures."""
    return statistics.median(sum(answer[name] for name in names) for answer in answers)


def _error(logits: list[float], wanted) -> float:
    """The largest, as a part of the range of what is wanted."""
    import numpy as np

    return float(np.abs(np.array(logits) - wanted).max() / np.ptp(wanted))


def _plain(net, x):
    """Logits of plain torch, as an array."""
    import torch

    with torch.inference_mode():
        return net(x)[0].numpy()


def _model_and_image(folder: Path, size: int):
    """A SqueezeNet-1.1 with embedded weights and a synthetic patient's image: their files, and both in memory."""
    from PIL import Image

    from dopamine_lib.data.dataset import GRADES
    from dopamine_lib.data.synthetic import make_population
    from dopamine_lib.models.checkpoints import save_model
    from dopamine_lib.models.networks import build, to_input
    from dopamine_lib.models.weights import load_weights

    weights = load_weights()
    net = build("squeezenet", len(GRADES), weights, 0).eval()
    preprocessing = {"size": size, "mean": weights.mean, "std": weights.std}
    save_model(
        folder / "model.safetensors",
        net,
        {"architecture": "squeezenet", "grades": GRADES, "preprocessing": preprocessing},
    )
    images, *_ = make_population(1, size, 1, threads=1)
    Image.fromarray(images[0]).save(folder / "eye.png")
    x = to_input(images, weights.mean, weights.std)
    peers.write_inputs(folder, {name: value.numpy() for name, value in net.state_dict().items()}, x.numpy())
    return folder / "model.safetensors", folder / "eye.png", net, x
