"""The workers: many patients at once, rude ones among them, and three processes that share nothing but messages."""

import contextlib
import io
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.parties import Provider
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.network.serving import load as load_served
from dopamine_lib.inference.network.serving import thresholds
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.inference.workers import compiling, control, tls
from dopamine_lib.inference.workers import crypto_provider as crypto_provider_module
from dopamine_lib.inference.workers import provider as provider_module
from dopamine_lib.inference.workers import server as server_module
from dopamine_lib.inference.workers.client import PatientClient, _read_card
from dopamine_lib.inference.workers.commands import parse_address
from dopamine_lib.inference.workers.control import Tag
from dopamine_lib.inference.workers.crypto_provider import CryptoProviderServer
from dopamine_lib.inference.workers.processes import Workers
from dopamine_lib.inference.workers.provider import ProviderServer
from dopamine_lib.models.networks import HALF, build, to_input

SIZE, GRADES = 16, ("none", "some", "much")
LOOPBACK = ("127.0.0.1", 0)
PATIENTS = [f"patient {i}" for i in range(4)]


@pytest.fixture(scope="module", autouse=True)
def _numpy_kernels():
    """The networks here are tiny: compiling would take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "active", lambda: kernels)
        patch.setenv("DOPAMINE_KERNELS", "numpy")  # for the processes
        yield


@pytest.fixture(scope="module")
def model():
    """A small network, images whose answers differ plainly, and those answers by plain torch."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(36, len(GRADES)),
    ).requires_grad_(False)
    images = np.random.default_rng(5).integers(0, 256, (100, SIZE, SIZE, 3), dtype=np.uint8)
    plan, weights = compile_model(net, SIZE, to_input(images, *HALF), *HALF)
    alone = compile_model(net, SIZE, to_input(images, *HALF), *HALF, answer="grade")
    logits = net(to_input(images, *HALF)).numpy()
    return SimpleNamespace(plan=plan, weights=weights, alone=alone, images=images, logits=logits)


@pytest.fixture(scope="module")
def identities():
    return {name: tls.Credentials.make(name) for name in ("crypto-provider", "provider", *PATIENTS)}


@pytest.fixture
def start(model, identities):
    """Start crypto-provider and provider in threads; returns a function that makes a client for patient number i."""
    with contextlib.ExitStack() as stack:

        def begin(served=(model.plan, model.weights), alone=False, grades=GRADES, inputs=None, beyond=None, **limits):
            certificates = {name: identity.certificate for name, identity in identities.items()}
            patients = {name: certificates[name] for name in PATIENTS}
            crypto_provider = stack.enter_context(
                CryptoProviderServer(LOOPBACK, identities["crypto-provider"], certificates["provider"], patients)
            )
            at = (crypto_provider.address, certificates["crypto-provider"])
            used = None if alone else at
            provider = stack.enter_context(
                ProviderServer(
                    LOOPBACK, identities["provider"], patients, used, *served, grades, inputs, beyond, **limits
                )
            )

            def client(i: int = 0, at=used) -> PatientClient:
                return PatientClient(identities[PATIENTS[i]], (provider.address, certificates["provider"]), at)

            client.crypto_provider = at

            return SimpleNamespace(client=client, crypto_provider=crypto_provider, provider=provider)

        yield begin


def check(model, number: int, answer) -> None:
    """The answer is that of image ``number`` and of no other image: the nearest of the plain answers is its own."""
    distance = np.abs(model.logits - np.array(answer.logits)).max(axis=1)
    assert distance.argmin() == number and distance[number] < 1e-3 * np.ptp(model.logits)
    assert answer.grade == GRADES[int(model.logits[number].argmax())]


def query(model, client, numbers) -> None:
    for number in numbers:
        check(model, number, client.infer(model.images[number]))


