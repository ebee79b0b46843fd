"""``bench inference``: SqueezeNet-1.1 on one image by three processes over TLS, beside plain torch and CrypTen.

The three take turns, so that a busy machine is as busy for each. CrypTen 0.4.1 is installed in its own folder and
measured if ``DOPAMINE_CRYPTEN`` names it (see ``crypten_peer``); else its rows are left out. It makes its correlated
randomness within the query, so it is compared with offline plus online time, not with online time alone.
At 224 pixels one turn of CrypTen takes about a minute; at 64, the default, some seconds.

At 64 pixels the same without a crypto-provider, whose randomness patient and provider then make ahead.

Then the same over a network, made by a ``link`` between patient and provider that delays and throttles; beside it, what
the messages themselves take on it: half a round trip for each that must wait for another, and the patient's bytes.
"""

import contextlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from dopamine_lib.benchmarks import crypten_peer
from dopamine_lib.benchmarks.agreement import agreement
from dopamine_lib.benchmarks.link import Link
from dopamine_lib.benchmarks.measure import at_most, interleaved, medians, row, write
from dopamine_lib.errors import InputError
from dopamine_lib.inference.workers.processes import Workers
from dopamine_lib.page.process_memory import together
from dopamine_lib.pool import Child, close_all

#: Times faster than CrypTen, by the image's size.
CRYPTEN_TARGETS = {64: 30, 224: 100}
CRYPTEN_PARTIES = 2
#: Networks between patient and provider: seconds of a round trip, bits a second, and the most seconds at 224 pixels.
NETWORKS = ((0.02, 100e6, 4), (0.05, 20e6, None))
#: Images that share their rounds.
TOGETHER = 4
#: The size at which the randomness is also made without a crypto-provider.
ALONE = 64
PATIENCE = 600.0  # seconds for CrypTen's start, or one inference
#: Only Linux shows other processes; elsewhere memory and processor time are left out.
PROC = Path("/proc/self/smaps_rollup").exists()


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

    images, model  instead: whether so many pictures get the answers of plain torch, by one network (``agreement``)
    Raises InputError for a model without pictures: the others are SqueezeNet's figures.
    """
    if images is not None:
        return write(agreement(model or "squeezenet", size, images), path)
    if model is not None:
        raise InputError(f"--model is {model}, but is for --images N: give both, or leave it out")
    import numpy as np
    import torch

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dopamine-")))
        model, image, net, x = _model_and_image(folder, size)
        workers = stack.enter_context(Workers(model, ahead=TOGETHER - 1))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        answers, processor, memory = [], [], []

        def private():
            before = _processor_seconds(workers.pids.values()) if PROC else 0
            answers.append(workers.infer(image))
            if PROC:
                processor.append(_processor_seconds(workers.pids.values()) - before)
                memory.append(together(workers.pids.values()))

        def plain():
            with torch.inference_mode():
                return net(x)

        functions = {"private": private, "plain": plain}
        if _crypten_folder() is not None:
            functions["crypten"] = stack.enter_context(_Crypten(folder, model, size))
        seconds = medians(interleaved(functions, repeats, warm_up))
        logits = plain()[0].numpy()
        workers.infer_all([image] * TOGETHER)  # memory for so many is there from now on
        begin = time.perf_counter()
        workers.infer_all([image] * 2 * TOGETHER)
        several = (time.perf_counter() - begin) / (2 * TOGETHER)
        held = together(workers.pids.values()) if PROC else 0
    counted = answers[warm_up:]
    error = max(float(np.abs(np.array(answer["logits"]) - logits).max()) for answer in counted)
    online = statistics.median(answer["seconds_online"] for answer in counted)
    total = statistics.median(answer["seconds_online"] + answer["seconds_offline"] for answer in counted)
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
        at_most("largest error of a logit, of the logits' range", error / float(np.ptp(logits)), "of 1", 1e-3),
    ]
    if PROC:
        rows += [
            at_most("three processes together, proportional set size", max(memory) / 1e9, "GB", 2),
            at_most(f"the same, {TOGETHER} at once", held / 1e9, "GB", 2),
            row("processor time of the three, a query", statistics.median(processor[warm_up:]), "s"),
        ]
    if "crypten" in functions:
        peer = functions["crypten"].seconds[warm_up:]
        rows += _against_crypten(statistics.median(peer), online, total, size)
    if size == ALONE:
        rows += _without_crypto_provider(size)
    return write(rows + _over_networks(size, max(1, repeats // 3)), path)


def _without_crypto_provider(size: int, queries: int = 2, warm_up: int = 1) -> list[dict]:
    """What ``queries`` cost between two processes, after some that are not counted: medians."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dopamine-")))
        model, image, *_ = _model_and_image(folder, size)
        workers = stack.enter_context(Workers(model, crypto_provider=False))
        for _ in range(warm_up):
            workers.infer(image)
        before = _processor_seconds(workers.pids.values()) if PROC else 0
        answers = [workers.infer(image) for _ in range(queries)]
        spent = (_processor_seconds(workers.pids.values()) - before) / queries if PROC else 0
    offline, online = (
        statistics.median(answer[f"seconds_{when}"] for answer in answers) for when in ("offline", "online")
    )
    name, amounts = f"without a crypto-provider, {size} px", answers[-1]["bytes"]
    ahead = (amounts["offline_to_provider"] + amounts["offline_to_patient"]) / 1e6
    rows = [
        at_most(f"{name}, offline", offline, "s", 60 if size == ALONE else None),
        at_most(f"{name}, online", online, "s", 0.2 if size == ALONE else None),
        at_most(f"{name}, both directions offline", ahead, "MB", 400 if size == ALONE else None),
    ]
    return [*rows, row(f"{name}, processor time of the two, a query", spent, "s")] if PROC else rows


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


def _against_crypten(peer: float, online: float, total: float, size: int) -> list[dict]:
    least = CRYPTEN_TARGETS.get(size)
    target = None if least is None else f"at least {least} times faster"
    holds = None if least is None else peer / total >= least
    return [
        row("offline and online against CrypTen", total, "s", "crypten 0.4.1", peer, peer / total, target, holds),
        row("online alone against CrypTen", online, "s", "crypten 0.4.1", peer, peer / online),
    ]


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
    return folder / "model.safetensors", folder / "eye.png", net, to_input(images, weights.mean, weights.std)


def _processor_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes until now."""
    fields = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def _crypten_folder() -> str | None:
    """CrypTen's folder: the one that was named, "" if the environment has it, None if it is missing."""
    named = os.environ.get("DOPAMINE_CRYPTEN")
    return named or ("" if importlib.util.find_spec("crypten") else None)


class _Crypten:
    """CrypTen's two parties; each call runs one inference and records the slower party's seconds."""

    def __init__(self, folder: Path, model: Path, size: int):
        words = [_crypten_folder(), str(folder / "rendezvous"), str(model), str(size)]
        self.seconds: list[float] = []
        self._parties = [Child(crypten_peer.__name__, str(rank), *words) for rank in range(CRYPTEN_PARTIES)]

    def __enter__(self):
        self._hear()
        return self

    def __call__(self) -> None:
        for party in self._parties:
            party.say({})
        self.seconds.append(max(self._hear()))

    def _hear(self) -> list[float]:
        try:
            return [party.hear(PATIENCE)["seconds"] for party in self._parties]
        except EOFError:
            raise RuntimeError(f"a CrypTen process ended, or was silent for {PATIENCE:g} s; see above") from None

    def __exit__(self, *error):
        close_all(self._parties)
