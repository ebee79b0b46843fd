"""Parties over threads and over gRPC: equal models, hospitals that vanish, come back or lie, a server that dies."""

import random
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file
from wire_runs import Lettered, Run, Wired, note_totals

from dopamine_lib.encryption.certificates import Credentials
from dopamine_lib.encryption.links import Handshake
from dopamine_lib.encryption.messages import SERVER, MessageError
from dopamine_lib.federation import settings
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.flower.post import Lost
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.remote.service import MOST_CALLS, check_address, longest_message
from dopamine_lib.federation.wires import party
from dopamine_lib.federation.wires.hospital_end import HospitalEnd
from dopamine_lib.federation.wires.identities import make_identity, read_certificates
from dopamine_lib.federation.wires.relay import MOST_UNDELIVERED, Refused
from dopamine_lib.federation.wires.threads import LocalCalls, Threads
from dopamine_lib.federation.wires.wire import TERMS, UP, SessionOver, Silence, Wire

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


def check_same(run, options, out):
    """The run's model and ledger are those of one process with the same options."""
    result = check_whole(run)
    assert not run.errors and not any("left" in line for line in run.said), (run.said, run.errors)
    training = Experiment.load(Options(**options), progress=False).training("FSCDP").run()
    training.task.load(training.server.model)
    assert [ledger.charged for ledger in training.ledgers] == result["charged"]
    for key, value in training.task.net.state_dict().items():
        assert np.allclose(model(out)[key], value.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wired", ["", "gRPC", "letters"], ids=["threads", "gRPC", "Flower's letters"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_the_ledger_are_those_of_one_process(kind, wired, options, tmp_path, noted):
    asked = options | {"aggregation": kind}
    check_same(noted(asked, tmp_path, wired=wired).run(), asked, tmp_path)


@pytest.mark.parametrize("more", [{}, {"model": "cnn"}], ids=["head", "trajectories"])
def test_local_steps_between_parties_are_those_of_one_process(more, options, tmp_path, noted):
    """A head's on all patients in turn, and any network's on each patient's own trajectory."""
    asked = (
        options
        | {"aggregation": "masks", "local_steps": 2, "sample_rate": 0.8, "epsilon": 5.0, "accountant": "rdp"}
        | more
    )
    check_same(noted(asked, tmp_path).run(), asked, tmp_path)


#: Of each protocol the steps in which a hospital can vanish: before it sends anything, and after each message.
STEPS = [("plain", 0), ("bfv", 0), ("masks", 0), ("masks", 1), ("masks", 2), ("masks", 3)]


@pytest.mark.parametrize(
    "kind, step, wired", [*((*one, "") for one in STEPS), ("masks", 2, "gRPC"), ("masks", 2, "letters")]
)
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


#: Messages of this kind that a hospital sends for its options, split, ledger and epoch, then for the model at the end.
COMPARED = np.cumsum([0, K, K - 1, K - 1, K, K - 1])


@pytest.mark.parametrize("kind, sent", [("bfv", COMPARED[1]), ("bfv", COMPARED[2]), ("masks", COMPARED[4])])
def test_whoever_dies_while_results_are_compared_is_not_waited_for(kind, sent, options, tmp_path, noted):
    """Others wait for its message, and the server for one of theirs: it looked at that one alone."""
    compared = []

    def doomed(number, life, message):
        if (number, life, message[0]) == (1, 0, TERMS):
            compared.append(number)
        return len(compared) > sent and (number, life) == (1, 0)

    run = noted(options | {"aggregation": kind, "least": 2}, tmp_path, doomed=doomed).run()
    check_whole(run)
    assert not run.errors and run.lives[1] == 1 and "hospital 1 was killed" in run.said


def test_a_hospital_that_waits_misses_no_session_that_ended_before_it_woke():
    threads = Threads(2, patience=5.0)
    with ThreadPoolExecutor(2) as pool:
        lives = [LocalCalls(threads, number) for number in range(2)]
        joined = [pool.submit(threads.relay.join, life._number, life.instance) for life in lives]
        with threads.relay.changed:
            threads.relay.changed.wait_for(lambda: threads.relay.waiting() == [0, 1], 5.0)
            threads.relay.open(2, 0.0, 5.0, print)
            threads.relay.close("at once")
            assert threads.relay.waiting() == [0, 1]
        threads.relay.open(2, 0.0, 5.0, print)
        assert [one.result().members for one in joined] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    "wired, after",
    [("", 4 * 9), ("gRPC", 4 * 9), ("letters", 4 * 9), ("", 2)],
    ids=["threads", "gRPC", "letters", "first"],
)
def test_a_server_that_dies_is_resumed_and_hospitals_go_on(wired, after, options, tmp_path, noted):
    """The epoch that was begun is charged and not run again; nor is its first round, which asks for mean features."""
    died = []

    def doomed(number, life, message):
        if number == SERVER or died or message[0] != UP or len(message) == 34:
            return False
        run.ups += 1
        if run.ups > after:  # of hospital messages: within the fifth epoch, or in the first round
            died.append(number)
            run.threads.vanish(SERVER)
        return False

    run = noted(options | {"aggregation": "bfv", "seed": None}, tmp_path, doomed=doomed, wired=wired)
    run.ups = 0
    check_whole(run.run())
    assert died and len({number for _, number, _ in run.included}) < ROUNDS + 1
    assert any("without mean features" in line for line in run.said) == (after < K)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hospital_that_lies_is_named_and_left_out_for_good(kind, options, tmp_path, noted, monkeypatch):
    sound, sent = Wire.send, []

    def send(self, peer, message_kind, body):
        if (self.number, peer, message_kind) == (1, SERVER, UP):
            sent.append(1)
            body = body[:-1] if len(sent) > 20 else body
        sound(self, peer, message_kind, body)

    monkeypatch.setattr(Wire, "send", send)
    run = noted(options | {"aggregation": kind, "least": 2}, tmp_path).run()
    check_whole(run)
    (line,) = [line for line in run.said if line.startswith("hospital 1 ")]
    assert line.startswith("hospital 1 lies: ") and "\n" not in line
    assert list(run.errors) == [1] and isinstance(run.errors[1], Refused) and "lies" in str(run.errors[1])
    assert run.included[-1][2] == (0, 2, 3)


