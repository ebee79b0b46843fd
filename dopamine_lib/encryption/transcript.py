"""A record of everything that a server sees, byte by byte, and a search in it for secrets.

A claim of secrecy needs a test that can fail: plant a plaintext in the transcript, and the search must find it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dopamine_lib.encryption.codec import LAYOUTS

#: This many bytes in a row count as found. A million such stretches against a gigabyte of random bytes match by
#: chance with probability 1e-23.
WINDOW = 16
_STEP = 8  # every 8th window of a secret is searched for, at any offset, so any 23 bytes of it in a row are found


class Finding(NamedTuple):
    """A stretch of a secret in the clear: the record, the first byte, and the form it takes."""

    record: str
    offset: int
    form: str


class Transcript:
    """Everything that a party was shown, in order.

    >>> transcript = Transcript()
    >>> transcript.record("message", b"in front of " + bytes(range(100, 120)))
    >>> transcript.find(bytes(range(100, 120)))
    [Finding(record='message', offset=12, form='bytes')]
    """

    def __init__(self):
        self.records: list[tuple[str, bytes]] = []

    def __repr__(self) -> str:
        return f"<Transcript of {len(self.records)} records, {sum(len(data) for _, data in self.records)} bytes>"

    def record(self, name: str, data: bytes) -> None:
        """Keep a copy of data that is received or held."""
        self.records.append((name, bytes(data)))

    def find(self, secret: bytes, *, known: bytes = b"") -> list[Finding]:
        """Where stretches of a secret, such as a key, stand in the records. Bytes that are in ``known`` are public.

        Raises ValueError for fewer than 16 bytes.
        """
        return self._search([("bytes", secret)], known)

    def find_values(self, values: np.ndarray, scale: float = 1.0) -> list[Finding]:
        """Where stretches of one hospital's integers int64 (d,) stand in the records, in any of ``encodings``."""
        return self._search(encodings(values, scale))

    def _search(self, forms: Iterable[tuple[str, bytes]], known: bytes = b"") -> list[Finding]:
        wanted = {}
        for form, data in forms:
            if len(data) < WINDOW:
                raise ValueError(f"{len(data)} bytes as {form} are too few to search for: give at least {WINDOW}")
            for i in range(0, len(data) - WINDOW + 1, _STEP):
                window = data[i : i + WINDOW]
                if len(set(window)) >= 4 and window not in known:  # zeros stand everywhere and show nothing
                    wanted.setdefault(window, form)
        firsts = np.array([int.from_bytes(window[:8], "little") for window in wanted], np.uint64)
        found = []
        for name, data in self.records:
            end = -1  # one finding per stretch
            for i in np.flatnonzero(np.isin(_words(data), firsts)).tolist():
                form = wanted.get(data[i : i + WINDOW])
                if form is not None:
                    if i > end:
                        found.append(Finding(name, i, form))
                    end = i + WINDOW
        return found


def encodings(values: np.ndarray, scale: float = 1.0) -> Iterator[tuple[str, bytes]]:
    """The plausible forms of integers (d,), or of the floats values / scale, in memory, a message or a text."""
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
    """The 8 bytes from each offset on, as uint64 (len - 7,)."""
    if len(data) < 8:
        return np.empty(0, np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    return np.ascontiguousarray(rows).view("<u8")[:, 0]
