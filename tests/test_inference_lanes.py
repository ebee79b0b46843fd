"""Queries that share their rounds: each goes as if it were alone, and what ends one ends all."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.rehearsal import Rehearsal, at_once
from dopamine_lib.inference.protocols.channel import ChannelError, local_pair
from dopamine_lib.inference.protocols.lanes import side_by_side


def test_messages_of_all_lanes_cross_as_one():
    """Each lane gets its own part back, whoever comes first."""
    one, other = local_pair(timeout=20)
    got = {side: [bytearray(3) for _ in range(4)] for side in "ab"}

    def lane(side, number):
        def work(channel):
            channel.exchange(5, side.encode() + bytes([number, 0]), got[side][number])
            channel.send(6, b"xy") if side == "a" else channel.receive(6, bytearray(2))
            return number

        return work

    a, b = ([lane(side, number) for number in range(4)] for side in "ab")
    assert at_once(lambda: side_by_side(one, a), lambda: side_by_side(other, b)) == [[0, 1, 2, 3]] * 2
    assert got["a"] == [b"b%c\0" % number for number in range(4)] and one.rounds == 1
    assert (one.sent, one.received) == (4 * 3 + 4 * 2, 4 * 3)


def test_a_lane_that_fails_ends_the_others_and_says_why():
    one, other = local_pair(timeout=20)

    def failing(channel):
        raise ValueError("the third")

    waits = [lambda lane: lane.receive(1, bytearray(1))] * 2
    with pytest.raises(ValueError, match="the third"):
        side_by_side(one, [*waits, failing])
    with pytest.raises(ChannelError):
        other.receive(1, bytearray(1))
    assert threading.active_count() < 20


def test_lanes_that_are_out_of_step_or_whose_peer_is_gone():
    one, other = local_pair(timeout=20)
    with pytest.raises(ChannelError, match=r"messages \[1, 2\] at once"):
        side_by_side(one, [lambda lane: lane.send(1, b""), lambda lane: lane.send(2, b"")])
    one, other = local_pair(timeout=20)
    other.close()
    with pytest.raises(ChannelError, match="closed the connection"):
        side_by_side(one, [lambda lane: lane.receive(1, bytearray(1))] * 3)


@pytest.fixture(scope="module")
def session():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    x = torch.rand(6, 3, 8, 8) * 2 - 1
    with Rehearsal(*compile_model(net, 8, x), seed=3) as session:
        yield session, x.numpy(), net(x).detach().numpy()


def test_a_batch_is_as_private_as_its_queries(session):
    """Every query has masks of its own: of one picture asked three times at once no message is sent twice."""
    session, x, wanted = session
    for _ in range(3):
        session.prepare()
    session.patient_end.log.clear()
    answers, _ = at_once(lambda: session.patient.infer_all([x[0]] * 3), lambda: session.provider.serve(3))
    for logits, exceeded in answers:
        assert np.abs(logits - wanted[0]).max() < 1e-3 * np.ptp(wanted) and not exceeded
    long = [data for _, _, data in session.patient_end.log if len(data) >= 3 * 36]
    assert len(long) > 8
    for data in long:
        third = len(data) // 3
        assert len({data[i * third : (i + 1) * third] for i in range(3)}) == 3
    assert session.patient.ready == session.provider.ready == 0


def test_who_is_warned(session):
    """The bit that a value was near the ring's end is each picture's own."""
    session, x, _ = session
    plan = session.plan
    for _ in range(2):
        session.prepare()
    wild = x[1].copy()
    encode = type(plan).encode
    with pytest.MonkeyPatch.context() as patch:  # a picture that no camera takes
        patch.setattr(type(plan), "encode", lambda self, y: encode(self, y) * np.uint32(2**12 if y is wild else 1))
        answers, _ = at_once(lambda: session.patient.infer_all([wild, x[2]]), lambda: session.provider.serve(2))
    assert [exceeded for _, exceeded in answers] == [True, False]
