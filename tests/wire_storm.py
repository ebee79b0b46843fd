"""Runs in which hospitals and the server are killed, delayed and started again at random; what must hold is checked.

    python tests/wire_storm.py [ROUNDS] [bfv|masks|plain] [gRPC|letters]

No hang, no total of fewer than are needed, one total a round for all, no noise before its charge is on disk, no charge
that is lost, and every death of a hospital in a session explained in one line.
"""

import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from wire_runs import Run, note_totals

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.federation import settings
from dopamine_lib.federation.wires import party


def storm(options, out, *, rounds, hospitals=5, least=3, wired="", seconds=600.0, deadly=0.004, seed=0):
    """One run, and what happened in it: deaths, sessions, rounds with a total, seconds."""
    chance, begin = random.Random(seed), time.monotonic()

    def doomed(number, life, message):
        drawn = chance.random()
        if number == SERVER:  # a line that it is told
            return message.startswith(b"FSCDP, epoch") and drawn < 0.1
        if drawn > 0.99:
            time.sleep(chance.uniform(0.0, 0.05))
        return drawn < deadly

    with pytest.MonkeyPatch.context() as patch:
        sound = settings.SETTINGS["FSCDP"]
        patch.setitem(settings.SETTINGS, "FSCDP", replace(sound, rounds=rounds, epochs=rounds // 3))
        patch.setattr(party, "assemble", _unaccounted)
        terms = {"hospitals": hospitals, "least": least, "seed": None}
        run = Run(options | terms, out, doomed=doomed, back=0.05, wired=wired)
        note_totals(patch, lambda: run)
        run.run(seconds)
    assert run.results is not None and not run.errors, (run.said[-5:], run.errors)
    result, totals = run.results["settings"]["FSCDP"], {}
    for _, number, included in run.included:
        assert len(included) >= least and totals.setdefault(number, included) == included
    assert result["charged"] == [run.plan.setting.steps]
    assert not any("\n" in line for line in run.said)
    killed = sum(lives for number, lives in run.lives.items() if number != SERVER)
    told = [line for line in run.said if line.startswith("hospital ") and " epoch" not in line]
    return {
        "deaths": killed,
        "of the server": run.lives[SERVER],
        "told": len(told),
        "sessions": sum("hospitals, from epoch" in line for line in run.said),
        "rounds with a total": len(totals),
        "seconds": round(time.monotonic() - begin, 1),
    }


def _unaccounted(experiment, begun, records, account, **more):
    return {"settings": {name: {**record, "statement": "none"} for name, (record,) in records.items()}}


if __name__ == "__main__":
    rounds = int(next((word for word in sys.argv[1:] if word.isdecimal()), 300))
    kind = next((word for word in sys.argv[1:] if word in ("bfv", "masks", "plain")), "masks")
    wired = next((word for word in sys.argv[1:] if word in ("gRPC", "letters")), "")
    options = {"data": "synthetic", "settings": ["FSCDP"], "runs": 1, "aggregation": kind}
    with tempfile.TemporaryDirectory() as folder:
        print(storm(options, Path(folder), rounds=rounds, wired=wired))
