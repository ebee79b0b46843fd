"""Parties over threads and over gRPC: equal models, hospitals that vanish, come back or lie, a server that dies."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from wire_runs import Run, note_totals

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation import settings
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.wires import party
from dopamine_lib.federation.wires.wire import UP

K, EPOCHS, ROUNDS = 4, 10, 20
KINDS = ("plain", "bfv", "masks")


@pytest.fixture(scope="module")
def options(tmp_path_factory, make_aptos):
    """Options of a quick experiment: 60 small images, a random backbone."""
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    terms = dict(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=K, seed=5, runs=1)
    return terms | {"settings": ("FSCDP",)}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two rounds an epoch; no accounting, which other tests have and which takes most of the time."""
    sound = settings.SETTINGS["FSCDP"]
    monkeypatch.setitem(settings.SETTINGS, "FSCDP", replace(sound, rounds=ROUNDS, epochs=EPOCHS))

    def assembled(experiment, begun, records, account, **more):
        return {"settings": {name: {**record, "statement": "none"} for name, (record,) in records.items()}}

    monkeypatch.setattr(party, "assemble", assembled)


@pytest.fixture
def noted(monkeypatch):
    """Makes a run whose totals are noted."""
    runs = []
    note_totals(monkeypatch, lambda: runs[-1])

    def make(*arguments, **more):
        runs.append(Run(*arguments, **more))
        return runs[-1]

    return make


def ups_of(victim, nth, life=0):
    """Whether hospital ``victim`` sends its ``nth`` message of a round, counted over all rounds."""
    sent = []

    def doomed(number, own_life, message):
        if (number, own_life) != (victim, life) or message[0] != UP or len(message) == 34:
            return False
        sent.append(number)
        return len(sent) > nth

    return doomed


def model(folder):
    return load_file(folder / str(SERVER) / "FSCDP-0.safetensors")


def check_whole(run):
    """The run has ended, with everything charged, and no total of fewer than are needed was opened."""
    assert run.results is not None, (run.said, run.errors)
    result = run.results["settings"]["FSCDP"]
    least = run.plan.least_in_a_total
    assert run.included and all(len(hospitals) >= least for _, _, hospitals in run.included)
    by_round = {}
    for _, number, hospitals in run.included:
        assert by_round.setdefault(number, hospitals) == hospitals, "hospitals opened different totals of one round"
    assert result["charged"] == [run.plan.setting.steps]
    return result


@pytest.mark.parametrize("wired", [False, True], ids=["threads", "gRPC"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_the_ledger_are_those_of_one_process(kind, wired, options, tmp_path, noted):
    run = noted(options | {"aggregation": kind}, tmp_path, wired=wired).run()
    result = check_whole(run)
    assert not run.errors and not any("left" in line for line in run.said)
    experiment = Experiment.load(Options(**options | {"aggregation": kind}), progress=False)
    training = experiment.training("FSCDP").run()
    training.task.load(training.server.model)
    assert training.ledgers[0].charged == result["charged"][0] == ROUNDS
    for key, value in training.task.net.state_dict().items():
        assert np.allclose(model(tmp_path)[key], value.numpy(), rtol=0, atol=1e-6)
    assert (
        result["charged_steps"] == [ledger.charged for ledger in training.ledgers] if "charged_steps" in result else 1
    )


#: Of each protocol the steps in which a hospital can vanish: before it sends anything, and after each message.
STEPS = [("plain", 0), ("bfv", 0), ("masks", 0), ("masks", 1), ("masks", 2), ("masks", 3)]


@pytest.mark.parametrize("kind, step, wired", [*((*one, False) for one in STEPS), ("masks", 2, True)])
def test_a_hospital_that_dies_in_any_step_leaves_the_round_to_the_others_and_comes_back(
    kind, step, wired, options, tmp_path, noted
):
    """In round 4 of 20 it dies before one of its messages; it is started again, and is in later totals."""
    each = 4 if kind == "masks" else 1
    run = noted(
        options | {"aggregation": kind, "least": 2}, tmp_path, doomed=ups_of(1, each * 4 + step), back=0.0
    ).run()
    check_whole(run)
    assert not run.errors and run.lives[1] == 1
    died = {number: hospitals for _, number, hospitals in run.included}
    # masks: whoever dies after its values have arrived is in the total, which is opened without it
    assert died[4] == ((0, 1, 2, 3) if step > 1 else (0, 2, 3))
    assert died[ROUNDS - 1] == (0, 1, 2, 3), "it came back"
    (line,) = [line for line in run.said if line.startswith("hospital 1 ")]
    assert line in (
        "hospital 1 was killed",
        "hospital 1 was started again",
        "hospital 1 has had no connection for 0.5 s",
    )
    assert any(line == "the session is over: hospital 1 is back" for line in run.said)
    assert not run.charged(1) and not list(tmp_path.glob("*/runs/*hospital*")), "all have done their part"
