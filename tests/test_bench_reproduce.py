"""``bench reproduce``: its rows say what they should, and a target that is missed is said to be."""

import json

import pytest

from dopamine_lib.benchmarks import reproduce
from dopamine_lib.benchmarks.measure import at_most


@pytest.fixture
def no_aptos(monkeypatch, tmp_path):
    monkeypatch.setenv("DOPAMINE_SHARED", str(tmp_path / "nowhere"))


def test_a_target_holds_or_is_missed(no_aptos):
    assert at_most("x", 40.0, "s", 40)["holds"] is True
    missed = at_most("x", 41.0, "s", 40, "one process", 82.0)
    assert missed["holds"] is False and missed["ratio"] == pytest.approx(0.5)
    assert reproduce._aptos() is None


def test_a_job_that_fails_is_no_figure(monkeypatch, capfd):
    """A whole job is a program of its own: its failure must not be timed."""
    with pytest.raises(reproduce.subprocess.CalledProcessError):
        reproduce._job_seconds({"runs": 0, "settings": ["C"]})
    assert "runs is 0" in capfd.readouterr().err


@pytest.mark.slow
def test_rows_of_a_short_job(monkeypatch, no_aptos, tmp_path):
    """The jobs themselves are replaced by what they would have taken; the settings are measured."""
    asked = []

    def seconds(options, *, workers=None, cache=None):
        asked.append((options["runs"], workers, cache))
        return {1: 60.0, None: 30.0}[workers] + 70.0 * (len(asked) == 1)

    monkeypatch.setattr(reproduce, "_job_seconds", seconds)
    result = reproduce.run(tmp_path / "bench.json", settings=("F",), repeats=1)
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    cold, warm = (rows[f"1 settings x 5 runs, {cache}"] for cache in ("nothing cached", "cached"))
    assert cold["value"] == 100 and cold["holds"] and warm["value"] == 30 and warm["ratio"] == 0.5
    assert len({cache for _, _, cache in asked}) == 1  # the second job finds what the first has cached
    assert (
        rows["one run of F"]["value"] > 0
        and rows["clipped sums of 10 hospitals' samples by a compiled loop"]["ratio"] > 0
    )
