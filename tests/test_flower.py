"""Letters between hospitals and server, as Flower carries them; and Flower itself, where it is installed."""

import argparse
import contextlib
import importlib.util
import json
import random
import socket
import threading
import tomllib

import numpy as np
import pytest
from safetensors.numpy import load_file

from dopamine_lib.encryption.messages import SERVER, MessageError
from dopamine_lib.federation.arguments import chosen_options
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.flower import box as box_module
from dopamine_lib.federation.flower.box import DONE, Box, hand_in, listening
from dopamine_lib.federation.flower.config import (
    PLACES,
    flower_arguments,
    hospital_words,
    pyproject,
    words,
    write_app,
)
from dopamine_lib.federation.flower.letters import Letter, pack, unpack
from dopamine_lib.federation.flower.post import Lost, Post
from dopamine_lib.federation.wires.relay import Refused, Relay
from dopamine_lib.federation.wires.wire import SessionOver


def read(command):
    """The arguments of a command line of one party's."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    flower_arguments(parser)
    return parser.parse_args(["--identities", "keys", "--out", "results", *command])


def test_the_run_config_is_the_command_line():
    """Every option has its key, with its default; and a run-config stands for the command line that it names."""
    app = tomllib.loads(pyproject())["tool"]["flwr"]["app"]
    asked = vars(read([]))
    assert {key.replace("-", "_") for key in app["config"]} == asked.keys()
    for key, value in app["config"].items():
        if key not in ("identities", "out"):
            assert value == ("" if asked[key.replace("-", "_")] is None else asked[key.replace("-", "_")]), key
    given = {"epsilon": 3, "rounds": "auto", "setting": "FPDP", "least": 3, "resume": True, "data": "two words.csv"}
    found = vars(read(words(app["config"] | given)))
    assert {key: found[key] for key in given} == given
    assert chosen_options(argparse.Namespace(**found, settings=("FPDP",), runs=1)).data == "two words.csv"
    for module, _, name in (text.partition(":") for text in app["components"].values()):
        path = importlib.util.find_spec(module).origin
        with open(path, encoding="utf-8") as source:
            assert f"\n{name} = " in source.read(), "Flower looks for this name, and does not run the module"


def test_a_run_chooses_no_files_of_a_hospitals(refuses):
    theirs = {"data": "heart"} | dict.fromkeys(PLACES, "/theirs")
    node = {"partition-id": 1, "identities": "keys", "out": "mine", "num-partitions": 4}
    found = hospital_words(theirs, node)
    assert found == ["1", "--data", "heart", "--weights", "/theirs", "--identities", "keys", "--out", "mine"]
    assert "/theirs" not in hospital_words(theirs, node | {"weights": "own.npz"})
    with refuses("lacks identities and out"):
        hospital_words({}, {"partition-id": 1})
    with refuses("epsilom, which is no option"):
        words({"epsilom": 1.0})
    with refuses("epsilon is true", "takes a value"):
        words({"epsilon": True})
    with refuses("resume is --data-dir=/theirs", "takes true or false"):
        words({"resume": "--data-dir=/theirs"})


def test_an_app_is_written_once(tmp_path, refuses):
    assert write_app(tmp_path / "app").read_text(encoding="utf-8") == pyproject()
    with refuses("is there already"):
        write_app(tmp_path / "app")


def test_a_letter_comes_back_as_it_was_or_is_refused():
    letter = Letter(b"i" * 16, b"s" * 16, (0, 2), 3, 4, ((1, b"one"), (SERVER, b"")), True, "why", True)
    body = pack(letter)
    assert unpack(body) == letter
    for nonsense in (body + b"m", body[:-1], b""):
        with pytest.raises(MessageError, match=f"{len(nonsense)} bytes are no letter"):
            unpack(nonsense)
    chance, refused = random.Random(0), 0
    for _ in range(300):
        changed = bytearray(body)
        changed[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        changed = bytes(changed[: chance.choice([len(body), len(body), chance.randrange(len(body))])])
        try:
            found = unpack(changed)
        except MessageError:
            refused += 1
        else:  # what is changed within its bounds is for seals to find
            assert [type(field) for field in found] == [type(field) for field in letter]
    assert refused > 150


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_program_that_has_ended_says_so_and_who_hands_in_nonsense_disturbs_nobody(tmp_path, refuses):
    box = Box(30.0)
    with refuses("too long a name for a socket"), listening(box, tmp_path / ("long" * 30)):
        pass
    with listening(box, tmp_path / "s"):
        with pytest.raises((EOFError, OSError)):
            hand_in(tmp_path / "s", b"nonsense")
        box.close(DONE)
        assert unpack(hand_in(tmp_path / "s", pack(Letter()))).over == DONE
    with pytest.raises(OSError):
        hand_in(tmp_path / "s", pack(Letter()))


def test_a_node_says_in_one_line_why_it_has_ended():
    said, heard = [], threading.Event()

    def carry(number, letter):
        return pack(Letter(instance=b"i" * 16, over="done\nrun finished: epsilon 0.01 \x1b[2J" + "A" * 1000))

    post = Post(Relay(1), carry, pause=0.05, say=lambda line: (said.append(line), heard.set()))
    assert heard.wait(60)
    post.close()
    assert said[0].startswith("hospital 0 has ended: donerun finished") and said[0].isprintable() and len(said[0]) < 300


def test_a_letter_of_a_session_that_is_over_seats_nobody_however_late_it_comes():
    box, seats = Box(30.0), []

    def program():
        with contextlib.suppress(Refused):
            while True:
                if (seat := box.join()) is not None:
                    seats.append(seat.session)
                    box.attach(argparse.Namespace(awaited=(), waits=lambda: True))
                    with contextlib.suppress(SessionOver):
                        while True:
                            box.get(seat.session, 0)
        box.close(DONE)

    thread = threading.Thread(target=program, daemon=True)
    thread.start()
    first, second, third = (bytes([number]) * 16 for number in (1, 2, 3))
    for session in (first, second):
        box.answer(pack(Letter(session=session)))
        box.answer(pack(Letter(session=session)))
        assert unpack(box.answer(pack(Letter(session=session, over="one is gone")))).joining
    assert unpack(box.answer(pack(Letter(session=first)))).joining
    box.answer(pack(Letter(session=third)))
    box.answer(pack(Letter(over="enough", refused=True)))
    thread.join(60)
    assert seats == [first, second, third]


def test_idle_connections_keep_no_hospital_from_its_letters_and_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(box_module, "SAY", 0.05)
    box, path = Box(30.0), tmp_path / "s"
    with listening(box, path), contextlib.ExitStack() as open_ones:
        box.close(DONE)
        idle = [open_ones.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for one in idle:
            one.settimeout(60)
            one.connect(str(path))
        assert unpack(hand_in(path, pack(Letter()))).over == DONE
        assert [one.recv(1) for one in idle] == [b""] * 3


def test_a_node_that_replies_nonsense_is_its_own_loss_and_is_looked_for_again():
    """Nodes 10 to 12 are hospitals 0 to 2; 12 lies, or is replaced by 13."""
    pytest.importorskip("flwr", reason="Flower has an environment of its own: notebooks/pages/hospitals.md")
    from flwr.app import ConfigRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from dopamine_lib.federation.flower.app import Nodes

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    hospital, lies = {10: 0, 11: 1, 12: 2, 13: 2}, {}

    class Grid:
        here, sent = [10, 11, 12], {}

        def get_node_ids(self):
            return self.here

        def push_messages(self, messages):
            for message in messages:
                node, asked = (
                    message.metadata.dst_node_id,
                    "number" if "who" in message.content["carried"] else "letter",
                )
                reply = {"number": hospital[node]} if asked == "number" else {"letter": b"%d" % node}
                metadata = argparse.Namespace(reply_to_message_id=str(len(self.sent)))
                record = RecordDict({"carried": ConfigRecord(lies.get((node, asked), reply))})
                if lies.get((node, asked)) == {}:
                    record = RecordDict()
                found = argparse.Namespace(metadata=metadata, content=record, has_error=lambda: False)
                self.sent[metadata.reply_to_message_id] = found
                yield metadata.reply_to_message_id

        def pull_messages(self, names):
            return [self.sent[name] for name in names]

    for lie in ({"number": [1]}, {"nothing": 1}, {}):
        for asked in ("number", "letter"):
            lies.clear()
            lies[12, asked] = lie
            nodes = Nodes(Grid())
            with pytest.raises(Lost):
                nodes.carry(2, b"letter")
            assert nodes.carry(0, b"letter") == b"10"
            nodes.close()
    lies.clear()
    grid = Grid()
    nodes = Nodes(grid)
    assert nodes.carry(2, b"letter") == b"12"
    grid.here, lies[12, "letter"] = [10, 11, 13], {}
    with pytest.raises(Lost):
        nodes.carry(2, b"letter")
    assert nodes.carry(2, b"letter") == b"13"
    nodes.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two dozen exchanges of stock Flower, each with processes of its own
@pytest.mark.parametrize("kind", ["plain", "bfv"])
def test_a_run_over_flower_has_the_model_and_the_ledger_of_one_process(kind, tmp_path):
    """SuperLink and SuperNodes on this machine, with TLS and a key for each node; programs that the app starts."""
    pytest.importorskip("flwr", reason="Flower has an environment of its own: notebooks/pages/hospitals.md")
    from flower_deployment import Deployment

    asked = {"data": "heart", "hospitals": 4, "epsilon": 3.0, "rounds": 3, "seed": 5, "aggregation": kind}
    with Deployment(tmp_path, 4) as deployment:
        ran = deployment.run(**asked)
    result = json.loads((tmp_path / "server" / "results.json").read_text(encoding="utf-8"))["settings"]["FSCDP"]
    found = load_file(tmp_path / "server" / "FSCDP-0.safetensors")
    options = read(words(asked))
    options.settings, options.runs = ("FSCDP",), 1
    training = Experiment.load(chosen_options(options), progress=False).training("FSCDP").run()
    training.task.load(training.server.model)
    assert [ledger.charged for ledger in training.ledgers] == [result["steps"]], ran.stdout
    for key, value in training.task.net.state_dict().items():
        assert np.allclose(found[key], value.numpy(), rtol=0, atol=1e-6)