def test_too_few_hospitals_open_nothing_and_wait_for_the_others(options, tmp_path, noted):
    """Without ``least`` all four are needed: the round in which one dies has no total, and the run goes on with it."""
    run = noted(options | {"aggregation": "masks"}, tmp_path, doomed=ups_of(1, 4 * 5)).run()
    check_whole(run)
    assert all(hospitals == (0, 1, 2, 3) for _, _, hospitals in run.included)
    assert "the session is over: 3 of the 4 hospitals that are needed are left" in run.said


def test_what_is_lost_once_on_the_way_is_written_again_and_counts_once(options, tmp_path, noted, monkeypatch):
    """Letters, or the replies to them; neither the same hospital's twice in a row."""
    chance, last, lost = random.Random(1), {}, []
    plain = Lettered._carry

    def carry(self, number, letter):
        drawn = chance.random()
        if last.get(number) or drawn > 0.2:
            last[number] = False
            return plain(self, number, letter)
        last[number] = True
        lost.append(number)
        if drawn < 0.1:
            plain(self, number, letter)
        raise Lost("on the way")

    monkeypatch.setattr(Lettered, "_carry", carry)
    run = noted(options | {"aggregation": "masks"}, tmp_path, wired="letters").run()
    assert run.results is not None and not run.errors and len(lost) > 20
    assert sum("hospitals, from epoch" in line for line in run.said) == 1, "no session was lost with a letter"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_storm_of_deaths_and_delays(kind, options, tmp_path):
    """``wire_storm`` with 300 rounds and five hospitals was tried, too: see there."""
    from wire_storm import storm

    found = storm(options | {"aggregation": kind}, tmp_path, rounds=60, seconds=200)
    assert found["deaths"] > 0


