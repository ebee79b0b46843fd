"""The same training between processes: equal results, own patients only, keys, and ranks that die."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.encryption.transcript import Transcript
from dopamine_lib.federation import settings
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.wires.identities import (
    fingerprints,
    make_identity,
    party_name,
    party_number,
    read_identity,
    read_publics,
)
from dopamine_lib.report.verification import read_results, verify

pytest.importorskip("mpi4py", reason="needs mpi4py and an MPI")
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
if MPIEXEC is None:
    pytest.skip("needs mpiexec", allow_module_level=True)

HERE = Path(__file__).parent
HOSPITALS = 3
#: Setting, aggregation, noise, rounds. The quick ones share one start of the ranks.
QUICK = [
    ("FSCDP", "bfv", "float", 12),
    ("FSCDP", "plain", "integer", 12),
    ("FSCDP", "bfv", "integer", 12),
    ("F", "masks", "float", 3),
]
SLOW = [("FSCDP", "masks", "float", 30), ("FSCDP", "masks", "integer", 30), ("FPDP", "bfv", "float", 3)]
SLOW += [("FSCDP", "plain", "float", 30), ("FPDP", "plain", "float", 3), ("F", "bfv", "float", 3)]


def mpi(ranks, *words, timeout=240):
    """Start ranks, each of which computes on one thread; accountants' warnings are left out."""
    more = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-W", "ignore", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | more)


@pytest.fixture(scope="module")
def options(tmp_path_factory, make_aptos):
    """Options of a quick experiment: 60 small images, a random backbone."""
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    terms = dict(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=HOSPITALS, seed=5, runs=1)
    # class counts are asked for with the mean features, and the last rounds for histograms, so that all are tried
    return terms | {"loss": "balanced", "specificity": 0.8}


def start(options, runs, out):
    """All ``runs`` in the same ranks, and an impostor at the end."""
    jobs = [
        {
            "options": options | {"settings": [name], "aggregation": kind, "noise": noise},
            "rounds": rounds,
            "out": str(out / f"{name}-{kind}-{noise}"),
            "keep": (name, kind, noise) == ("FSCDP", "bfv", "integer"),
        }
        for name, kind, noise, rounds in runs
    ]
    (out / "jobs.json").write_text(json.dumps([*jobs, {"impostor": True, "out": str(out / "impostor")}]))
    ended = mpi(HOSPITALS + 1, "-m", "mpi4py", HERE / "mpi_rounds.py", out / "jobs.json")
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.fixture(scope="module")
def quick(options, tmp_path_factory):
    return start(options, QUICK, tmp_path_factory.mktemp("quick"))


def one_process(options, name, kind, noise, rounds, patch):
    """The model of the same run in one process, as its file has it, and the thresholds that the run found."""
    more = {"participation": 1.0} if name == "F" else {}
    patch.setitem(settings.SETTINGS, name, replace(settings.SETTINGS[name], rounds=rounds, **more))
    patch.setitem(settings.CHOICES["head"], name, replace(settings.CHOICES["head"][name], reach=64.0))
    experiment = Experiment.load(Options(**options, settings=(name,), aggregation=kind, noise=noise), progress=False)
    training = experiment.training(name).run()
    training.task.load(training.server.model)
    return {key: value.numpy() for key, value in training.task.net.state_dict().items()}, training.thresholds


def check_same(options, out, run, patch, tolerance=1e-4):
    name, kind, noise, _ = run
    expected, thresholds = one_process(options, *run, patch)
    path = out / f"{name}-{kind}-{noise}" / f"{name}-0.safetensors"
    with safe_open(path, "np") as file:
        written = json.loads(file.metadata()["thresholds"])
    assert [*written.values()] == pytest.approx(thresholds or [], abs=0.01)
    found = load_file(path)
    assert found.keys() == expected.keys()
    size = max(np.abs(value).max() for value in expected.values())
    for key, value in expected.items():
        assert np.abs(found[key] - value).max() <= tolerance * size
    start = {key: np.zeros_like(value) for key, value in expected.items()}  # the planted fault: no training at all
    assert max(np.abs(start[key] - value).max() for key, value in expected.items()) > tolerance * size


