"""Other libraries beside the kit in ``bench inference``: their parties as processes, from here.

CrypTen is measured where ``DOPAMINE_CRYPTEN`` names its folder (see ``crypten_peer``), SPU where ``DOPAMINE_SPU`` names
the Python of its environment (see ``spu_peer``). Either makes its correlated randomness within the query, so it is held
against offline and online time together, not against online time alone.
"""

import importlib.util
import os
import shutil
import socket
from pathlib import Path

import numpy as np

from dopamine_lib.benchmarks import crypten_peer, spu_peer
from dopamine_lib.benchmarks.measure import processor_seconds
from dopamine_lib.errors import InputError
from dopamine_lib.pool import Child, close_all

CRYPTEN_PARTIES = 2
#: SPU's parties, by protocol: ABY3's three hold two of three shares each, the others' two one of two.
SPU_PARTIES = {"ABY3": 3, "SEMI2K": 2, "Cheetah": 2}
PATIENCE = 600.0  # seconds for a start, or one inference


class Peer:
    """A library's parties; each call runs one inference. Use as a context manager.

    title      what rows call it
    parties    processes that say {"seconds": …, "name": …} when they are ready, then answer each message; the first
               also says {"logits": …}
    name       library, version and settings, in the first party's words
    seconds    of the slowest party, a call; logits: of the last one
    processor  seconds of all parties' processors, a call
    """

    def __init__(self, title: str, parties: list[Child]):
        self.title, self.name, self._parties = title, "", parties
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.logits: list[float] = []

    def __enter__(self) -> "Peer":
        try:
            self.name = self._hear()[0]["name"]
        except BaseException:  # what does not begin is not ended by ``with``
            close_all(self._parties)
            raise
        return self

    def __call__(self) -> None:
        pids = [party.pid for party in self._parties]
        before = processor_seconds(pids)
        for party in self._parties:
            party.say({})
        answers = self._hear()
        self.processor.append(processor_seconds(pids) - before)
        self.seconds.append(max(answer["seconds"] for answer in answers))
        self.logits = answers[0]["logits"]

    def _hear(self) -> list[dict]:
        try:
            return [party.hear(PATIENCE) for party in self._parties]
        except EOFError:
            raise RuntimeError(
                f"a process of {self.title} ended, or was silent for {PATIENCE:g} s; see above"
            ) from None

    def __exit__(self, *error: object) -> None:
        close_all(self._parties)


def crypten(folder: Path) -> Peer | None:
    """CrypTen with the model and the image that lie in ``folder``; None where it is not installed."""
    home = os.environ.get("DOPAMINE_CRYPTEN", "")
    if not home and not importlib.util.find_spec("crypten"):
        return None
    words = [home, *(str(folder / name) for name in ("rendezvous", "model.safetensors", "image.npy"))]
    return Peer("CrypTen", [Child(crypten_peer.__name__, str(rank), *words) for rank in range(CRYPTEN_PARTIES)])


def spu_python() -> str | None:
    """The Python of SPU's environment; None where none is named.

    Raises InputError where ``DOPAMINE_SPU`` names no program.
    """
    python = os.environ.get("DOPAMINE_SPU") or None
    if python is not None and not shutil.which(python):
        raise InputError(f"DOPAMINE_SPU is {python}, but no program is there: name the Python of SPU's environment")
    return python


def spu(folder: Path, size: int, protocol: str) -> Peer | None:
    """SPU with the weights and the image that lie in ``folder``; None, or InputError, as ``spu_python``."""
    python = spu_python()
    if python is None:
        return None
    files = [folder / "image.npy", folder / "weights.npz", ""]
    addresses = ",".join(_free_addresses(SPU_PARTIES[protocol]))
    parties = [
        Child(spu_peer.__name__, str(rank), protocol, addresses, str(files[rank]), str(size), python=python)
        for rank in range(SPU_PARTIES[protocol])
    ]
    return Peer(f"SPU's {protocol}", parties)


def _free_addresses(count: int) -> list[str]:
    """Addresses of this machine where nobody listens: SPU must know all of them before any of its parties starts."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = ["{}:{}".format(*one.getsockname()) for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def write_inputs(folder: Path, state: dict[str, np.ndarray], image: np.ndarray) -> None:
    """What peers read: a network's arrays, in order, and the image (1, 3, size, size)."""
    np.savez(folder / "weights.npz", **state)
    np.save(folder / "image.npy", image)