@pytest.mark.parametrize("kind", ["plain", "masks"])
def test_a_key_that_hides_nothing_leaves_its_hospital_out(kind, options, tmp_path, noted, monkeypatch):
    """Of low order; among the wire's keys, and among the masks'."""
    sound, bad = Handshake.hello, (1).to_bytes(2, "little") + bytes(32)
    monkeypatch.setattr(Handshake, "hello", lambda self: bad if self._number == 1 and keys(self) else sound(self))
    made = []

    def keys(handshake):
        made.extend([handshake] * (handshake not in made))
        return kind == "plain" or made.index(handshake) == 1

    run = noted(options | {"aggregation": kind, "least": 2}, tmp_path).run()
    check_whole(run)
    (line,) = [line for line in run.said if line.startswith("hospital 1 ")]
    assert line.startswith("hospital 1 lies: party 1: a public key is of low order")
    assert list(run.errors) == [1] and isinstance(run.errors[1], Refused)


def greeted(threads, number):
    """A hospital's end of a session in which the server is silent."""
    calls = LocalCalls(threads, number)
    return calls, HospitalEnd(number, threads.hospitals, calls, 5.0)


def test_calls_that_are_repeated_count_once_and_others_are_refused():
    threads = Threads(2, patience=5.0)
    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(greeted, threads, number) for number in range(2)]
        server = threads.relay.open(2, 0.0, 5.0, print)
        (zero, one), (other, _) = (end.result() for end in ends)
    session = threads.relay.seat.session
    one.send(SERVER, b"first")
    zero.put(session, 0, SERVER, b"first again")
    one.send(SERVER, b"second")
    assert server.here([0, 1]) == [0] and [server.take(0), server.take(0)] == [b"first", b"second"]
    for count, peer in ((7, SERVER), (2, 0), (2, 9)):
        with pytest.raises(SessionOver, match="not due"):
            zero.put(session, count, peer, b"x")
    with pytest.raises(SessionOver, match="another session"):
        zero.put(bytes(16), 2, SERVER, b"x")
    with pytest.raises(SessionOver, match="another session"):  # another life of the same hospital
        LocalCalls(threads, 0).put(session, 2, SERVER, b"x")
    with pytest.raises(SessionOver, match="under way"):
        for count in range(MOST_UNDELIVERED + 1):
            other.put(session, count, SERVER, b"x")
    assert "under way" in server.lost([0, 1])[1] and 0 not in server.lost([0, 1])
    threads.relay.close("the test is over")


def test_who_sends_without_end_fills_no_memory():
    """Of the server, while it waits for another hospital."""
    threads = Threads(2, patience=5.0)
    threads.relay.most_bytes = 1000
    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(greeted, threads, number) for number in range(2)]
        server = threads.relay.open(2, 0.0, 5.0, print)
        (_, zero), (_, one) = (end.result() for end in ends)
    with pytest.raises(SessionOver, match="more than 32 messages or 1,000 bytes"):
        for _ in range(MOST_UNDELIVERED + 1):
            zero.send(SERVER, b"x")
            assert server.here([0, 1]) == [0]
    one.send(SERVER, bytes(600))
    assert server.here([1]) == [1]
    with pytest.raises(SessionOver, match="more than 32 messages or 1,000 bytes"):
        one.send(SERVER, bytes(600))
    threads.relay.close("the test is over")


def test_a_hospital_drops_what_another_floods_it_with():
    threads = Threads(2, patience=5.0)
    with ThreadPoolExecutor(3) as pool:
        ends = [pool.submit(greeted, threads, number) for number in range(2)]
        threads.relay.open(2, 0.0, 5.0, print)
        (_, zero), (_, one) = (end.result() for end in ends)
    for _ in range(3 * MOST_UNDELIVERED):
        zero.send(1, b"x")
        with threads.relay.changed:
            assert threads.relay.changed.wait_for(lambda: not threads.relay._boxes[1], 20.0)
    threads.relay.deliver(1, b"and the server's")
    assert one.wait(lambda: one.here([SERVER]), 20.0)
    taken = [one.take(0) for _ in iter(lambda: one.here([0]), [])]
    assert len(taken) == MOST_UNDELIVERED
    threads.relay.close("the test is over")


