"""The aggregation benchmark: its rows, its peers, and the shared way of measuring, at small sizes."""

import json
import time

import numpy as np
import pytest

from dopamine_lib.benchmarks import aggregation, measure
from dopamine_lib.benchmarks.aggregation_rounds import (
    MaskedRound,
    MeasuredRound,
    NaiveRound,
    reference_decode,
    reference_encode,
    updates,
)
from dopamine_lib.encryption import group


def test_rows(tmp_path, capfd):
    result = aggregation.run(tmp_path / "out.json", d=13_000, head=100, hospitals=2, repeats=1)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) and result["machine"]
    for row in rows.values():
        assert set(row) == {"name", "value", "unit", "peer", "peer_value", "ratio", "target", "holds"}
        assert row["value"] > 0 and (row["peer"] is None) == (row["ratio"] is None)
        assert isinstance(row["holds"], bool if row["target"] else type(None))
    promised = {name for name, row in rows.items() if row["target"]}
    assert len(promised) == 6 and {"encrypt, packed", "sent, packed", "encode and decode, packed"} <= promised
    # 4 ciphertexts against 2 with half the primes; seconds depend on the machine's load
    assert rows["sent, packed"]["ratio"] < 0.5 and rows["sent, packed"]["holds"]
    ours = rows["encode and decode, packed"]
    assert ours["ratio"] == ours["peer_value"] / ours["value"] and ours["holds"] == (ours["ratio"] >= 20)
    assert capfd.readouterr() == ("", "")  # TenSEAL warns on standard output of vectors over 4096 values


def test_parts_make_a_round():
    """The parts are inside the round and leave some of it over; outside of nothing is all of it."""
    measured = MeasuredRound("packed", 5000, 3)
    plain = group.BFVVector
    for _ in range(3):
        measured()
    assert group.BFVVector is plain and measured.round == 3
    parts = [part for part in measured.seconds if part != "round"]
    assert sorted(parts) == sorted(set(aggregation.PARTS) - {"round"})
    for turn in range(3):
        assert 0 < sum(measured.seconds[part][turn] for part in parts) < measured.seconds["round"][turn]
    assert 0 < measured.outside(*parts) < measured.outside(*aggregation.SEAL) < 1 == measured.outside("round") + 1


def test_a_part_that_takes_longer_shows(monkeypatch):
    """The planted fault: encryption slowed down by 50 ms is 50 ms in "encrypt", and nowhere else."""
    plain = group.BFVVector

    def slow(context, data):
        time.sleep(0.05 if isinstance(data, list) else 0)
        return plain(context, data)

    monkeypatch.setattr(group, "BFVVector", slow)
    slowed = MeasuredRound("packed", 100, 2)
    for _ in range(3):
        slowed()
    assert slowed.median("encrypt") > 0.05 > slowed.median("read")


def test_peers_do_the_same_work():
    x = np.array([-20.48, -1.5, -0.001, 0.0, 0.002, 20.48])
    chunks = reference_encode(x.tolist())
    assert chunks == [[20481, 39461, 40960, 0, 2, 20480]]
    assert np.allclose(reference_decode(chunks), x)
    assert [len(chunk) for chunk in reference_encode([0.0] * 5000)] == [4096, 904]
    masks, naive = MaskedRound(100, 3), NaiveRound(100, 3)
    masks(), naive()
    assert masks.bytes > 400 and naive.bytes > 10_000 and len(masks.seconds) == len(naive.seconds) == 1
    units = np.round(updates(100, 1)[0] / 3, 3) * 1000
    assert np.abs(np.array(naive.total[0].decrypt()) - units).max() <= 1


def test_measuring():
    order = []
    taken = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3 and {name: len(each) for name, each in taken.items()} == {"a": 2, "b": 2}
    assert measure.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}
    with pytest.raises(ValueError, match="repeats is 0"):
        measure.interleaved({}, 0)
    with pytest.raises(ValueError, match="give both or neither"):
        measure.row("x", 1.0, "s", target="fast")
    with pytest.raises(ValueError, match="JSON"):
        measure.write([measure.row("x", float("nan"), "s")])