def in_threads(*functions) -> list:
    """Run functions at once; returns the exceptions raised."""
    errors = []

    def call(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a patient hangs"
    return errors


def until(condition, seconds: float = 10.0) -> None:
    """Wait for something another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_hundred_queries_from_four_patients_at_once(model, start):
    workers = start()

    def patient(i):
        with workers.client(i) as client:
            for k in range(i, 100, 4):
                if k % 3 == 0:
                    client.prepare(2)
                query(model, client, [k])

    assert in_threads(*(lambda i=i: patient(i) for i in range(4))) == []


def test_the_grade_alone_is_all_that_a_patient_is_told(model, start):
    with start(served=model.alone, beyond={"referable": 1.5}).client() as client:
        for k in range(20):
            answer = client.infer(model.images[k])
            assert answer.grade == GRADES[int(model.logits[k].argmax())]
            assert answer.logits is answer.probabilities is answer.severity is None and answer.called == {}
            assert answer.record().keys() == vars(answer).keys() | {"severity", "called"}


def test_two_sessions_of_one_patient_have_nothing_in_common(start, monkeypatch):
    seeds = []

    class Spy(crypto_provider_module.CryptoProvider):
        def __init__(self, plan):
            super().__init__(plan)
            seeds.extend([self.patient_seed, self.provider_seed])

    monkeypatch.setattr(crypto_provider_module, "CryptoProvider", Spy)
    workers = start()
    for _ in range(3):
        workers.client().close()
    assert len(set(seeds)) == 6


def test_a_patient_killed_in_a_query_leaves_the_others_untouched(model, start, identities, tmp_path):
    workers = start()
    identity = tmp_path / "patient.pem"
    identity.write_bytes(identities[PATIENTS[1]].key + identities[PATIENTS[1]].certificate.encode())
    identity.chmod(0o600)
    peers = [
        (list(server.address), identities[name].certificate)
        for name, server in (("provider", workers.provider), ("crypto-provider", workers.crypto_provider))
    ]
    program = """if True:
        import json, os, signal, sys
        import numpy as np
        from dopamine_lib.inference.workers import client, tls

        path, peers = json.loads(sys.argv[1])
        patient = client.PatientClient(tls.Credentials.at(path, "x"), *[(tuple(a), c) for a, c in peers])
        patient.infer(np.zeros((16, 16, 3), np.uint8))
        patient.prepare()
        swap, swaps = patient._channel.exchange, []

        def killed(*arguments):
            swap(*arguments)
            swaps.append(1)
            if len(swaps) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        patient._channel.exchange = killed
        patient.infer(np.zeros((16, 16, 3), np.uint8))
    """
    with workers.client(0) as other:
        process = subprocess.Popen([sys.executable, "-c", program, json.dumps([str(identity), peers])])
        numbers = iter(range(100))
        while process.poll() is None:
            query(model, other, [next(numbers) % 100])
            time.sleep(0.05)
        assert process.returncode == -signal.SIGKILL
        query(model, other, [50, 51])
        with workers.client(1) as again:  # and the killed one may come back, with new randomness
            query(model, again, [52, 53])
        query(model, other, [54])


def rude_clients(workers, identity):
    """Ways to misbehave: each is a function that does its worst and returns."""
    provider, crypto_provider = workers.provider, workers.crypto_provider
    certificate = {"provider": None, "crypto-provider": None}

    def garbage_before_tls(server):
        with socket.create_connection(server.address) as sock:
            sock.sendall(os.urandom(5000))
            with contextlib.suppress(OSError):
                sock.recv(100)

    def silence(server):
        socket.create_connection(server.address).close()

    def after_the_greeting(act):
        channel = tls.connect(provider.address, identity, certificate["provider"], "provider", timeout=5)
        try:
            assert control.receive_number(channel, Tag.STATUS) == control.Status.WELCOME
            act(channel)
        finally:
            channel.close()

    def at_the_crypto_provider(act):
        channel = tls.connect(
            crypto_provider.address, identity, certificate["crypto-provider"], "crypto-provider", timeout=5
        )
        try:
            act(channel)
            with pytest.raises(ChannelError):
                channel.receive(Tag.SEED, bytearray(16))
        finally:
            channel.close()

    return certificate, {
        "garbage at the provider": lambda: garbage_before_tls(provider),
        "garbage at the crypto-provider": lambda: garbage_before_tls(crypto_provider),
        "a knock and nothing": lambda: silence(provider),
        "a greeting and nothing": lambda: after_the_greeting(lambda channel: None),
        "random bytes for the set-up": lambda: after_the_greeting(lambda c: c._sock.sendall(os.urandom(10_000))),
        "a wrong tag": lambda: after_the_greeting(lambda c: c.send(77, bytes(32))),
        "a huge message": lambda: after_the_greeting(lambda c: c.send(0xBFFC, bytes(3_000_000))),
        "a foreign session": lambda: at_the_crypto_provider(
            lambda c: (c.send(Tag.JOIN, bytes(16)), c.send(Tag.JOIN, bytes(32)))
        ),
        "playing the provider": lambda: at_the_crypto_provider(lambda c: c.send(Tag.OPEN, bytes(32))),
    }


def test_rude_clients_leave_the_others_untouched(model, start, identities):
    workers = start()
    certificate, acts = rude_clients(workers, identities[PATIENTS[3]])
    certificate |= {name: identities[name].certificate for name in certificate}
    with workers.client(0) as client:
        for k, (name, act) in enumerate(acts.items()):
            with contextlib.suppress(ChannelError):  # being turned away is right; a wrong answer would be an assertion
                act()
            query(model, client, [k])
            assert name
    until(lambda: not workers.provider._channels and not workers.crypto_provider._channels)
    assert not workers.crypto_provider._waiting


@contextlib.contextmanager
def silent_strangers(address, count):
    """Connections that never say a word, and are made again as soon as they are closed."""
    ended = threading.Event()

    def stranger():
        while not ended.is_set():
            with contextlib.suppress(OSError), socket.create_connection(address, 2) as sock:
                sock.settimeout(0.5)
                while not ended.is_set():
                    with contextlib.suppress(TimeoutError):
                        sock.recv(1)
                        break

    threads = [threading.Thread(target=stranger, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(10)


def test_strangers_who_say_nothing_shut_no_patient_out(model, start, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_HANDSHAKES", 8)
    monkeypatch.setattr(server_module, "GRACE", 0.1)
    workers = start()
    with silent_strangers(workers.provider.address, 20), silent_strangers(workers.crypto_provider.address, 20):
        until(lambda: len(workers.provider._handshakes) == len(workers.crypto_provider._handshakes) == 8)
        for k in range(3):
            with workers.client(0) as client:
                query(model, client, [k])
        assert len(workers.provider._handshakes) <= 8
    until(lambda: not workers.provider._handshakes)


def test_one_address_with_many_handshakes_makes_room_before_another(monkeypatch, start):
    """Loopback has more than one address."""
    monkeypatch.setattr(server_module, "MAX_HANDSHAKES", 4)
    monkeypatch.setattr(server_module, "GRACE", 0.1)
    server = start().provider
    with contextlib.ExitStack() as stack:
        quiet = stack.enter_context(socket.create_connection(server.address, source_address=("127.0.0.2", 0)))
        until(lambda: len(server._handshakes) == 1)
        others = [stack.enter_context(socket.create_connection(server.address)) for _ in range(8)]
        until(lambda: len(select.select(others, [], [], 0)[0]) == 5)  # these were closed: three have a place
        until(lambda: [host for host, _ in server._handshakes.values()] == ["127.0.0.2"] + 3 * ["127.0.0.1"])
        assert not select.select([quiet], [], [], 0)[0]  # still open, though the oldest of all


def test_one_patient_alone_cannot_take_all_places(model, start, monkeypatch):
    workers = start(sessions=4)
    with workers.client(0), workers.client(0):
        with pytest.raises(ChannelError, match="try again later"):
            workers.client(0)
        with workers.client(1) as other:
            query(model, other, [0])
    monkeypatch.setattr(server_module, "MAX_OF_ONE", 1)
    with workers.client(2) as client:
        with pytest.raises(ChannelError, match="closed the connection"):
            workers.client(2)
        query(model, client, [1])


def test_a_command_out_of_turn_ends_the_session_only(model, start):
    workers = start()
    with workers.client(0) as polite:
        rude = workers.client(1)
        control.send_number(rude._channel, Tag.COMMAND, control.Command.INFER)
        control.send_number(rude._channel, Tag.COUNT, 1)  # nothing is prepared
        with pytest.raises(ChannelError):
            rude._channel.receive(Tag.READY, bytearray(4))
        query(model, polite, [0])


def test_a_silent_patient_is_given_up(model, start, monkeypatch):
    monkeypatch.setattr(provider_module, "IDLE_TIMEOUT", 0.3)
    workers = start(sessions=1)
    silent = workers.client(0)
    until(lambda: not workers.provider._channels)
    with workers.client(1) as client:  # the seat is free again
        query(model, client, [3])
    workers.provider.close()
    with pytest.raises(ChannelError, match="cannot be reached"):
        silent.prepare()


def test_a_session_that_was_closed_or_broke_is_replaced_unnoticed(model, start, monkeypatch):
    idle = provider_module.IDLE_TIMEOUT
    monkeypatch.setattr(provider_module, "IDLE_TIMEOUT", 0.2)
    workers = start(sessions=1)
    with workers.client(0) as client:
        until(lambda: not workers.provider._channels)
        monkeypatch.setattr(provider_module, "IDLE_TIMEOUT", idle)
        seeds = [client._patient._seed]
        query(model, client, [3])
        client.prepare()
        seeds.append(client._patient._seed)
        for channel in list(workers.provider._channels):
            channel.close()
        query(model, client, [4, 5])  # what was prepared is not used in the new session
        seeds.append(client._patient._seed)
        assert len(set(seeds)) == 3  # fresh masks in each session
    until(lambda: not workers.provider._channels)
    with pytest.raises(ChannelError):  # a client that was closed stays closed
        client.prepare()


def test_what_is_prepared_ahead_is_bounded(model, start):
    workers = start(ahead=2)
    with workers.client(0) as one, workers.client(1) as other:
        assert one.prepare(10) == 3  # its own and two spare places
        assert other.prepare(10) == 1  # its own: nobody is locked out
        query(model, one, [0])
        until(lambda: other.prepare(10) == 2)  # the provider frees the place just after its last message
        query(model, other, [1, 2, 3])
        query(model, one, [4, 5, 6])
    with workers.client(2) as third:  # what was left over is free again
        assert third.prepare(10) == 3


def test_beyond_the_seats_patients_wait_and_beyond_that_are_told(model, start, monkeypatch):
    workers = start(sessions=1)
    first = workers.client(0)
    waiting = []
    thread = threading.Thread(target=lambda: waiting.append(workers.client(1)))
    thread.start()
    until(lambda: workers.provider._places._value == 0)
    with pytest.raises(ChannelError, match="try again later"):
        workers.client(2)
    first.close()
    thread.join(10)
    with waiting[0] as second:
        query(model, second, [1])
    monkeypatch.setattr(provider_module, "WAIT_FOR_SEAT", 0.1)
    with workers.client(0), pytest.raises(ChannelError, match="try again later"):
        workers.client(1)


def test_a_seat_that_is_held_idle_goes_to_one_who_waits(model, start, monkeypatch):
    """With --sessions 1 a patient who read for two minutes shut all others out; its own next query is answered, too."""
    monkeypatch.setattr(provider_module, "IDLE_WHILE_OTHERS_WAIT", 0.2)
    workers = start(sessions=1)
    with workers.client(0) as reading:
        query(model, reading, [0])
        reading.prepare()
        with workers.client(1) as waiting:
            query(model, waiting, [1])
        query(model, reading, [2])
    until(lambda: not workers.provider._channels)
    assert not workers.provider._idle and workers.provider._spare._value == 2


def test_a_session_in_use_is_not_ended_for_one_who_waits(model, start, monkeypatch):
    monkeypatch.setattr(provider_module, "IDLE_WHILE_OTHERS_WAIT", 0.0)
    monkeypatch.setattr(provider_module, "WAIT_FOR_SEAT", 2.0)
    workers, began, go_on = start(sessions=1), threading.Event(), threading.Event()
    sound = Provider.serve

    def slowly(provider, queries):
        began.set()
        go_on.wait(30)
        sound(provider, queries)

    monkeypatch.setattr(Provider, "serve", slowly)
    with workers.client(0) as busy:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(query(model, busy, [0])))
        asking.start()
        assert began.wait(30)
        with pytest.raises(ChannelError, match="try again later"):
            workers.client(1)
        go_on.set()
        asking.join(30)
        assert len(answers) == 1


def test_a_crypto_provider_that_is_gone(model, start):
    workers = start()
    client = workers.client(0)
    query(model, client, [0])
    client.prepare()
    workers.crypto_provider.close()
    query(model, client, [1])  # prepared before
    with pytest.raises(ChannelError, match="could not reach the crypto-provider"):
        client.prepare()
    with pytest.raises(ChannelError, match="could not reach the crypto-provider"):
        workers.client(1)
    assert workers.provider._spare._value == 2


def test_without_a_crypto_provider(model, start):
    """The same session, and the same answers; a side that expects one is told so."""
    workers = start(alone=True, ahead=0)
    with workers.client(0) as client:
        assert client.prepare(2) == 1
        query(model, client, [0])
        workers.provider._channels.copy().pop().close()
        query(model, client, [1])  # in a new session
    with pytest.raises(ChannelError, match="--crypto-provider none"):
        workers.client(0, at=workers.client.crypto_provider)
    with pytest.raises(ChannelError, match="give its address"):
        start().client(0, at=None)


@pytest.mark.parametrize(
    ("alone", "line"), [(False, "of this version of dopamine-kit"), (True, "another version|closed")]
)
def test_a_patient_of_another_version_is_told_so(start, monkeypatch, alone, line):
    other = type("Plan", (Plan,), {"digest": lambda self: bytes(32)})
    monkeypatch.setattr("dopamine_lib.inference.workers.client.Plan", other)
    with pytest.raises(ChannelError, match=line):
        start(alone=alone).client(0)


def test_a_seed_goes_to_its_patient_only_and_once(start, identities, model):
    workers = start()
    given = {}

    def ask(i, session, digest):
        channel = tls.connect(
            workers.crypto_provider.address,
            identities[PATIENTS[i]],
            identities["crypto-provider"].certificate,
            "crypto-provider",
            timeout=5,
        )
        try:
            channel.send(Tag.JOIN, session)
            channel.send(Tag.JOIN, digest)
            return control.receive_bytes(channel, Tag.SEED, 16)
        finally:
            channel.close()

    provider = tls.connect(
        workers.crypto_provider.address,
        identities["provider"],
        identities["crypto-provider"].certificate,
        "crypto-provider",
        timeout=5,
    )
    provider.send(Tag.OPEN, bytes.fromhex(identities[PATIENTS[0]].fingerprint))
    control.send_text(provider, Tag.PLAN, model.plan.to_json())
    session = control.receive_bytes(provider, Tag.SESSION, 16)
    given["provider"] = control.receive_bytes(provider, Tag.SEED, 16)
    for i, digest in ((1, model.plan.digest()), (0, bytes(32))):
        with pytest.raises(ChannelError):
            ask(i, session, digest)
    given["patient"] = ask(0, session, model.plan.digest())
    with pytest.raises(ChannelError):
        ask(0, session, model.plan.digest())
    assert given["patient"] != given["provider"]
    provider.close()
    until(lambda: not workers.crypto_provider._waiting)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": "{}", "grades": []}', '{"plan": 1, "grades": 2}', "\x00"])
def test_a_card_that_cannot_be_read(text):
    with pytest.raises(ChannelError, match="cannot be read"):
        _read_card(text)


def test_texts_have_a_bound():
    from dopamine_lib.inference.protocols.channel import local_pair

    one, other = local_pair(timeout=5)
    control.send_number(one, Tag.CARD, 2**31)
    with pytest.raises(ChannelError, match="at most 100"):
        control.receive_text(other, Tag.CARD, limit=100)
    one.close()


def test_no_secret_in_the_log(model, start, identities, caplog, monkeypatch):
    secrets = [identity.key.decode().splitlines()[1] for identity in identities.values()]

    class Spy(crypto_provider_module.CryptoProvider):
        def __init__(self, plan):
            super().__init__(plan)
            secrets.extend(
                form for seed in (self.patient_seed, self.provider_seed) for form in (seed.hex(), repr(seed))
            )

    monkeypatch.setattr(crypto_provider_module, "CryptoProvider", Spy)
    workers = start()
    with caplog.at_level(logging.DEBUG):
        with workers.client(0) as client:
            answer = client.infer(model.images[0])
        broken = workers.client(1)
        broken._channel.send(77, bytes(5))
        until(lambda: not workers.provider._channels)
    secrets += [answer.grade, *(f"{logit:.3f}" for logit in answer.logits)]
    assert "ended its session after 1 queries" in caplog.text and "message 77" in caplog.text
    assert not [secret for secret in secrets if secret in caplog.text]
    assert secrets[0] not in repr(identities["crypto-provider"])


@pytest.mark.parametrize("module", ["workers.crypto_provider", "workers.client", "network.parties"])
def test_crypto_provider_and_patient_load_no_torch(module):
    program = f"import dopamine_lib.inference.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_queries_that_share_their_rounds_are_those_that_are_asked_alone(model, start):
    """As many at once as the provider lets lie prepared; each has the picture's own answer, and masks of its own."""
    numbers = [7, 3, 7, 90, 41]
    with start(ahead=2).client() as client:
        alone = client.infer(model.images[7])
        answers = client.infer_all(model.images[numbers])
    for number, answer in zip(numbers, answers, strict=True):
        check(model, number, answer)
        assert answer.rounds == alone.rounds
        assert {**alone.bytes, **answer.bytes, "online_sent": 0} == {**alone.bytes, "online_sent": 0}
        assert 0 <= alone.bytes["online_sent"] - answer.bytes["online_sent"] <= 8  # the command is said once for all
    assert [answer.together for answer in answers] == [3, 3, 3, 2, 2] and alone.together == 1
    assert answers[0].logits != answers[2].logits  # each query has noise of its own


def test_only_prepared_queries_are_asked_at_once(model, start):
    workers = start()
    with workers.client(0) as polite:
        rude = workers.client(1)
        assert rude.prepare(2) == 2
        control.send_number(rude._channel, Tag.COMMAND, control.Command.INFER)
        control.send_number(rude._channel, Tag.COUNT, 3)
        with pytest.raises(ChannelError):
            rude._channel.receive(Tag.READY, bytearray(4))
        query(model, polite, [0])


def test_a_session_that_ends_between_two_batches_is_replaced(model, start):
    with start(ahead=1).client() as client:
        client.prepare(2)
        client._channel.close()
        answers = client.infer_all(model.images[:3])
    for number, answer in enumerate(answers):
        check(model, number, answer)


ROW = {"age": {"range": [20, 80]}, "sex": {"range": [0, 1]}, "pain": {"categories": ["none", "some"], "missing": []}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A table's model as ``reproduce`` writes it, a patient's CSV file, and the plain logits of its rows."""
    from dopamine_lib.models.checkpoints import save_model

    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(4)
    net = build("mlp", 2, None, 0, inputs=4)
    about = {"architecture": "mlp", "grades": ["well", "ill"]}
    about |= {"preprocessing": {"inputs": ["age", "sex", "pain=none", "pain=some"], "declared": ROW}}
    about["thresholds"] = {"ill": 0.5}
    save_model(folder / "model.safetensors", net, about)
    save_model(
        folder / "bare.safetensors",
        net,
        about | {"preprocessing": {"inputs": ["a", "b", "c", "d"]}, "thresholds": ["ill"]},
    )
    (folder / "me.csv").write_text("pain;age;sex\nsome;80;0\nnone;35;1\n;20;1\n", encoding="utf-8")
    numbers = torch.tensor([[1, -1, 0, 1], [-0.5, 1, 1, 0], [-1, 1, 0, 0]]) / 3**0.5
    return SimpleNamespace(folder=folder, logits=net(numbers).detach().numpy(), numbers=numbers.numpy())


def test_the_rows_of_a_patient_s_table(rows, start, refuses):
    plan, weights, grades = load_served(rows.folder / "model.safetensors")
    beyond = thresholds(rows.folder / "model.safetensors")
    with start(served=(plan, weights), grades=grades, inputs=ROW, beyond=beyond).client() as client:
        read = client.read(rows.folder / "me.csv")
        assert [name for name, _ in read] == [", line 2", ", line 3", ", line 4"]
        assert np.allclose([row for _, row in read], rows.numbers, atol=1e-6)
        answers = client.infer_all([row for _, row in read])
        logits = np.array([answer.logits for answer in answers])
        assert np.abs(logits - rows.logits).max() < 1e-3 * np.ptp(rows.logits)
        # of two classes the expected one is beyond a half where the second is the likelier
        assert [answer.called for answer in answers] == [{"ill": bool(well < ill)} for well, ill in rows.logits]
        assert answers[0].record()["severity"] == answers[0].probabilities[1]
        (rows.folder / "old.csv").write_text("pain,age,sex\nsome,old,0\n", encoding="utf-8")
        with refuses("old.csv, line 2: age", "not a number"):
            client.read(rows.folder / "old.csv")
        (rows.folder / "no.csv").write_text("pain,age\n", encoding="utf-8")
        with refuses("no.csv: no rows"):
            client.read(rows.folder / "no.csv")
        with refuses("this model reads (4,)"):
            client.infer(np.zeros(5, np.float32))
    card = {"plan": plan.to_json(), "grades": ["well", "ill"], "inputs": ROW, "thresholds": beyond}
    for bad in ([], 3, {"age": 3}, {"age": {"range": [20, 80]}}, {"age": {"range": [80, 20]}}, ROW | {"x": ROW["age"]}):
        with pytest.raises(ChannelError, match="cannot be read"):
            _read_card(json.dumps(card | {"inputs": bad}))
    assert _read_card(json.dumps(card))[3] == beyond == {"ill": 0.5}
    for bad in ({"ill": 2}, {"ill": -0.1}, {"ill": "?"}, {"ill": None}, {"ill": 10**400}, [1], 3, {"\x1b[2J": 0.5}):
        with pytest.raises(ChannelError, match="cannot be read"):
            _read_card(json.dumps(card | {"thresholds": bad}))
    with pytest.raises(ChannelError, match="cannot be read"):
        _read_card(json.dumps(card | {"grades": ["well", "\x9b2J"]}))
    with refuses("bare.safetensors: its thresholds are not a number for each disease"):
        thresholds(rows.folder / "bare.safetensors")
    with refuses("bare.safetensors does not say how a patient becomes 4 numbers"):
        load_served(rows.folder / "bare.safetensors")


# three processes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model as ``reproduce`` writes it, and an image."""
    from dopamine_lib.data.synthetic import make_population
    from dopamine_lib.models.checkpoints import save_model

    folder = tmp_path_factory.mktemp("workers")
    net = build("cnn", 5, None, 0)
    grades = [f"grade {i}" for i in range(5)]
    about = {"architecture": "cnn", "grades": grades, "preprocessing": {"size": 28, "mean": HALF[0], "std": HALF[1]}}
    save_model(folder / "model.safetensors", net, about)
    image = make_population(1, 28, 1, threads=1)[0][0]
    Image.fromarray(image).save(folder / "eye.png")
    with torch.inference_mode():
        logits = net(to_input(image[None], *HALF))[0].numpy()
    return SimpleNamespace(model=folder / "model.safetensors", image=folder / "eye.png", logits=logits, folder=folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_three_processes(files, refuses, monkeypatch, tmp_path):
    idle = "from dopamine_lib.inference.workers import provider; provider.IDLE_TIMEOUT = 1.0"
    (tmp_path / "sitecustomize.py").write_text(f"import os; os.write(1, b'Welcome to this Python!'); {idle}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")  # PyTorch's kernels print past Python
    with Workers(files.model) as workers:
        answer = workers.infer(files.image)
        assert np.abs(np.array(answer["logits"]) - files.logits).max() < 1e-3 * np.ptp(files.logits)
        assert answer["bytes"]["offline_to_patient"] == 16 and answer["rounds"] > 5
        with refuses("no.png", "get the file again"):
            workers.infer(files.folder / "no.png")
        assert workers.prepare(2) == 2
        time.sleep(1.5)  # a student reads: the provider gives the session up
        assert workers.infer(files.image)["grade"] == answer["grade"]  # neither that nor the bad file is noticed
        loaded = {role: Path(f"/proc/{pid}/maps").read_text() for role, pid in workers.pids.items()}
        assert "libtorch" not in "".join(loaded.values())  # a fourth process compiled the model
        for role, pid in workers.pids.items():
            told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            assert b"PRIVATE" not in told and b"eye.png" not in told and b"model.safetensors" not in told, role
        os.kill(workers.pids["provider"], signal.SIGKILL)
        with pytest.raises(ChannelError):
            workers.prepare()
            workers.prepare()
        pids = workers.pids
    for pid in pids.values():
        assert not Path(f"/proc/{pid}").exists()


def test_workers_end_with_their_parent(files):
    program = (
        "import sys; from dopamine_lib.inference.workers.processes import Child;"
        "child = Child('dopamine_lib.inference.workers.processes', 'crypto-provider'); child.hear();"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close(), parent.stdin.close()

    def ended():
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    until(ended, 30)


@pytest.mark.slow
def test_a_file_that_holds_no_model_is_refused(files, refuses):
    with refuses("eye.png", "are understood"):
        Workers(files.image)


# the command line


def run(*arguments):
    """Run ``infer`` or ``party`` as the command line does; returns what was printed."""
    import argparse

    from dopamine_lib.inference.workers.commands import add_infer, add_party

    top = argparse.ArgumentParser()
    commands = top.add_subparsers(required=True)
    add_infer(commands), add_party(commands)
    parsed = top.parse_args([str(argument) for argument in arguments])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        parsed.call(parsed)
    return out.getvalue()


@pytest.mark.slow
def test_infer_prints_the_grade_alone_where_that_is_asked_for(files):
    wanted = f"grade {int(files.logits.argmax())}"
    said = run("infer", files.image, "--weights", files.model, "--answer", "grade")
    assert said.splitlines()[0] == wanted and "%" not in said
    answer = json.loads(run("infer", files.image, "--weights", files.model, "--answer", "grade", "--json"))
    assert answer["grade"] == wanted and answer["probabilities"] is None and answer["logits"] is None


@pytest.mark.slow
def test_infer_without_a_crypto_provider(files):
    """Two processes; what went ahead of the answer went between them."""
    answer = json.loads(run("infer", files.image, "--weights", files.model, "--crypto-provider", "none", "--json"))
    assert np.abs(np.array(answer["logits"]) - files.logits).max() < 1e-3 * np.ptp(files.logits)
    assert min(answer["bytes"]["offline_to_patient"], answer["bytes"]["offline_to_provider"]) > 10**6


@pytest.mark.slow
def test_infer_prints_json(files):
    answer = json.loads(run("infer", files.image, "--weights", files.model, "--json"))
    assert answer["grade"] == f"grade {int(files.logits.argmax())}"
    assert sum(answer["probabilities"]) == pytest.approx(1)
    assert {"logits", "seconds_online", "seconds_offline", "bytes", "rounds"} <= answer.keys()


@pytest.mark.slow
def test_infer_takes_several_files_and_tables(files, rows):
    """A line each, and what they cost together; in JSON a line each."""
    wanted = f"grade {int(files.logits.argmax())}, "
    *lines, last = run("infer", files.image, files.image, "--weights", files.model).splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{files.image}: {wanted}") for line in lines)
    assert last.startswith("2 answers in ") and " a minute: 2 at once in " in last
    said = run(
        "infer", rows.folder / "me.csv", "--weights", rows.folder / "model.safetensors", "--json", "--together", 2
    )
    answers = [json.loads(line) for line in said.splitlines()]
    assert [answer["image"] for answer in answers] == [f"{rows.folder / 'me.csv'}, line {i}" for i in (2, 3, 4)]
    logits = np.array([answer["logits"] for answer in answers])
    assert np.abs(logits - rows.logits).max() < 1e-3 * np.ptp(rows.logits)
    assert [answer["together"] for answer in answers] == [2, 2, 1]


def test_bad_input_is_reported_before_anything_starts(files, refuses, tmp_path):
    with refuses("no.png does not exist"):
        run("infer", tmp_path / "no.png", "--weights", files.model)
    with refuses("no.safetensors does not exist"):
        run("infer", files.image, "--weights", tmp_path / "no.safetensors")
    with refuses("--together is 0", "1 to 32"):
        run("infer", files.image, "--weights", files.model, "--together", 0)
    identity = ("--identity", tmp_path / "id.pem")
    printed = run("party", "crypto-provider", *identity, "--fingerprint").strip()
    assert printed == run("party", "hospital", *identity, "--fingerprint").strip()  # the paper's word for it
    assert printed == tls.Credentials.at(tmp_path / "id.pem", "x").fingerprint and len(printed) == 64
    with refuses("--provider-certificate"):
        run("party", "crypto-provider", *identity)
    certificate = tmp_path / "id.crt"
    with refuses("--patient-certificate"):
        run("party", "crypto-provider", *identity, "--provider-certificate", certificate)
    with refuses("--weights"):
        run("party", "provider", *identity)
    with refuses("--sessions is 0"):
        run("party", "provider", *identity, "--weights", files.model, "--sessions", 0)
    with refuses("no image was named"):
        run("party", "patient", *identity)
    with refuses("'here' is no address"):
        run("party", "patient", files.image, *identity, "--provider", "here")
    with pytest.raises(SystemExit, match="cannot be reached"):
        run("party", "patient", files.image, *identity, "--provider", "127.0.0.1:1", "--provider-certificate",
            certificate, "--crypto-provider-certificate", certificate)  # fmt: skip
    with pytest.raises(SystemExit, match="cannot be reached"):  # and its word in the options
        run("party", "patient", files.image, *identity, "--provider", "127.0.0.1:1", "--provider-certificate",
            certificate, "--hospital", "127.0.0.1:1", "--hospital-certificate", certificate)  # fmt: skip


@pytest.mark.parametrize("text", ["", "7100", ":7100", "host:", "host:-1", "host:65536", "host:x"])
def test_addresses(text, refuses):
    assert parse_address("127.0.0.1:7100") == ("127.0.0.1", 7100) and parse_address("[::1]:0") == ("::1", 0)
    with refuses("is no address"):
        parse_address(text)


#: What a provider's process does with a model: compiles it apart, and says what came of it.
APART = """
import sys
from dopamine_lib.inference.workers.compiling import compile_apart
from dopamine_lib.inference.workers.provider import ProviderServer
called = []
plan, weights, grades, *_ = compile_apart(sys.argv[1], None, None, "scores", None, meanwhile=lambda: called.append(1))
print(plan.digest().hex(), digest(weights), *called, "torch" in sys.modules, *grades, sep=",")
"""
DIGEST = """
def digest(weights):
    import hashlib
    arrays = [array for number in sorted(weights.matrices) for part in weights.of(number) for array in part]
    return hashlib.sha256(b"".join(array.dtype.str.encode() + array.tobytes() for array in arrays)).hexdigest()
"""


def test_a_model_compiled_apart_is_the_same_and_leaves_no_torch_behind():
    from dopamine_lib.inference.network.serving import load
    from dopamine_lib.page.served_model import SERVED

    ended = subprocess.run(
        [sys.executable, "-c", DIGEST + APART, str(SERVED)], capture_output=True, text=True, check=True, timeout=300
    )
    (plan, weights, grades), scope = load(SERVED), {}
    exec(DIGEST, scope)
    assert ended.stdout.strip() == ",".join([plan.digest().hex(), scope["digest"](weights), "1", "False", *grades])


def test_the_process_that_compiles_refuses_and_breaks_in_one_line(tmp_path, refuses, monkeypatch):
    with refuses("missing.safetensors"):
        compiling.compile_apart(tmp_path / "missing.safetensors", None, None, "scores", None)
    children, make = [], compiling.Child
    monkeypatch.setattr(compiling, "Child", lambda module: children.append(make(module)) or children[0])
    with pytest.raises(ChannelError, match="ended without a word"):
        compiling.compile_apart(
            tmp_path / "x", None, None, "scores", None, meanwhile=lambda: os.kill(children[0].pid, signal.SIGKILL)
        )
    assert not children[0].alive