def test_calls_beyond_what_the_server_answers_at_once_are_made_again(monkeypatch):
    sound, most = grpc.server, []

    def one_at_a_time(pool, **more):
        most.append(more["maximum_concurrent_rpcs"])
        return sound(pool, **more | {"maximum_concurrent_rpcs": 1})

    monkeypatch.setattr(grpc, "server", one_at_a_time)
    threads = Wired(2, 1000, patience=5.0)
    first, second = threads.dial(0), threads.dial(1)
    try:
        with ThreadPoolExecutor(2) as pool:
            joins = pool.submit(first.join)
            with threads.relay.changed:
                assert threads.relay.changed.wait_for(threads.relay.waiting, 20.0)
            puts = pool.submit(second.put, bytes(16), 0, SERVER, b"x")
            assert not wait([puts], 1.0).done, "it is refused and called again while the server is busy"
            threads.relay.refuse(0, "is in the way", True)
            assert isinstance(joins.exception(20.0), Refused) and isinstance(puts.exception(20.0), SessionOver)
    finally:
        first.close()
        second.close()
        threads.service.close()
    assert most == [2 * MOST_CALLS * 2 + 4]


def test_who_is_not_pinned_gets_past_no_handshake_and_disturbs_nobody(refuses):
    """Nor does a hospital talk to a server with another certificate, nor send more than the longest message."""
    threads = Wired(2, 1000, patience=5.0)
    stranger = Credentials.make("hospital-0", always=True)
    try:
        with pytest.raises(Silence, match="was not reached for 0.5 s"):
            threads.dial(0, stranger, patience=0.5).join()
        with pytest.raises(Silence, match="was not reached for 0.5 s"):
            threads.dial(0, server=1, patience=0.5).join()  # hospital 1's certificate in the place of the server's
        assert not threads.relay.waiting()
        calls = threads.dial(0, times=2)
        with pytest.raises(MessageError, match="refuses a call: .*larger than max"):
            calls.put(bytes(16), 0, SERVER, bytes(longest_message(1000) + 1))
        with pytest.raises(SessionOver, match="another session"):
            calls.put(bytes(16), 0, SERVER, b"x")
        calls.close()
    finally:
        threads.service.close()
    for address in ("here", "127.0.0.1", "127.0.0.1:99999", ":1"):
        with refuses("HOST:PORT"):
            check_address(address, "--address")


def test_two_parties_with_one_certificate_are_refused(tmp_path, refuses):
    """The holder of the second would lock out the holder of the first."""
    for name in ("server", "hospital-0", "hospital-1"):
        make_identity(tmp_path, name)
    assert len(read_certificates(tmp_path, 2)) == 3
    mine, other = (tmp_path / f"hospital-{k}.pub" for k in (0, 1))
    other.write_text("\n".join([other.read_text().splitlines()[0], *mine.read_text().splitlines()[1:], ""]))
    with refuses("hospital-0.pub", "hospital-1.pub", "same certificate"):
        read_certificates(tmp_path, 2)


def test_a_ledger_longer_than_the_run_is_refused(monkeypatch, refuses):
    """An honest hospital would charge a billion epochs one by one."""
    monkeypatch.setattr(party, "agree_on_charge", lambda wire, own, taken: 10**9 - 1)
    charge = SimpleNamespace(read=lambda resume: 0, taken={})
    training = SimpleNamespace(plan=SimpleNamespace(setting=settings.SETTINGS["FSCDP"]))
    with refuses("999999999 epochs", f"has {EPOCHS}"):
        party._go_on(training, None, None, charge, False)
