"""``bench inference``: its rows say what they should, and a target that is missed is said to be."""

import json

import pytest

from dopamine_lib.benchmarks import inference
from dopamine_lib.benchmarks.measure import at_most


def test_crypten_is_held_against_offline_and_online_together():
    rows = inference._against_crypten(peer=10.0, online=0.05, total=0.2, size=64)
    assert rows[0]["ratio"] == pytest.approx(50) and rows[0]["holds"] is True
    assert rows[1]["ratio"] == pytest.approx(200) and rows[1]["target"] is None
    assert inference._against_crypten(peer=10.0, online=0.05, total=0.4, size=64)[0]["holds"] is False
    assert inference._against_crypten(peer=10.0, online=0.05, total=0.2, size=224)[0]["holds"] is False
    assert inference._against_crypten(peer=10.0, online=0.05, total=0.2, size=96)[0]["holds"] is None


def test_a_bound_holds_or_not():
    assert at_most("x", 0.4, "s", 0.4)["holds"] is True
    assert at_most("x", 0.41, "s", 0.4)["holds"] is False
    assert at_most("x", 0.41, "s", None)["target"] is None


@pytest.mark.slow
def test_the_benchmark_runs_and_its_sizes_hold(tmp_path, monkeypatch):
    """Without CrypTen. Times are for whoever reads them; bytes and memory must hold on any machine."""
    monkeypatch.setattr(inference, "_crypten_folder", lambda: None)
    result = inference.run(tmp_path / "bench.json", size=64, repeats=2, warm_up=1)
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert not any("CrypTen" in name for name in rows)
    assert all(row["holds"] for row in rows.values() if row["unit"] in ("MB", "GB", "bytes")), rows
    assert rows["online, 64 px"]["value"] > 0 and rows["rounds online"]["value"] > 50
