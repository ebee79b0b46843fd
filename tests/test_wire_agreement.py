"""Before a run between parties: one experiment for all parties, and a ledger that no hospital has lost or set back."""

import json
from dataclasses import replace

import pytest

from dopamine_lib.encryption.messages import SERVER, MessageError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.wires import agreement, party
from dopamine_lib.federation.wires.relay import who
from dopamine_lib.federation.wires.sums import read_vector
from dopamine_lib.federation.wires.threads import Threads

HOSPITALS = 3
NUMBERS = (*range(HOSPITALS), SERVER)


def all_parties(do, numbers=None):
    """``do(wire)`` at every party at once, over threads: what it returned, or the text of its refusal."""
    found = Threads(HOSPITALS).run(do, numbers)
    return {k: f"{type(one).__name__}: {one}" if isinstance(one, Exception) else one for k, one in found.items()}


@pytest.fixture(scope="module")
def make(tmp_path_factory, make_aptos):
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    terms = dict(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=HOSPITALS, seed=5, runs=1)

    def make(party=None, **changes):
        return Experiment.load(Options(**terms | {"settings": ("FSCDP",)} | changes), party=party, progress=False)

    return make


def test_parties_of_one_experiment_agree_though_each_holds_its_own_rows(make):
    own = {number: make(number) for number in NUMBERS}
    agreed = all_parties(lambda wire: agreement.agree_on_experiment(wire, own[wire.number], "FSCDP"))
    assert len(set(agreed.values())) == 1 and {type(found) for found in agreed.values()} == {bytes}


@pytest.mark.parametrize(
    "odd, changes, named",
    [
        (SERVER, {"epsilon": 1.0}, "epsilon = 1.0"),
        (1, {"seed": 6}, "seed = 6"),
        (2, {"split": "unequal"}, "split = unequal"),
        (0, {"delta": 1e-3}, "delta = 0.001"),
        (1, {"noise": "integer"}, "noise = integer"),
    ],
)
def test_a_rank_with_other_options_is_named_by_all_others(odd, changes, named, make):
    usual, other = make(), make(**changes)

    def one(wire):
        return agreement.agree_on_experiment(wire, other if wire.number == odd else usual, "FSCDP")

    for number, said in all_parties(one).items():
        # whoever has not found it when another gives up is told what that one found
        assert isinstance(said, str) and who(odd) in said and named.partition(" =")[0] in said
        assert "SessionOver" in said or number == odd or f"{who(odd)} has {named}" in said


@pytest.mark.parametrize("what", ["code", "split", "sheet"])
def test_other_code_another_split_or_data_sheet_are_found(what, make, monkeypatch):
    whole = make()
    other = {
        "code": whole,
        "split": replace(whole, split_hash="0"),
        "sheet": replace(whole, dataset=replace(whole.dataset, sheet=replace(whole.dataset.sheet, checksum="0"))),
    }[what]
    sound = agreement.terms
    monkeypatch.setattr(
        agreement, "terms", lambda it, name: sound(it, name) | ({"code": "0"} if it is other and what == "code" else {})
    )
    mine = replace(whole) if what == "code" else whole
    said = all_parties(lambda wire: agreement.agree_on_experiment(wire, other if wire.number == 1 else mine, "FSCDP"))
    assert "hospital 1 has" in said[0] and "hospital 1 has" in said[2]
    assert whole.split_hash[:8] not in "".join(map(str, said.values()))
    assert isinstance(said[SERVER], str) == (what != "split")  # what depends on patients is not the server's to know


def test_the_server_is_told_nothing_that_depends_on_a_patient(make):
    whole = make()
    text = json.dumps(agreement.terms(whole, "FSCDP"))
    assert len(whole.split_hash) == 64 and whole.split_hash not in text


