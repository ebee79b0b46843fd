"""Totals between processes against a server that cheats: one model and one list of hospitals for all, or no total."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from dopamine_lib.encryption.bfv_sum import BfvSum, set_up
from dopamine_lib.encryption.masks import MaskSum
from dopamine_lib.encryption.messages import SERVER, AggregationAborted, MessageError, pack_numbers
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.wires import agreement, sums
from dopamine_lib.federation.wires.threads import Threads
from dopamine_lib.federation.wires.wire import DONE, SessionOver

HOSPITALS = 3

D, ALL, ROUNDS = 40, list(range(HOSPITALS)), 4


def all_parties(do, numbers=None):
    """``do(wire)`` at every party at once, over threads: what it returned, or the text of its refusal."""
    found = Threads(HOSPITALS).run(do, numbers)
    return {k: f"{type(one).__name__}: {one}" if isinstance(one, Exception) else one for k, one in found.items()}


def plan_of(kind):
    return Plan(SETTINGS["FSCDP"], CHOICES["head"]["FSCDP"], (16,) * HOSPITALS, D, aggregation=kind)


def rounds(kind, cheat=lambda server: None, start=lambda number: b"one state"):
    """What every party gets out of some rounds in which hospital k sends (k + 1) / 10 everywhere; "cheat" may change
    the server's side."""
    plan, totals = plan_of(kind), {}
    unit = 1 / plan.codec.decode(np.ones(1, np.int64))[0]  # integers in 1.0

    def party(end):
        side = sums.make_wire_aggregation(plan, end)
        if end.number == SERVER:
            cheat(side)
        else:
            side.follow(start(end.number))
        for number in range(1, 1 + ROUNDS):
            own = {end.number: np.full(D, round((end.number + 1) / 10 * unit))} if end.number in ALL else {}
            total = side.total(number, ALL, own)
            totals[end.number, number] = total
        return "all rounds"

    return all_parties(party), totals


@pytest.mark.parametrize("kind", ["plain", "bfv", "masks"])
def test_honest_parties_get_every_total(kind):
    said, totals = rounds(kind)
    assert set(said.values()) == {"all rounds"}
    assert all(totals[k, ROUNDS].numpy() == pytest.approx(0.6, abs=0.01) for k in ALL)


def tell_one_the_truth(side):
    """To hospital 2 the total, to all others one after which their gradients vanish (Pasquini et al. 2022)."""
    sound = side.wire.send

    def send(peer, kind, body):
        if kind == sums.TOTAL and peer != 2:
            body = body[: 2 * (1 + HOSPITALS)] + np.full(D, 1e20, "<f4").tobytes()
        sound(peer, kind, body)

    side.wire.send = send


def test_hospitals_that_were_told_different_totals_mask_nothing_more():
    """The masked sum of the next round would have been hospital 2's update."""
    said, totals = rounds("masks", tell_one_the_truth)
    assert (totals[0, 1] == 1e20).all() and (totals[2, 1] < 1).all()
    assert not any(number > 1 for _, number in totals)
    refused = [text for number, text in said.items() if text.startswith("MessageError")]
    assert refused and all("another model" in text for text in refused)
    assert "all rounds" not in said.values()


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_hospitals_that_start_from_different_states_open_nothing(kind):
    said, totals = rounds(kind, start=lambda number: b"another" if number == 1 else b"one state")
    assert not any(party != SERVER for party, _ in totals) and "all rounds" not in said.values()
    assert any("another model" in text or "different models" in text for text in said.values())


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_the_faults_put_back_go_unnoticed(kind, monkeypatch):
    monkeypatch.setattr(sums._Side, "follow", lambda self, content: None)
    if kind == "masks":
        said, _ = rounds("masks", tell_one_the_truth)
    else:
        said, _ = rounds(kind, start=lambda number: b"another" if number == 1 else b"one state")
    assert set(said.values()) == {"all rounds"}


def leave_one_out(side):
    """Hospital 1's message is not added, and the list of the rest is the truth."""
    server, side._enough = side.server, lambda *arguments: None
    server.least = 2
    if hasattr(server, "add"):
        add = server.add
        server.add = lambda message: None if message[6:8] == b"\1\0" else add(message)
    else:
        survivors = server.survivors

        def fewer():
            server._from.pop(1)
            return survivors()

        server._needed = 2
        server.survivors = fewer


@pytest.mark.parametrize("kind, compared", [("bfv", True), ("masks", True), ("bfv", False)])
def test_hospitals_compare_who_is_in_a_total_with_who_was_invited(kind, compared, monkeypatch):
    """With two of three enough for a total, as in F and FPDP, the server could leave one out unnoticed."""
    monkeypatch.setattr(Plan, "least_in_a_total", 2)
    if not compared:
        monkeypatch.setattr(sums._Side, "_check", lambda *arguments: None)
    said, totals = rounds(kind, leave_one_out)
    opened = [k for k in ALL if (k, 1) in totals]
    if compared:
        assert not opened and any("the server left some out" in text for text in said.values())
    else:
        assert opened == ALL and totals[0, 1].numpy() == pytest.approx(0.4, abs=0.01)  # taken for all three's


