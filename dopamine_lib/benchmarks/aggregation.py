"""``bench aggregation``: seconds and bytes of secure sums per hospital and round, all layouts and peers in one run."""

import statistics
from os import PathLike

import numpy as np

from dopamine_lib.benchmarks.aggregation_rounds import (
    BOUND,
    MaskedRound,
    MeasuredRound,
    NaiveRound,
    reference_decode,
    reference_encode,
    updates,
)
from dopamine_lib.benchmarks.measure import at_most, interleaved, medians, row, write
from dopamine_lib.encryption.codec import Codec

SQUEEZENET, HEAD = 725_061, 2_565  # parameters
PARTS = ("encode", "encrypt", "serialise", "read", "add", "decrypt", "decode", "round")
SEAL = ("encrypt", "add", "decrypt")


def run(
    path: str | PathLike | None = None, *, d: int = SQUEEZENET, head: int = HEAD, hospitals: int = 10, repeats: int = 3
) -> dict:
    """All rows, also written to ``path`` if one is given. Seconds and bytes are one hospital's in one round."""
    rows = [_codec_row(layout, d, hospitals, repeats) for layout in ("paper", "packed")]
    rounds = {layout: MeasuredRound(layout, d, hospitals) for layout in ("paper", "packed", "wide")}
    others = {"masks": MaskedRound(d, hospitals), "bfv_vector naively": NaiveRound(d, hospitals)}
    interleaved({**rounds, **others}, repeats)
    rows += _time_rows(rounds, others) + _size_rows(rounds | others)
    return write([*rows, _head_row(head, hospitals, repeats)], path)


def _codec_row(layout: str, d: int, hospitals: int, repeats: int) -> dict:
    """Encoding and decoding, including the Python lists that TenSEAL takes and gives, against the reference's."""
    codec = Codec(layout, hospitals=hospitals, bound=BOUND)
    (update,) = updates(d, 1)
    plain, slots = update.tolist(), codec.layout.slots(d)

    def ours():
        numbers = codec.layout.pack(codec.encode(update)).tolist()
        codec.decode(codec.layout.unpack(np.fromiter(numbers, np.int64, slots), d))

    taken = medians(interleaved({"ours": ours, "theirs": lambda: reference_decode(reference_encode(plain))}, repeats))
    ratio = taken["theirs"] / taken["ours"]
    promise = ("at least 20 times faster", ratio >= 20) if layout == "packed" else (None, None)
    name = f"encode and decode, {layout}"
    return row(name, taken["ours"], "s", "reference, in Python", taken["theirs"], ratio, *promise)


def _time_rows(rounds: dict[str, MeasuredRound], others: dict) -> list[dict]:
    paper, packed = rounds["paper"], rounds["packed"]
    rows = [row(f"{part}, paper", paper.median(part), "s") for part in PARTS]
    for layout in ("packed", "wide"):
        for part in PARTS:
            seconds, peer = rounds[layout].median(part), paper.median(part)
            promised = (layout, part) == ("packed", "encrypt")
            promise = ("ratio at most 0.35", seconds <= 0.35 * peer) if promised else (None, None)
            rows.append(row(f"{part}, {layout}", seconds, "s", "paper", peer, seconds / peer, *promise))
    for name, own in (
        ("encrypt, add and decrypt", SEAL),
        ("encrypt, add, decrypt, read and serialise", (*SEAL, "read", "serialise")),
    ):
        share = packed.outside(*own)
        rows.append(row(f"outside SEAL's {name}", share, "of a round", None, None, None, "at most 0.25", share <= 0.25))
    whole = packed.median("round")
    for name, other in others.items():
        seconds = statistics.median(other.seconds[1:])
        rows.append(row(f"round, {name}", seconds, "s", "packed", whole, seconds / whole))
    return rows


def _size_rows(measured: dict) -> list[dict]:
    rows, paper = [], measured["paper"].bytes
    for name, one in measured.items():
        promise = ("at most 5.5 MB", one.bytes <= 5.5e6) if name == "packed" else (None, None)
        rows.append(row(f"sent, {name}", one.bytes, "bytes", "paper", paper, one.bytes / paper, *promise))
    return rows


def _head_row(d: int, hospitals: int, repeats: int) -> dict:
    """A whole round of the small model, of all hospitals and the server: 3,001 of them should take under 5 minutes."""
    packed, masks = MeasuredRound("packed", d, hospitals), MaskedRound(d, hospitals)
    interleaved({"packed": packed, "masks": masks}, 10 * repeats)
    seconds, peer = hospitals * packed.median("round"), hospitals * statistics.median(masks.seconds[1:])
    return at_most(f"round of all {hospitals} hospitals, d = {d}, packed", seconds, "s", 0.09, "masks", peer)