def test_the_code_version_changes_with_any_source_file(tmp_path, monkeypatch):
    root = tmp_path / "dopamine_lib"
    (root / "federation" / "mpi").mkdir(parents=True)
    (root / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(agreement, "__file__", str(root / "federation" / "mpi" / "agreement.py"))
    before = agreement.code_version.__wrapped__()
    assert before == agreement.code_version.__wrapped__()
    (root / "one.py").write_text("x = 2\n")
    assert agreement.code_version.__wrapped__() != before


@pytest.mark.parametrize(
    "epochs, behind",
    [
        ([0, 0, 0], []),
        ([1, 0, 1], []),  # the first epoch was charged at some: nobody drew before all had it on disk
        ([20, 20, 19], []),
        ([19, 20, 20], []),
        ([0, 20, 20], [0]),
        ([20, 20, 0], [2]),
        ([20, 18, 18], [1, 2]),
        ([0, 2, 2], [0]),
    ],
)
def test_a_ledger_that_is_missing_or_set_back_is_refused_by_all_hospitals(epochs, behind):
    said = all_parties(lambda wire: agreement.agree_on_charge(wire, epochs[wire.number]), range(HOSPITALS))
    for found in said.values():
        if behind:
            assert "Put the files" in found and f"but others {max(epochs)}" in found
            assert all((who(k) in found) == (k in behind) for k in range(HOSPITALS))
        else:
            assert found == max(epochs)


@pytest.mark.parametrize("own, behind", [(12, False), (11, False), (10, True), (0, True)])
def test_a_hospital_that_was_away_may_be_behind_but_not_behind_what_others_saw_it_charge(own, behind):
    """Hospital 1 left in epoch 12, of which it may not have written, and the others are at 20."""

    def one(wire):
        away = wire.number == 1
        return agreement.agree_on_charge(wire, own if away else 20, {1: own} if away else {0: 20, 1: 12, 2: 20})

    said = all_parties(one, range(HOSPITALS))
    for found in said.values():
        assert (f"{who(1)} have {own} epochs" in found and "but others 12" in found) if behind else found == 20


def test_a_charge_is_read_back_for_its_own_run_only(tmp_path, refuses):
    charge = agreement.OwnCharge(tmp_path / "runs" / "own.json", {"epsilon": 1.0, "settings": ["FSCDP"]})
    assert charge.read(resume=False) == charge.read(resume=True) == 0
    charge.save(7, [0, 2])
    again = agreement.OwnCharge(charge.path, charge.asked)
    assert again.read(resume=True) == 7 and again.taken == {0: 7, 2: 7}
    with refuses("--resume"):
        charge.read(resume=False)
    with refuses("another run"):
        agreement.OwnCharge(charge.path, {"epsilon": 2.0}).read(resume=True)
    for damaged in ("", "{", "[]", '{"options": 1}', '{"options": {}, "reserved": null}'):
        charge.path.write_text(damaged)
        with refuses("cannot be read"):
            charge.read(resume=True)


@pytest.mark.parametrize("lost", [None, "checkpoint", "record of 0", "record of 2", "checkpoint set back"])
def test_hospitals_go_on_only_with_all_that_was_charged(lost, make, tmp_path):
    """Without hospital 0's checkpoint a resumed run began its ledger at 0."""
    experiment, checkpoint = make(seed=None), tmp_path / "FSCDP-0.safetensors"
    charges = [agreement.OwnCharge(tmp_path / f"{k}.json", agreement.asked(experiment)) for k in range(HOSPITALS)]
    begun = experiment.training("FSCDP")
    for epochs in (3, 20):
        begun.reserve(epochs)
        begun.progress.epoch = epochs - 1
        party.save_checkpoint(checkpoint, begun)
        if epochs == 3:
            old = checkpoint.read_bytes()
    for charge in charges:
        charge.save(20, range(HOSPITALS))
    if lost == "checkpoint":
        checkpoint.unlink()
    elif lost == "checkpoint set back":
        checkpoint.write_bytes(old)
    elif lost is not None:
        charges[int(lost[-1])].path.unlink()
    spent = begun.ledgers[0].charged
    own = {number: make(number, seed=None) for number in NUMBERS}

    def go_on(wire):
        training = party.party_training(own[wire.number], "FSCDP", wire)
        if wire.number == SERVER:
            party._go_along(training, wire)
        else:
            kept = checkpoint if wire.number == 0 else None
            party._go_on(training, wire, kept, charges[wire.number], True)
        return training.progress.reserved, training.ledgers[0].charged

    said = all_parties(go_on)
    if lost is None:
        assert set(said.values()) == {(20, spent)}
    else:
        number = 2 if lost == "record of 2" else 0
        assert all(who(number) in found and "begin anew" in found for found in said.values())


@pytest.mark.parametrize(
    "lie",
    [
        {"epoch": 21},
        {"reserved": 19, "epoch": 20},
        {"charged": [0]},
        {"epoch": -1},
        {"epoch": 10**9, "reserved": 10**9},
    ],
)
def test_nobody_goes_on_from_a_state_whose_model_is_ahead_of_its_ledger(lie, make):
    """All others had then trained without charging a step, as often as a hospital that lies begins a session."""
    ahead, other = (make(seed=None).training("FSCDP") for _ in range(2))
    ahead.reserve(20)
    ahead.progress.epoch = 20
    vectors, record = ahead.state()
    other.restore(vectors, record)
    with pytest.raises(ValueError, match="in the ledger|steps charged"):
        other.restore(vectors, record | lie)
    assert other.progress.reserved == 20 and other.ledgers[0].charged == ahead.ledgers[0].charged


class Says:
    """The wire of hospital 0 of two, of which the other and the server say ``body`` whatever is asked."""

    number, hospitals, members = 0, 2, (0, 1)

    def __init__(self, body):
        self.body = body

    def send(self, peer, kind, body):
        pass

    def receive(self, peer, kind):
        return self.body

    def arrivals(self, peers, kind):
        return [(peer, self.body) for peer in peers]

    def names(self, numbers):
        return " and ".join(map(who, numbers))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b"[" * 100_000, b"null"])
def test_what_is_no_message_of_the_kit_is_refused_with_its_sender(body, refuses):
    """Each had ended a rank with a traceback."""
    with refuses("hospital 1 ", "cannot be read"):
        agreement._compare(Says(body), {"epsilon": 1.0}, [0, 1], "start all ranks alike")
    with refuses("hospital 1 ", "no number"):
        agreement.agree_on_charge(Says(body), 3)
    with refuses("hospital 0 sends a state"):
        party._take_up(None, Says(body), 0)
    with pytest.raises(MessageError, match="the server sends . bytes|sends 100000 bytes"):
        read_vector(body, "<f4", 99, who(SERVER))
