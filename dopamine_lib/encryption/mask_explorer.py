"""Masks that cancel, and what a hospital that vanishes leaves behind: one value each of four hospitals, as a picture.

Key pairs, seeds, streams and Shamir's shares are the protocol's own (``masks``), fresh in every call; ``MaskSum`` sends
the same as sealed messages.
"""

import itertools
import os
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from matplotlib.figure import Figure

from dopamine_lib.encryption.masking import add_masks, pair_seed, threshold
from dopamine_lib.encryption.shamir import reconstruct, share
from dopamine_lib.errors import check_within
from dopamine_lib.pictures import BLACK, GREY, LIGHT_GREY, RED

HOSPITALS = 4
VALUES = (12, -5, 30, 7)
#: What each step adds to the picture.
STEPS = ("what each hospital has", "what it sends: its value and its masks", "what the server adds up", "the recovery")
_PLUS, _MINUS = "#cfe3f5", "#fbe3d0"


@dataclass(frozen=True)
class MaskedRound:
    """One round of four hospitals, uint32 modulo 2^32.

    masks    (K, 7) what each hospital adds: its part of the six pairs' streams, and the stream of its own seed
    sent     (K,) each hospital's message
    arrived  who is in the sum
    rebuilt  (7,) what the server takes off again, from secrets that the survivors' shares open
    total    the survivors' sum
    """

    masks: np.ndarray
    sent: np.ndarray
    arrived: tuple[int, ...]
    rebuilt: np.ndarray
    total: int


PAIRS = tuple(itertools.combinations(range(HOSPITALS), 2))


def masked_round(gone: int | None = None) -> MaskedRound:
    """A round in which hospital ``gone`` (from 0; None for nobody) vanishes after the shares were dealt.

    Raises InputError for a hospital that is not there.

    >>> masked_round().total, masked_round(gone=2).total  # 12 - 5 + 30 + 7, and without the 30
    (44, 14)
    """
    if gone is not None:
        check_within("the hospital that vanishes", gone, 0, HOSPITALS - 1, "there are four", low_open=False)
    everybody, t = range(HOSPITALS), threshold(HOSPITALS, 2)
    keys, seeds = [X25519PrivateKey.generate() for _ in everybody], [os.urandom(32) for _ in everybody]
    key_shares = [share(key.private_bytes_raw(), everybody, t) for key in keys]
    seed_shares = [share(seed, everybody, t) for seed in seeds]
    masks = np.stack([_masks(keys[i], seeds[i], i, keys) for i in everybody])
    sent = np.array(VALUES, np.int64).astype(np.uint32) + masks.sum(axis=1, dtype=np.uint32)
    arrived = tuple(i for i in everybody if i != gone)
    rebuilt = np.zeros(len(PAIRS) + 1, np.uint32)
    for i in arrived:  # the survivors' own streams
        seed = reconstruct({j: seed_shares[i][j] for j in arrived}, t)
        rebuilt[-1:] += _stream(seed)
    if gone is not None:  # what the dropout would have cancelled: minus its own part
        key = X25519PrivateKey.from_private_bytes(reconstruct({j: key_shares[gone][j] for j in arrived}, t))
        rebuilt[:-1] -= _masks(key, bytes(32), gone, keys)[:-1]
    total = sent[list(arrived)].sum(dtype=np.uint32) - rebuilt.sum(dtype=np.uint32)
    return MaskedRound(masks, sent, arrived, rebuilt, int(np.int32(total)))


def _stream(seed: bytes) -> np.ndarray:
    stream = np.zeros(1, np.uint32)
    add_masks(stream, [(seed, True)])
    return stream


def _masks(key: X25519PrivateKey, seed: bytes, i: int, keys: list[X25519PrivateKey]) -> np.ndarray:
    """What hospital i adds (7,), from its private key and everybody's public ones: 0 for the pairs it is not in."""
    row = np.zeros(len(PAIRS) + 1, np.uint32)
    for column, pair in enumerate(PAIRS):
        if i in pair:
            other = sum(pair) - i
            public = keys[other].public_key().public_bytes_raw()
            add_masks(row[column : column + 1], [(pair_seed(key, public, 0, (i, other)), i < other)])
    row[-1:] = _stream(seed)
    return row