@pytest.mark.parametrize("run", QUICK, ids=lambda run: "-".join(map(str, run)))
def test_the_model_is_that_of_one_process(options, quick, run, monkeypatch):
    """To 1e-4 of its largest weight: messages add up in the order in which they arrive."""
    check_same(options, quick, run, monkeypatch)


@pytest.mark.slow
def test_a_round_with_one_hospital_left_is_spent_by_all_ranks_alike(options, tmp_path, monkeypatch):
    """Budgets end at different times, and a hidden sum of one is not opened: nobody waits for it."""
    run, terms = ("FPDP", "bfv", "float", 60), options | {"epsilon": 1.0, "accountant": "rdp_classic"}
    start(terms, [run], tmp_path)
    check_same(terms, tmp_path, run, monkeypatch)
    (result,) = json.loads((tmp_path / "FPDP-bfv-float" / "results.json").read_text())["settings"].values()
    assert result["aborted_rounds"][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("FPDP", "own_code:median"), ("FSCDP", "bfv")])
def test_code_of_ones_own_gives_the_model_of_one_process(name, kind, options, tmp_path, monkeypatch):
    own, run = options | {"optimizer": "own_code:adam"}, (name, kind, "float", 3)
    start(own, [run], tmp_path)
    check_same(own, tmp_path, run, monkeypatch)


@pytest.mark.slow
def test_every_setting_and_aggregation(options, tmp_path):
    start(options, SLOW, tmp_path)
    for run in SLOW:
        with pytest.MonkeyPatch.context() as patch:
            check_same(options, tmp_path, run, patch)


def test_encrypted_integers_are_plain_integers_bit_for_bit(quick):
    plain, secure = (load_file(quick / f"FSCDP-{kind}-integer" / "FSCDP-0.safetensors") for kind in ("plain", "bfv"))
    assert all(np.array_equal(plain[key], secure[key]) for key in plain)
    rounded = load_file(quick / "FSCDP-bfv-float" / "FSCDP-0.safetensors")
    assert not all(np.array_equal(plain[key], rounded[key]) for key in plain)


def test_the_server_sees_no_key_and_no_message(quick):
    """All it received, opened, is searched; the same search finds what hospitals hold."""
    folder = quick / "FSCDP-bfv-integer"
    seen, kept = Transcript(), load_file(folder / "hospital.safetensors")
    for name, body in sorted(load_file(folder / "seen.safetensors").items()):
        seen.record(name, body.tobytes())
    secret, public, sent = kept["secret"].tobytes(), kept["public"].tobytes(), kept["sent"]
    assert len(seen.records) > 13 * HOSPITALS and len(sent) == 13  # the mean features, then every round
    assert seen.find(public) and not seen.find(secret, known=public)
    assert not seen.find_values(sent[3]) and not seen.find_values(sent[7])
    seen.record("planted", b"..." + secret + sent[3].astype("<i4").tobytes())
    assert seen.find(secret, known=public) and seen.find_values(sent[3])


def test_results_are_laid_out_like_those_of_reproduce(quick, options):
    results = json.loads((quick / "FSCDP-bfv-integer" / "results.json").read_text())
    result = results["settings"]["FSCDP"]
    train, test = results["patients"]["train"], results["patients"]["test"]
    assert train + test == 59 and sum(results["hospitals"]) == train  # of 60 images two are of one patient
    assert results["patients"]["counted"]
    assert max(results["hospitals"]) - min(results["hospitals"]) <= 1  # declared, not what each hospital has
    assert results["processes"] == HOSPITALS + 1 and results["options"]["aggregation"] == "bfv"
    assert result["history"][-1]["accuracy_mean"] == result["test_accuracy"]["mean"]
    assert result["adversaries"]["hospital"]["rdp"] > result["adversaries"]["server"]["rdp"] == result["epsilon"]["rdp"]
    assert "each party a process of its own" in result["statement"] and "one process" not in result["statement"]
    clear = json.loads((quick / "FSCDP-plain-integer" / "results.json").read_text())["settings"]["FSCDP"]
    assert "it saw every hospital's" in clear["statement"] and "simulation" not in clear["statement"]
    # whoever reads a hospital's own message has one share of noise against it
    assert clear["adversaries"]["server"]["rdp"] > 2 * clear["adversaries"]["hospital"]["rdp"]
    assert f"Against the server: epsilon {clear['adversaries']['server']['rdp_classic']:.2f}" in clear["statement"]
    assert not list(quick.glob("*/runs/*.safetensors"))  # a finished run needs no checkpoint


