"""``bench inference``: its rows say what they should, and a target that is missed is said to be."""

import json
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest

from dopamine_lib.benchmarks import inference, peers
from dopamine_lib.benchmarks.link import Link
from dopamine_lib.benchmarks.measure import at_most


@pytest.fixture
def crypten():
    """A peer that took 10 s, after a first turn of 99."""
    peer = peers.Peer("CrypTen", [])
    peer.name, peer.seconds, peer.processor = "crypten 0.4.1", [99.0, 10.0], [99.0, 18.0]
    peer.logits = [0.0, 1.0, 2.1]
    return peer


def test_a_peer_is_held_against_offline_and_online_together(crypten):
    def rows(offline, size):
        answers = [{"seconds_online": 0.05, "seconds_offline": offline, "processor": 0.2}]
        return inference._against("", crypten, answers, 1, inference.TARGETS["CrypTen"].get(size))

    both, online, *rest = rows(0.15, 64)
    assert both["ratio"] == pytest.approx(50) and both["holds"] is True and both["peer"] == crypten.name
    assert online["ratio"] == pytest.approx(200) and online["target"] is None
    assert [(row["value"], row["ratio"]) for row in rest] == [(0.2, pytest.approx(90))] * inference.PROC
    assert rows(0.35, 64)[0]["holds"] is False
    assert rows(0.15, 224)[0]["holds"] is False
    assert rows(0.15, 96)[0]["holds"] is None


def test_a_peer_that_computes_another_network_is_found(crypten):
    wanted = np.array([0.0, 1.0, 2.0])
    assert inference._error_of(crypten, wanted)["value"] == pytest.approx(0.05)
    assert not inference._error_of(crypten, wanted)["holds"]
    assert inference._error_of(crypten, np.array([0.0, 1.0, 2.099]))["holds"]


def test_a_bound_holds_or_not():
    assert at_most("x", 0.4, "s", 0.4)["holds"] is True
    assert at_most("x", 0.41, "s", 0.4)["holds"] is False
    assert at_most("x", 0.41, "s", None)["target"] is None


def test_a_link_delivers_everything_in_order_and_no_sooner_than_its_rate_and_distance_allow():
    data = os.urandom(200_000)
    with (
        socket.create_server(("127.0.0.1", 0)) as there,
        Link(there.getsockname(), 0.1, 8e6) as link,
        socket.create_connection(link.address) as here,
        there.accept()[0] as end,
    ):
        begin = time.monotonic()
        threads = [threading.Thread(target=one.sendall, args=(data,)) for one in (here, end)]
        for thread in threads:
            thread.start()
        for one in (end, here):  # both ways at once
            assert one.recv(len(data), socket.MSG_WAITALL) == data
        assert time.monotonic() - begin > 0.05 + len(data) * 8 / 8e6
        for thread in threads:
            thread.join()
        here.shutdown(socket.SHUT_WR)
        assert end.recv(1) == b""


#: What ``crypten_peer`` needs of CrypTen, in the clear.
CRYPTEN = """
import os, types, torch
class Conv2d(torch.nn.Conv2d):
    def set_parameter(self, name, value):
        setattr(self, name, torch.nn.Parameter(value))
    def encrypt(self, src):
        return self
def init():
    os.write(1, b"a library says hello")
torch.Tensor.max_pool2d = torch.nn.functional.max_pool2d
torch.Tensor.get_plain_text = lambda self, dst: self if os.environ["RANK"] == str(dst) else print(self)
nn, cat, cryptensor = types.SimpleNamespace(Conv2d=Conv2d), torch.cat, lambda x, src: x
"""


@pytest.mark.slow
def test_crypten_may_print_and_its_death_is_heard(noisy_python, tmp_path, monkeypatch):
    (noisy_python / "crypten.py").write_text(CRYPTEN)
    (noisy_python / "crypten-1.2.dist-info").mkdir()
    (noisy_python / "crypten-1.2.dist-info" / "METADATA").write_text("Name: crypten\nVersion: 1.2\n")
    monkeypatch.setenv("DOPAMINE_CRYPTEN", str(noisy_python))
    *_, net, x = inference._model_and_image(tmp_path, 32)
    with peers.crypten(tmp_path) as peer:
        assert peer.name.startswith("crypten 1.2, ")
        peer(), peer()
        assert len(peer.seconds) == 2 and min(peer.seconds) > 0
        assert inference._error(peer.logits, inference._plain(net, x)) < 1e-5
        os.kill(peer._parties[1].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="process of CrypTen ended"):
            peer()
        monkeypatch.setattr(peers, "PATIENCE", 0.5)
        os.kill(peer._parties[0].pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"silent for 0\.5 s"):
            peer()
    assert not any(party.alive for party in peer._parties)


