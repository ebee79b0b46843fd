"""What a server sees, byte by byte, and a search of it for what must not be there.

A claim of secrecy needs a test that can fail: plant a plaintext in the transcript, and the search must find it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dopamine_lib.encryption.codec import LAYOUTS

#: Bytes in a row that count as found: none of a million such stands in a gigabyte of random bytes by chance (1e-23).
WINDOW = 16
_STEP = 8  # every 8th window of a secret is looked for, at any offset: 23 bytes of it in a row are enough


class Finding(NamedTuple):
    """A stretch of something secret in the open: in which record, from which byte, and in what form."""

    record: str
    offset: int
    form: str


class Transcript:
    """All that a party was shown, in order.

    last  keep the newest records only (3,001 rounds of messages fill the memory); None keeps all
    """

    def __init__(self, last: int | None = None):
        self.records: list[tuple[str, bytes]] = []
        self._last = last

    def __repr__(self):
        return f"<Transcript of {len(self.records)} records, {sum(len(data) for _, data in self.records)} bytes>"

    def record(self, name: str, data: bytes) -> None:
        """Keep a copy of what was received or is held."""
        self.records.append((name, bytes(data)))
        if self._last is not None:
            del self.records[: -self._last]

    def find(self, secret: bytes, *, known: bytes = b"") -> list[Finding]:
        """Where stretches of a secret, a key for instance, stand in the records; what is in ``known`` is public."""
        return self._search([("bytes", secret)], known)

    def find_values(self, values: np.ndarray, scale: float = 1.0) -> list[Finding]:
        """Where stretches of one hospital's integers int64 (d,) stand in the records, in any of the ``encodings``."""
        return self._search(encodings(values, scale))

    def _search(self, forms: Iterable[tuple[str, bytes]], known: bytes = b"") -> list[Finding]:
        wanted = {}
        for form, data in forms:
            if len(data) < WINDOW:
                raise ValueError(f"{len(data)} bytes as {form} are too few to search for: {WINDOW} are needed")
            for i in range(0, len(data) - WINDOW + 1, _STEP):
                window = data[i : i + WINDOW]
                if len(set(window)) >= 4 and window not in known:  # zeros stand everywhere and tell nothing
                    wanted.setdefault(window, form)
        firsts = np.array([int.from_bytes(window[:8], "little") for window in wanted], np.uint64)
        found = []
        for name, data in self.records:
            end = -1  # one finding a stretch
            for i in np.flatnonzero(np.isin(_words(data), firsts)).tolist():
                form = wanted.get(data[i : i + WINDOW])
                if form is not None:
                    if i > end:
                        found.append(Finding(name, i, form))
                    end = i + WINDOW
        return found


def encodings(values: np.ndarray, scale: float = 1.0) -> Iterator[tuple[str, bytes]]:
    """The plausible ways in which integers (d,), or the floats values / scale, stand in memory, a message or a text."""
    for kind in ("<i2", ">i2", "<i4", ">i4", "<i8", ">i8"):
        if np.abs(values).max() <= np.iinfo(kind).max:
            yield f"integers {kind}", values.astype(kind).tobytes()
    yield "integers mod t", np.mod(values, LAYOUTS["paper"].plain_modulus).astype("<i8").tobytes()
    for unit in {1.0, float(scale)}:
        for kind in ("<f4", ">f4", "<f8", ">f8"):
            yield f"floats {kind} at scale {unit:g}", (values / unit).astype(kind).tobytes()
    for separator in (",", ", ", " ", "\n"):
        yield f"text with {separator!r}", separator.join(map(str, values.tolist())).encode()
    for layout in LAYOUTS.values():
        if layout.fields > 1:
            yield f"slots of {layout.name!r}", layout.pack(values).astype("<i8").tobytes()


def _words(data: bytes) -> np.ndarray:
    """The 8 bytes from every offset on as uint64 (len - 7,)."""
    if len(data) < 8:
        return np.empty(0, np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    return np.ascontiguousarray(rows).view("<u8")[:, 0]