def test_a_report_believes_the_results_of_several_processes_but_not_changed_ones(quick, monkeypatch, refuses):
    results, folder = read_results(quick / "FSCDP-bfv-float" / "results.json")
    monkeypatch.setitem(settings.SETTINGS, "FSCDP", replace(settings.SETTINGS["FSCDP"], rounds=12))
    assert verify(results, folder)["FSCDP"].steps == 12
    with refuses("statement"):  # a run in one process would have said something else
        verify({key: value for key, value in results.items() if key != "processes"}, folder)


def test_messages_from_a_stranger_or_out_of_turn_are_refused(quick):
    stranger, turn = json.loads((quick / "impostor" / "refused.json").read_text())
    assert "from 1 is not authentic" in stranger and "is not number" in turn


@pytest.mark.parametrize("split", ["iid", "unequal"])
def test_a_party_keeps_only_its_own_rows(options, split):
    mine = Options(**options, settings=("FSCDP",), split=split)
    whole = Experiment.load(mine, progress=False)
    for number, rows in [*enumerate(whole.patients), (SERVER, whole.dataset.test)]:
        share = Experiment.load(mine, party=number, progress=False)
        assert share.dataset.images.base is None and not isinstance(share.dataset.images, np.memmap)
        assert np.array_equal(share.dataset.images, whole.dataset.images[rows])
        assert np.array_equal(share.labels, whole.labels[rows]) and len(share.features) == len(rows)
        assert torch.equal(share.features, whole.features[rows])
        assert share.sizes == whole.sizes != tuple(map(len, whole.patients))
        assert sum(share.sizes) == len(np.unique(whole.dataset.person[whole.train])) < len(whole.train)
        here = [k for k, own in enumerate(share.patients) if own is not None]
        assert here == ([] if number == SERVER else [number])
        assert len(share.dataset.train) == (0 if number == SERVER else len(rows)) == len(rows) - len(share.test)


def command(ending, options, out, *more):
    pairs = [
        (f"--{key.replace('_', '-')}", value) for key, value in options.items() if key not in ("hospitals", "runs")
    ]
    words = [word for pair in pairs for word in pair]
    return mpi(3, HERE / "mpi_dying.py", ending, *words, "--aggregation", "plain", "--out", out, *more)


def test_a_killed_rank_ends_the_run_with_a_message_and_a_checkpoint(options, tmp_path):
    ended = command("killed", options, tmp_path / "out")
    assert ended.returncode != 0
    assert ended.stderr.count("was killed, and MPI ends the run") == 1
    assert "hospital 1 (rank 2) was killed" in ended.stderr
    assert "--resume" in ended.stderr and not (tmp_path / "out" / "results.json").exists()
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "runs" / "FSCDP-0.safetensors", "pt") as file:
        record = json.loads(file.metadata()["state"])
    # 40 rounds are 100 epochs: with 24 rounds done, epoch 60 is, and its steps are charged before they are taken
    assert record["epoch"] in (60, 61) and record["reserved"] <= record["epoch"] + 1


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_to_the_same_model(options, tmp_path):
    ended = command("raises", options, tmp_path / "broken")
    assert ended.returncode != 0 and "hospital 1 (rank 2) gave up: RuntimeError: the disk is full" in ended.stderr
    assert "was killed" not in ended.stderr
    again = command("lives", options, tmp_path / "broken")
    assert again.returncode == 2 and "already holds a run; add --resume" in again.stderr
    assert command("lives", options, tmp_path / "broken", "--resume").returncode == 0
    assert command("lives", options, tmp_path / "whole").returncode == 0
    models = [load_file(tmp_path / name / "FSCDP-0.safetensors") for name in ("broken", "whole")]
    assert all(np.array_equal(models[0][key], models[1][key]) for key in models[1])
    finished = command("lives", options, tmp_path / "whole", "--resume")
    assert finished.returncode == 2 and "finished run" in finished.stderr


