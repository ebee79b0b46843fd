"""The rounds that ``bench aggregation`` times: BFV by parts, masks, and two peers.

The parts of a BFV round are timed inside real rounds, by a wrapper around TenSEAL's vector.
"""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tenseal

from dopamine_lib.encryption import group
from dopamine_lib.encryption.bfv_sum import set_up
from dopamine_lib.encryption.codec import LAYOUTS, SLOTS, Codec
from dopamine_lib.encryption.masks import MaskSum

BOUND = 0.5  # the largest |x| of the updates here
PAPER_MODULUS = LAYOUTS["paper"].plain_modulus


def reference_encode(x: list[float]) -> list[list[int]]:
    """The reference implementation's encoding, value by value: thousandths mod t, in lists of 4096."""
    chunks = []
    for start in range(0, len(x), SLOTS):
        chunk = []
        for value in x[start : start + SLOTS]:
            number = int(round(value, 3) * 1000)
            chunk.append(number + PAPER_MODULUS if number < 0 else number)
        chunks.append(chunk)
    return chunks


def reference_decode(chunks: list[list[int]]) -> list[float]:
    """The reference implementation's decoding: the upper half of Z_t is negative."""
    x = []
    for chunk in chunks:
        for number in chunk:
            x.append((number - PAPER_MODULUS if number > PAPER_MODULUS // 2 else number) / 1000)
    return x


class MeasuredRound:
    """Each call runs a round of all hospitals in one layout; ``seconds`` has each part's, one entry per call."""

    def __init__(self, layout: str, d: int, hospitals: int):
        self.codec = Codec(layout, hospitals=hospitals, bound=BOUND)
        self.updates = updates(d, hospitals)
        self.hospitals, self.server = set_up(hospitals, d, layout)
        self.seconds, self.round, self.bytes = defaultdict(list), 0, 0

    def __call__(self) -> None:
        clock = Clock()
        begin = time.perf_counter()
        with clock.watching():
            self.server.begin(self.round)
            for hospital, update in zip(self.hospitals, self.updates, strict=True):
                message = hospital.message(self.round, clock.timed("encode", self.codec.encode, update))
                self.bytes = len(message)
                self.server.add(message)
            aggregate = self.server.aggregate()
            for hospital in self.hospitals:
                total, _ = hospital.open(self.round, aggregate)
                clock.timed("decode", self.codec.decode, total)
        clock.seconds["round"] = time.perf_counter() - begin
        self.round += 1
        for part, taken in clock.seconds.items():
            self.seconds[part].append(taken / len(self.hospitals))

    def median(self, part: str) -> float:
        """Seconds of one part, the first (warm-up) call left out."""
        return statistics.median(self.seconds[part][1:])

    def outside(self, *own: str) -> float:
        """The share of a round spent outside the parts named, as a median over rounds."""
        parts = zip(*(self.seconds[part][1:] for part in own), strict=True)
        return statistics.median(
            1 - sum(spent) / whole for spent, whole in zip(parts, self.seconds["round"][1:], strict=True)
        )


class Clock:
    """Seconds of a round, by part."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function, add its time to ``part``, and return its result."""
        begin = time.perf_counter()
        result = function(*arguments)
        self.seconds[part] += time.perf_counter() - begin
        return result

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, every vector that is made, added, written, read or decrypted is timed."""
        plain, clock = group.BFVVector, self

        class Vector:
            def __init__(self, context, data):
                self.inner = clock.timed("encrypt" if isinstance(data, list) else "read", plain, context, data)
                self.size = self.inner.size

            def serialize(self):
                return clock.timed("serialise", self.inner.serialize)

            def add_(self, other):
                clock.timed("add", self.inner.add_, other.inner)

            def decrypt(self):
                return clock.timed("decrypt", self.inner.decrypt)

        group.BFVVector = Vector
        try:
            yield
        finally:
            group.BFVVector = plain


class MaskedRound:
    """Each call runs a round with masks instead of ciphertexts."""

    def __init__(self, d: int, hospitals: int):
        self.codec, self.updates = Codec("ring32", hospitals=hospitals, bound=BOUND), updates(d, hospitals)
        self.sums, self.invited = MaskSum(hospitals, d, transcript=self), list(range(hospitals))
        self.seconds, self.round, self._received = [], 0, 0

    def record(self, _name: str, data: bytes) -> None:
        """Count the bytes that the server is sent."""
        self._received += len(data)

    def __call__(self) -> None:
        begin, self._received = time.perf_counter(), 0
        values = {k: self.codec.encode(update) for k, update in enumerate(self.updates)}
        total = self.sums.sum(self.round, self.invited, values)
        for _ in self.invited:
            self.codec.decode(total)
        self.seconds.append((time.perf_counter() - begin) / len(self.invited))
        self.bytes, self.round = self._received // len(self.invited), self.round + 1


class NaiveRound:
    """Each call does one hospital's part of a round as TenSEAL's introduction shows it, at the paper's parameters."""

    def __init__(self, d: int, hospitals: int):
        self.context = tenseal.context(tenseal.SCHEME_TYPE.BFV, SLOTS, plain_modulus=PAPER_MODULUS, n_threads=1)
        self.update = updates(d, 1)[0] / hospitals
        # TenSEAL would cut up a vector of more than 4096 values itself, and print a warning each time
        self.starts = range(0, d, SLOTS)
        self.total = [tenseal.bfv_vector(self.context, [0] * len(self.update[i : i + SLOTS])) for i in self.starts]
        self.seconds = []

    def __call__(self) -> None:
        begin = time.perf_counter()
        numbers = [int(round(value, 3) * 1000) for value in self.update.tolist()]
        sent = [tenseal.bfv_vector(self.context, numbers[i : i + SLOTS]).serialize() for i in self.starts]
        for total, message in zip(self.total, sent, strict=True):
            total.add_(tenseal.bfv_vector_from(self.context, message))
        for total in self.total:
            _ = [number / 1000 for number in total.decrypt()]
        self.seconds.append(time.perf_counter() - begin)
        self.bytes = sum(map(len, sent))


def updates(d: int, hospitals: int) -> list[np.ndarray]:
    """Float32 updates (d,) in range, one per hospital; no figure depends on their values."""
    rng = np.random.default_rng(0)
    return [rng.uniform(-BOUND, BOUND, d).astype(np.float32) for _ in range(hospitals)]