def draw_masks(gone: int | None = None, step: int = 4) -> Figure:
    """``masked_round`` as a table up to one of ``STEPS``: a row for each hospital, a column for each mask.

    What is added is on blue, what is subtracted hatched. Raises InputError as that does, and for another step.
    """
    check_within("step", step, 1, len(STEPS), "there are four", low_open=False)
    seen = masked_round(gone)
    columns = ["value", *(f"pair {i + 1}, {j + 1}" for i, j in PAIRS), "own mask", "sent"]
    figure = Figure(figsize=(10.4, 3.1))
    axes = figure.add_axes((0, 0, 1, 0.88))
    axes.set(xlim=(-1.25, len(columns)), ylim=(6.1, -0.8))
    axes.set_axis_off()
    for x, name in enumerate(columns):
        axes.text(x + 0.5, -0.4, name, ha="center", va="center", fontsize=8, weight="bold")
    for i in range(HOSPITALS):
        here = i in seen.arrived or step < 3
        colour = BLACK if here else GREY
        label = f"hospital {i + 1}" if here else f"hospital {i + 1}\nvanished"
        axes.text(-1.2, i + 0.5, label, va="center", fontsize=8, color=colour, weight="bold")
        _cell(axes, 0, i, f"{VALUES[i]}", colour)
        if step < 2:
            continue
        for x, mask in enumerate(seen.masks[i]):
            if x == len(PAIRS) or i in PAIRS[x]:
                plus = x == len(PAIRS) or i == PAIRS[x][0]
                size = int(mask) if plus else -int(mask) % 2**32
                _cell(axes, x + 1, i, f"{'+' if plus else '−'}{size:,}", colour, plus if here else None)
        _cell(axes, len(columns) - 1, i, f"{seen.sent[i]:,}" if here else "", colour)
    if step >= 3:
        arrived = list(seen.arrived)
        left = [sum(VALUES[i] for i in arrived), *map(int, seen.masks[arrived].sum(axis=0, dtype=np.uint32))]
        _row(axes, 4, "sum", left, int(seen.sent[arrived].sum(dtype=np.uint32)))
    if step >= 4:
        _row(axes, 5, "rebuilt,\ntaken off", [None, *map(int, seen.rebuilt)], seen.total)
    what = f"{step}. {STEPS[step - 1]}" + (" (modulo $2^{32}$)" if step > 1 else "")
    figure.text(0.02, 0.93, what, fontsize=10, va="center")
    figure.set_label(_in_words(seen, gone, step))
    return figure


def _cell(axes, x: int, y: int, text: str, colour: str, plus: bool | None = None, edge: str = LIGHT_GREY) -> None:
    from matplotlib.patches import Rectangle

    fill = {None: "white", True: _PLUS, False: _MINUS}[plus]
    style = dict(facecolor=fill, edgecolor=edge, linewidth=1.8 if edge == RED else 0.8)
    axes.add_patch(Rectangle((x + 0.03, y + 0.08), 0.94, 0.84, linestyle="--" if plus is False else "-", **style))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=colour)


def _row(axes, y: int, name: str, masks: list[int | None], sent: int) -> None:
    """A row of sums: what does not cancel has a heavy frame."""
    axes.text(-1.2, y + 0.5, name, va="center", fontsize=8, weight="bold")
    for x, mask in enumerate(masks):
        if mask is not None:
            _cell(axes, x, y, f"{mask:,}", BLACK, edge=RED if x and mask else LIGHT_GREY)
    _cell(axes, len(masks), y, f"{sent:,}", BLACK)


def _in_words(seen: MaskedRound, gone: int | None, step: int) -> str:
    told = [f"A table of four hospitals with the values {', '.join(map(str, VALUES))}"]
    if step >= 2:
        told.append("each adds or subtracts a random mask for every other hospital, and adds one of its own")
    if step >= 3:
        left = int(np.count_nonzero(seen.masks[list(seen.arrived)].sum(axis=0, dtype=np.uint32)[:-1]))
        told.append("the pairs' masks cancel" if gone is None else f"hospital {gone + 1} vanished: {left} masks stay")
    if step >= 4:
        told.append(f"the server takes off what the survivors' shares rebuild, and has the total {seen.total}")
    return "; ".join(told) + "."