@pytest.mark.slow
def test_a_run_is_not_resumed_without_a_hospitals_ledger(options, tmp_path):
    """Hospital 0's checkpoint gone, the ledger had started at 0; each hospital now has its own charge on its disk."""
    assert command("killed", options, tmp_path / "out").returncode != 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "runs").iterdir()}
    names = ["FSCDP-0-hospital-0.json", "FSCDP-0-hospital-1.json", "FSCDP-0.safetensors"]
    assert sorted(path.name for path in kept) == names
    for lost, who in zip(names, ("hospital 0 (rank 1)", "hospital 1 (rank 2)", "hospital 0 (rank 1)"), strict=True):
        (tmp_path / "out" / "runs" / lost).unlink()
        refused = command("lives", options, tmp_path / "out", "--resume")
        assert refused.returncode == 2 and f"{who} have 0 epochs in the ledger" in refused.stderr
        for path, content in kept.items():
            path.write_bytes(content)
    assert command("lives", options, tmp_path / "out", "--resume").returncode == 0
    assert not list((tmp_path / "out" / "runs").glob("*hospital*"))


@pytest.mark.slow
@pytest.mark.parametrize("odd, value", [("--epsilon", ("1", "50")), ("--seed", ("5", "6"))])
def test_a_server_with_other_options_than_the_hospitals_is_refused(odd, value, options, tmp_path):
    more = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    words = ["--data", "aptos", "--data-dir", options["data_dir"], "--size", "32", "--weights", "random"]
    ranks = [
        ["-n", str(n), sys.executable, "-W", "ignore", "-m", "dopamine_lib.federation.mpi", *words]
        + ["--aggregation", "plain", "--out", str(tmp_path / "out"), odd, own]
        for n, own in zip((1, 2), value, strict=True)
    ]
    command = [MPIEXEC, *ranks[0], ":", *ranks[1]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | more)
    assert ended.returncode == 2 and odd[2:] + " = " in ended.stderr
    assert "start all parties with the same" in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "out" / "results.json").exists()


