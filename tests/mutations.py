"""Shared by the fuzzing tests: seeded damage to bytes and to JSON, and what may come of it."""

import copy
import json
import random
import signal
from contextlib import contextmanager

MUTATIONS = 300
#: Seconds of processor time that reading one damaged thing may take: no clock on the wall, so no load can fail a test.
PATIENCE = 20
_WORDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\x01\0\0\0\0\0\0\0", b"\xff" * 8)
_ODD = (None, True, -1, 0, 1.5, 2**70, -(2**70), "x", "", [], {}, float("nan"), 1e308, [1] * 3, "../../etc/passwd")


def mutated(rng: random.Random, data: bytes, others: list[bytes] = ()) -> bytes:
    """``data`` with one to five changes: bits, bytes, cuts, insertions, repeats, extreme numbers, parts of others."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        end = len(data) if rng.random() < 0.5 else min(400, len(data))  # headers are where it matters
        kind, at = rng.randrange(10), rng.randrange(max(1, end))
        if kind <= 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and data:
            data[at] = rng.randrange(256)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 30))
        elif kind == 5:
            del data[at : at + rng.randint(1, 50)]
        elif kind == 6:
            word = rng.choice(_WORDS)
            data[at : at + len(word)] = word
        elif kind == 7:
            data[at : at + 20] = data[rng.randrange(max(1, len(data))) :][:20]
        elif kind == 8 and others:
            data[at:] = rng.choice(others)[at:]
        elif others:
            data[:] = rng.choice(others)
    return bytes(data)


def changed(rng: random.Random, value: object) -> object:
    """JSON's ``value`` with one change, somewhere within."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, value = rng.choice(list(value)), copy.copy(value)
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = changed(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, value = rng.randrange(len(value)), list(value)
        value[at] = changed(rng, value[at])
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((value + 1, value - 1, -value, value * 1000, 0, 2**31, value * 2))
    return rng.choice(_ODD)


def changed_text(rng: random.Random, text: str) -> str:
    """A JSON text with one or two values changed, its bytes damaged, or nested too deep."""
    kind = rng.random()
    if kind < 0.7:
        value = changed(rng, json.loads(text))
        return json.dumps(changed(rng, value) if kind < 0.2 else value)
    if kind < 0.72:
        return "[" * 100_000
    return mutated(rng, text.encode()).decode(errors="surrogateescape" if kind < 0.75 else "replace")


@contextmanager
def limited():
    """Raise TimeoutError in whatever takes more than ``PATIENCE`` seconds of processor time."""

    def stop(number, frame):
        raise TimeoutError(f"more than {PATIENCE} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