def test_spu_is_left_out_unless_it_is_named(tmp_path, monkeypatch, refuses):
    monkeypatch.delenv("DOPAMINE_SPU", raising=False)
    assert peers.spu(tmp_path, 32, "ABY3") is None
    monkeypatch.setenv("DOPAMINE_SPU", str(tmp_path / "python"))
    with refuses("DOPAMINE_SPU is ", "no program is there", "name the Python"):
        peers.spu(tmp_path, 32, "ABY3")
    monkeypatch.setattr(inference, "_model_and_image", lambda *given: pytest.fail("it has begun"))
    with refuses("DOPAMINE_SPU is "):
        inference.run(size=32)


def test_a_peer_that_does_not_begin_is_ended():
    class Party:
        closed = False

        def hear(self, patience):
            raise EOFError

        def close(self, patience):
            self.closed = True

    parties = [Party(), Party()]
    with pytest.raises(RuntimeError, match="process of SPU ended"), peers.Peer("SPU", parties):
        pytest.fail("it has begun")
    assert all(party.closed for party in parties)


@pytest.mark.slow
@pytest.mark.skipif("DOPAMINE_SPU" not in os.environ, reason="needs SPU, whose Python DOPAMINE_SPU names")
@pytest.mark.parametrize("protocol, parties", [("ABY3", 3), ("SEMI2K", 2)])
def test_spu_computes_the_same_network(tmp_path, protocol, parties):
    """In its own environment, beside another NumPy; at 40 pixels windows of the pooling stand over the edge."""
    *_, net, x = inference._model_and_image(tmp_path, 40)
    with peers.spu(tmp_path, 40, protocol) as peer:
        assert peer.name.startswith(f"spu 0.9.5, {protocol}, {parties} parties, 64 bits")
        peer(), peer()
        assert len(peer.seconds) == 2 and min(peer.seconds) > 0
        assert inference._error(peer.logits, inference._plain(net, x)) < 1e-3


@pytest.mark.slow
def test_the_benchmark_runs_and_its_sizes_hold(tmp_path, monkeypatch):
    """Without peers. Times are for whoever reads them; bytes and memory must hold on any machine."""
    monkeypatch.setattr(peers, "crypten", lambda folder: None)
    monkeypatch.delenv("DOPAMINE_SPU", raising=False)
    monkeypatch.setattr(inference, "ALONE", None)
    result = inference.run(tmp_path / "bench.json", size=64, repeats=2, warm_up=1)
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert not any("CrypTen" in name for name in rows)
    assert all(row["holds"] for row in rows.values() if row["unit"] in ("MB", "GB", "bytes")), rows
    assert rows["online, 64 px"]["value"] > 0 and rows["rounds online"]["value"] > 50
    assert rows["images a minute, 4 at once"]["value"] > 0
    assert rows["the same, 4 at once"]["value"] > 0
    assert sum("at once, an image" in name for name in rows) == 2
    afar = [row for row in rows.values() if row["peer"] == "messages alone"]
    assert len(afar) == 2 and all(row["value"] > row["peer_value"] > 0.5 for row in afar), afar


@pytest.mark.slow
def test_answers_held_against_plain_torch_s(refuses):
    rows = inference.run(size=32, images=12, model="squeezenet")["rows"]
    assert [row["value"] for row in rows[:1]] == [12] and all(rows[i]["holds"] for i in (0, 2, 3)), rows
    with refuses("model is 'mine'", "torchvision"):
        inference.run(size=32, images=1, model="mine")
    with refuses("images is 0"):
        inference.run(images=0)


@pytest.mark.slow
def test_the_rows_without_a_crypto_provider(monkeypatch):
    """Two processes, and ahead of the query some hundred times what a crypto-provider sends."""
    monkeypatch.delenv("DOPAMINE_SPU", raising=False)
    rows = {row["name"]: row["value"] for row in inference._without_crypto_provider(32, queries=1, warm_up=0)}
    name = "without a crypto-provider, 32 px"
    assert rows[f"{name}, offline"] > rows[f"{name}, online"] > 0
    assert 20 < rows[f"{name}, both directions offline"] < 200