def test_bad_input_is_one_line():
    from dopamine_lib.federation.mpi.__main__ import main

    for words, said in (
        (["--out", "x"], "1 rank was started, but a server and two hospitals need 3"),
        (["identity", "nurse", "keys"], "party 'nurse' is unknown"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
                patch.delenv(name, raising=False)
            check_line(main, words, said, patch)


def check_line(main, words, said, patch):
    lines = []
    patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
    assert main(words) == 2 and len(lines) == 1 and said in lines[0] and "\n" not in lines[0]


def test_ranks_that_shared_memory_has_no_room_for_are_refused_by_the_first_of_a_host(monkeypatch, capsys):
    """MPICH's would be killed in the middle, which said nothing: 64 MB, as Docker gives, are enough for 11 ranks."""
    from dopamine_lib.federation.mpi import __main__ as mpi

    monkeypatch.setattr(mpi.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    mpi._check_shared_memory(11)
    for name, value in {"PMI_RANK": 20, "PMI_SIZE": 40, "MPI_LOCALRANKID": 0, "MPI_LOCALNRANKS": 20}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(mpi, "_rank", lambda arguments, rank: 0)
    assert mpi.main(["--out", "x"]) == 2
    error = capsys.readouterr().err
    assert "20 ranks take 108; make room" in error and "--shm-size" in error and len(error.splitlines()) == 1
    monkeypatch.setenv("MPI_LOCALRANKID", "1")
    assert mpi.main(["--out", "x"]) == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "more, said",
    [
        (["--setting", "CDP"], "not federated"),
        (["--hospitals", "9"], "hospitals is 9"),
        (["--patience", "0"], "patience"),
    ],
)
def test_options_that_do_not_fit_are_refused(monkeypatch, capsys, more, said):
    from dopamine_lib.federation.mpi.__main__ import main

    monkeypatch.setenv("PMI_RANK", "0"), monkeypatch.setenv("PMI_SIZE", "3")
    assert main([*more, "--out", "x"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    monkeypatch.setenv("PMI_RANK", "1")
    assert main([*more, "--out", "x"]) == 2 and capsys.readouterr().err == ""  # one line in all, not one per rank


def test_identities(tmp_path, refuses, capsys):
    from dopamine_lib.federation.mpi.__main__ import main

    for number in (0, 1, SERVER):
        assert party_number(party_name(number)) == number
        assert main(["identity", party_name(number), str(tmp_path)]) == 0
    private = (tmp_path / "hospital-0.key").read_text().strip()
    printed = capsys.readouterr().out
    assert "fingerprint" in printed and private not in printed
    assert stat.S_IMODE((tmp_path / "hospital-0.key").stat().st_mode) == 0o600
    publics = read_publics(tmp_path, 2)
    assert set(publics) == {0, 1, SERVER} and len(set(publics.values())) == 3
    one, other = (read_identity(tmp_path, number, publics) for number in (0, SERVER))
    assert one.agree(other.public, b"x") == other.agree(one.public, b"x")
    with refuses("hospital-0.key is there already"):
        make_identity(tmp_path, "hospital-0")
    assert main(["fingerprints", str(tmp_path)]) == 0
    told = sorted(line.partition(";")[0] for line in printed.splitlines())
    assert capsys.readouterr().out.splitlines() == told and len(told) == 3
    with refuses("no .pub file", str(tmp_path / "empty")):
        fingerprints(tmp_path / "empty")
    with refuses("hospital-2.pub cannot be used", "get it from its owner"):
        read_publics(tmp_path, 3)
    with refuses("does not belong to hospital-0.pub"):
        read_identity(tmp_path, 0, publics | {0: publics[1]})
    good = (tmp_path / "hospital-1.pub").read_text()
    (tmp_path / "hospital-1.pub").write_text((tmp_path / "hospital-0.pub").read_text())
    with refuses("parties 0 and 1 have the same public key", "from its owner"):
        read_publics(tmp_path, 2)
    (tmp_path / "hospital-1.pub").write_text("00" * 32)
    with refuses("hospital-1.pub: a public key is of low order", "from its owner"):
        read_publics(tmp_path, 2)
    (tmp_path / "hospital-1.pub").write_text(good)
    (tmp_path / "hospital-0.key").chmod(0o644)
    with refuses("can be read by others"):
        read_identity(tmp_path, 0, publics)
    (tmp_path / "hospital-1.pub").write_text("00" * 31)
    with refuses("hospital-1.pub holds no key of 64 hexadecimal digits"):
        read_publics(tmp_path, 2)
    for name in ("hospital", "hospital-01", "hospital--1", "server-0"):
        with refuses(f"party '{name}' is unknown"):
            party_number(name)


def test_the_scaling_benchmark_measures_fits_and_predicts(tmp_path, noisy_python):
    from dopamine_lib.benchmarks import scaling

    result = scaling.run(tmp_path / "out.json", hospitals=(2,), sizes=(5000,), rounds=1)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    rows = {row["name"]: row["value"] for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * (4 + 3 * 2) and all(value >= 0 for value in rows.values())
    # up and down: one ciphertext of at least 4096 slots each way, or four bytes per value
    assert 60_000 < rows["hospital's bytes, bfv, K = 2, d = 5000"] < 300_000
    assert 2 * 20_000 < rows["hospital's bytes, masks, K = 2, d = 5000"] < 2 * 20_000 + 5_000


@pytest.mark.slow
def test_the_wires_benchmark_measures_every_wire(tmp_path, noisy_python, refuses):
    from dopamine_lib.benchmarks import wires

    result = wires.run(tmp_path / "out.json", hospitals=(2,), sizes=(50,), rounds=1, turns=1)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == result
    rows = {row["name"]: row["value"] for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 * (1 + 3) and all(value > 0 for value in rows.values())
    # up eight bytes a value; down four, with how many and which hospitals are in it; sealed both
    assert rows["bytes of a hospital, plain, K = 2, d = 50"] == (8 + 4) * 50 + 2 * (1 + 2) + 2 * 27
    (noisy_python / "grpc.py").write_text("raise ImportError('none here')", encoding="utf-8")
    with refuses("over gRPC failed", "none here", "pip install"):
        wires._over("gRPC", {"K": 2, "sizes": [50], "kinds": ["plain"], "rounds": 1})


def test_the_fit_finds_what_is_there_and_says_when_it_is_not():
    from dopamine_lib.benchmarks.scaling import fit

    at = np.array([(k, d) for k in (2, 5, 10, 20) for d in (25_000, 725_061)], float)
    k, d = at.T
    coefficients, worst = fit(at, 0.5 + 0.01 * k + 1e-6 * d + 2e-7 * k * d)
    assert np.allclose(coefficients, [0.5, 0.01, 1e-6, 2e-7], rtol=1e-6) and worst < 1e-9
    assert fit(at, k**3 * d)[1] > 0.1