@pytest.mark.parametrize("context", [b"", b"model"])
def test_masks_and_ciphertexts_are_bound_to_a_context(context):
    values = {k: np.full(D, k + 1) for k in ALL}
    hospitals, server = set_up(HOSPITALS, D)
    server.begin(0)
    for k in ALL:
        server.add(hospitals[k].message(0, values[k], context))
    aggregate = server.aggregate()
    assert (hospitals[0].open(0, aggregate, context).total == 6).all()
    with pytest.raises(MessageError, match="different models"):
        hospitals[1].open(0, aggregate, context + b"!")
    masks = MaskSum(HOSPITALS, D)
    masks.server.begin(0, ALL)
    for k in ALL:
        masks.server.receive(masks.hospitals[k].share(0, ALL, context + b"!" * (k == 2)))
    deliveries = masks.server.deliveries()
    for k in ALL:
        with pytest.raises(MessageError, match="another model"):
            masks.hospitals[k].mask(deliveries[k], values[k])


def test_an_encrypted_total_is_bound_to_the_invited():
    values = {k: np.full(D, k + 1) for k in (0, 1)}
    bfv = BfvSum(HOSPITALS, D)
    assert (bfv.sum(0, ALL, values) == 3).all()
    sent = bfv.hospitals[0].message

    def otherwise(number, own, context):
        return sent(number, own, context[:-2])

    bfv.hospitals[0].message = otherwise
    with pytest.raises(MessageError, match="lists of the invited"):
        bfv.sum(1, ALL, values)


def test_the_last_totals_are_compared_too():
    """Nothing is bound to them any more: hospitals compare what stands for their models."""
    alike = all_parties(lambda end: agreement.agree_on_model(end, b"one"), ALL)
    assert set(alike.values()) == {None}
    said = all_parties(lambda end: agreement.agree_on_model(end, b"two" if end.number == 1 else b"one"), ALL)
    assert all("told them different totals" in text for text in said.values())


def test_of_hospitals_that_the_server_keeps_out_masks_open_nothing():
    """With ``least`` 2 a session of two out of five had a total, where the statement says that three must collude."""
    plan = replace(plan_of("masks"), sizes=(16,) * 5, least=2)
    threads = Threads(5, needed=2, gather=0.0)

    def party(number):
        wire = threads.connect(number)
        side = sums.make_wire_aggregation(plan, wire)
        return side.total(1, list(range(5)), {} if number == SERVER else {number: np.full(D, number)})

    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(party, number) for number in (3, 4, SERVER)]
    assert isinstance(ends[0].exception(), AggregationAborted) and isinstance(ends[2].exception(), SessionOver)
    assert sums.fewest(plan) == 3 and sums.fewest(replace(plan, aggregation="plain")) == 2


def test_a_server_cannot_escape_the_comparison_by_calling_everybody_else_gone():
    """It had told each hospital that it alone is present, whose model was then compared with nobody's."""

    def party(wire, fewest):
        if wire.number != SERVER:
            wire.fewest = fewest
            wire.barrier()
            return agreement.agree_on_model(wire, b"%d" % wire.number)
        for k, _ in wire.arrivals(ALL, DONE):
            wire.send(k, DONE, pack_numbers([k]))

    said = {k: one for k, one in all_parties(lambda wire: party(wire, fewest=2)).items() if k in ALL}
    assert any("of which 2 must be: it is refused" in str(text) for text in said.values()) and None not in said.values()
    planted = all_parties(lambda wire: party(wire, fewest=1))
    assert set(planted.values()) == {None}, "without the bound three models pass for one"


@pytest.mark.parametrize("kind", ["bfv", "masks"])
@pytest.mark.parametrize("hospitals, invites", [(2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (10, 5)])
def test_without_noise_no_hidden_total_of_fewer_than_three_is_opened(kind, hospitals, invites, refuses):
    """Of two hospitals each would subtract its own message from the total and have the other's."""
    terms = dict(choice=CHOICES["head"]["F"], sizes=(16,) * hospitals, d=D, aggregation=kind)
    if invites < 3:
        with refuses("F has no noise", f"{invites} of {hospitals}", "more hospitals"):
            Plan(SETTINGS["F"], **terms)
    else:
        assert Plan(SETTINGS["F"], **terms).least_in_a_total == 3
    assert Plan(SETTINGS["F"], **terms | {"aggregation": "plain"}).least_in_a_total == 1
    if hospitals > 2:
        noised = replace(SETTINGS["FPDP"])
        assert Plan(noised, **terms | {"choice": CHOICES["head"]["FPDP"]}).least_in_a_total == 2
