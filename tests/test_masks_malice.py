"""Thousands of random malicious servers and hospitals against sums by masks: what do they learn, and can they spoil?

The adversary is the server with some hospitals, fewer than 2t - n. It tells hospitals different models and lists of the
invited, leaves out and exchanges deliveries, names different survivors, and its hospitals vouch for anything. What it
knows is then counted, not guessed: which shares it holds, so which seeds and keys it can rebuild, so which masks are
left in the honest hospitals' messages. Combinations of these messages in which all unknown masks cancel are the
left null space of a small matrix; masks are streams of a cipher, so it learns nothing else. There must be at most
one such combination, a plain sum of at least t - colluders honest hospitals at one model (``masks`` has the argument).
"""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from mask_rounds import some_values

from dopamine_lib.encryption import mask_hospital
from dopamine_lib.encryption.mask_hospital import MaskHospital
from dopamine_lib.encryption.masking import (
    BOX_BYTES,
    CARD,
    DELIVERY,
    MASKED,
    REVEAL,
    SHARES,
    SURVIVORS,
    VOUCH,
    VOUCH_BYTES,
    VOUCHED,
    threshold,
)
from dopamine_lib.encryption.masks import MaskSum
from dopamine_lib.encryption.messages import SERVER, AggregationAborted, MessageError, cut, pack_numbers
from dopamine_lib.encryption.shamir import SHARE_BYTES

REFUSED = (MessageError, AggregationAborted)
RUNS, D = 2000, 3


@dataclass
class Adversary:
    """What it knows after a round, by hospital. ``shares["key"][i]`` are the holders whose share of i's key it has."""

    colluders: set[int]
    masked: dict[int, set[int]] = field(default_factory=dict)  # whose pair masks are in an honest message
    model: dict[int, bytes] = field(default_factory=dict)
    shares: dict[str, dict[int, set[int]]] = field(default_factory=lambda: {"key": {}, "seed": {}})

    def has(self, kind, i, needed):
        return len(self.shares[kind].get(i, ())) >= needed

    def learned(self, needed):
        """Combinations of honest values that it can compute: a basis (dimension, honest), and the honest, in order."""
        honest, columns = sorted(self.masked), {}
        for i in honest:
            if not self.has("seed", i, needed):
                columns[i] = {i: 1}
            for j in self.masked[i] - self.colluders:
                if not self.has("key", i, needed) and not self.has("key", j, needed):
                    columns.setdefault((min(i, j), max(i, j)), {})[i] = 1 if i < j else -1
        masks = np.array([[column.get(i, 0) for i in honest] for column in columns.values()], float)
        if not len(masks):
            return np.eye(len(honest)), honest
        _, sizes, basis = np.linalg.svd(masks)
        return basis[np.sum(sizes > 1e-9) :], honest


def attack(masks, rng, number, colluders, enough):
    """One round of a malicious server with these hospitals; ``enough`` survivors are asked for."""
    everybody, links = range(len(masks.hospitals)), masks.server._links
    honest, known = [i for i in everybody if i not in colluders], Adversary(set(colluders))
    ways = {
        way for way in ("models", "lists", "left out", "exchanged", "mixed", "short", "wrong") if rng.random() < 0.4
    }

    def now(way, chance=1.0):
        return way in ways and rng.random() < chance

    # step 1: models and lists of the invited
    lists = [tuple(everybody), tuple(i for i in everybody if i != rng.choice(everybody))]
    others_told = {i: (b"other" if now("models", 0.1) else b"model", lists[now("lists", 0.1)]) for i in everybody}
    sent, boxes = {}, {}
    for i in everybody:
        known.model[i], invited = others_told[i]
        try:
            body = links[i].open(SHARES, number, masks.hospitals[i].share(number, invited, known.model[i]))
        except (*REFUSED, ValueError):  # not invited, as it was told
            continue
        sent[i] = body[: CARD.size]
        holders = [j for j in invited if j != i]
        boxes |= {(i, j): box for j, box in zip(holders, cut(body[CARD.size :], BOX_BYTES), strict=True)}
    # step 2: deliveries, of which some are left out and some cards exchanged
    for j in list(sent):
        entries = [(i, sent[i], boxes[i, j]) for i in sent if (i, j) in boxes and not now("left out", 0.08)]
        if now("exchanged", 0.05) and entries:
            i, _, box = entries[-1]
            entries[-1] = (i, sent[rng.choice(list(sent))], box)
        told = links[j].seal(DELIVERY, number, b"".join(card + box for _, card, box in entries))
        try:
            masked = masks.hospitals[j].mask(told, np.zeros(D, np.int64))
        except REFUSED:
            continue
        links[j].open(MASKED, number, masked)
        if j in honest:
            known.masked[j] = {i for i, *_ in entries}
    for i, j in boxes:  # what was sealed for a colluder is open, delivered or not
        if j in colluders:
            for kind in known.shares.values():
                kind.setdefault(i, set()).add(j)
    # step 3: up to three lists of survivors, or a short one for each
    candidates = [sorted(sent)] + [sorted(i for i in sent if rng.random() < 0.7) for _ in range(2)]
    told, vouchers, short = {}, {}, now("short")
    for i in known.masked:
        told[i] = tuple(candidates[rng.randrange(3) if now("mixed", 0.5) else 0])
        if short:
            others = rng.sample(sorted(sent.keys() - {i}), min(enough, len(sent)) - 1)
            told[i] = tuple(sorted({i, *others}))
        try:
            vouched = masks.hospitals[i].confirm(links[i].seal(SURVIVORS, number, pack_numbers(told[i])))
        except REFUSED:
            continue
        others = [j for j in told[i] if j != i]
        body = links[i].open(VOUCH, number, vouched)
        vouchers |= {(i, j): box for j, box in zip(others, cut(body, VOUCH_BYTES), strict=True)}
    # step 4: whoever was told the same vouches for it, colluders for anything
    for i in known.masked:
        hospital, passed = masks.hospitals[i], []
        for j in told[i]:
            if j in colluders and i in masks.hospitals[j]._links:
                bound = pack_numbers(told[i]) + known.model[i]
                passed.append(masks.hospitals[j]._links[i].seal(VOUCH, number, b"", bound))
            elif (j, i) in vouchers and (told[j] == told[i] or now("wrong", 0.1)):
                passed.append(vouchers[j, i])
        held = dict(hospital._held or {})
        try:
            opened = hospital.reveal(links[i].seal(VOUCHED, number, b"".join(passed)))
        except REFUSED:
            continue
        pieces = set(cut(links[i].open(REVEAL, number, opened), SHARE_BYTES))
        for owner, pair in held.items():
            for kind, share in zip(("key", "seed"), pair, strict=True):
                if share in pieces:
                    known.shares[kind].setdefault(owner, set()).add(i)
    return known


def campaign(seed, runs):
    """Attacks of all kinds; returns how often something was learned as it may be, and what else was, if anything."""
    rng, sessions, sums, faults = random.Random(seed), {}, 0, []
    for number in range(runs):
        hospitals = rng.randint(3, 6)
        least = rng.randint(2, hospitals)
        masks = sessions.setdefault((hospitals, least), MaskSum(hospitals, D, least=least))
        needed = threshold(hospitals, least)
        # what hospitals themselves take for enough; with an untouched library the same
        enough = mask_hospital.threshold(hospitals, least)
        colluders = rng.sample(range(hospitals), rng.randint(0, min(2 * needed - hospitals - 1, hospitals - 2)))
        known = attack(masks, rng, number, colluders, enough)
        basis, honest = known.learned(enough)
        if not len(basis):
            continue
        total = basis[0] / np.abs(basis[0]).max()
        inside = [i for i, weight in zip(honest, total, strict=True) if abs(weight) > 1e-9]
        plain = np.ptp(total[np.abs(total) > 1e-9]) < 1e-9
        if len(basis) > 1 or not plain or len(inside) < needed - len(colluders):
            faults.append("finer than one sum")
        elif len({known.model[i] for i in inside}) > 1:
            faults.append("a sum over two models")
        else:
            sums += 1
    return sums, faults


@pytest.mark.slow
def test_thousands_of_malicious_servers_learn_one_sum_at_most():
    sums, faults = campaign(1, RUNS)
    assert faults == [] and RUNS / 5 < sums < RUNS


def without_vouchers(self, message):
    """Step 4 as it would be without step 3."""
    self._enter("reveal")
    held, self._held = self._held, None
    shares = [seed if i in self._survivors else key for i, (key, seed) in sorted(held.items())]
    return self._links[SERVER].seal(REVEAL, self._round, b"".join(shares))


def both_kinds(self, message):
    """Step 4, with both shares of everybody."""
    self._enter("reveal")
    shares = [piece for pair in self._held.values() for piece in pair]
    return self._links[SERVER].seal(REVEAL, self._round, b"".join(shares))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no vouchers", "both kinds of share", "half is enough", "no model in the seals"])
def test_a_planted_fault_is_found(fault, monkeypatch):
    sound = MaskHospital.share
    if fault == "no vouchers":
        monkeypatch.setattr(MaskHospital, "reveal", without_vouchers)
    elif fault == "both kinds of share":
        monkeypatch.setattr(MaskHospital, "reveal", both_kinds)
    elif fault == "half is enough":
        monkeypatch.setattr(mask_hospital, "threshold", lambda invited, least: max(2, invited // 2))
    else:
        monkeypatch.setattr(MaskHospital, "share", lambda self, number, invited, model: sound(self, number, invited))
    _, faults = campaign(2, RUNS // 8)
    assert ("a sum over two models" if fault == "no model in the seals" else "finer than one sum") in faults


@pytest.mark.slow
def test_hospitals_that_lie_about_shares_spoil_no_total_and_accuse_nobody():
    """With enough right shares the total is right and the liars are named; else nothing is opened."""
    rng, masks, opened = random.Random(3), MaskSum(5, D), 0
    for number in range(RUNS // 8):
        server, hospitals, values = masks.server, masks.hospitals, some_values(range(5), D, number)
        liars = set(rng.sample(range(5), rng.randint(0, 3)))
        server.begin(number, range(5))
        for hospital in hospitals:
            server.receive(hospital.share(number, range(5)))
        for i, told in server.deliveries().items():
            if i < 4 or rng.random() < 0.5:
                server.receive(hospitals[i].mask(told, values[i]))
        survivors = server.survivors()
        for i, told in survivors.items():
            server.receive(hospitals[i].confirm(told))
        liars &= set(survivors)
        for i, told in server.confirmations().items():
            if i in liars:
                wrong = rng.sample(sorted(hospitals[i]._held), rng.randint(1, 3))
                for owner in wrong:
                    hospitals[i]._held[owner] = tuple(rng.randbytes(SHARE_BYTES) for _ in range(2))
            server.receive(hospitals[i].reveal(told))
        try:
            total = server.total()
        except MessageError:
            assert len(survivors) - len(liars) < 3
            continue
        opened += 1
        assert (total == sum(values[i] for i in survivors)).all() and server.liars <= liars
    assert opened > RUNS // 16
