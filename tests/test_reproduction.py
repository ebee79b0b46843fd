"""The main job from the command line: its files, its errors, and being killed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from reproduction_runs import arguments, checkpoints
from safetensors.torch import load_file

from dopamine_lib.__main__ import main, parser
from dopamine_lib.data import load
from dopamine_lib.errors import InputError
from dopamine_lib.federation.arguments import chosen_options
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import NotFinite
from dopamine_lib.federation.metrics import SCORES
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.own_settings import read_settings
from dopamine_lib.federation.results_table import table
from dopamine_lib.federation.run_folder import read_record, write_record
from dopamine_lib.federation.settings import EPOCHS, SETTINGS
from dopamine_lib.federation.training import Training
from dopamine_lib.models.checkpoints import load_model
from dopamine_lib.models.networks import squeezenet, to_input
from dopamine_lib.privacy.accounting import ACCOUNTANTS
from dopamine_lib.reproduction import tuning
from dopamine_lib.reproduction.run import reproduce
from dopamine_lib.reproduction.tuning import tuned_table


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_aptos):
    """Options of a quick experiment: 60 small images, a random backbone, the paper's step counts."""
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    return dict(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4)


def rounded(result):
    """A result to twelve digits: the PRV accountant's last ones depend on the number of threads."""
    return json.loads(json.dumps(result), parse_float=lambda number: float(f"{float(number):.12g}"))


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """By a user whose pictures are set by LaTeX, which is not there: that is no reason to lose a run's."""
    out = tmp_path_factory.mktemp("results")
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40}):
        results = reproduce(Options(**small, runs=2, seed=5), out, progress=False, workers=1)
        assert matplotlib.rcParams["text.usetex"]
    return results, out


def test_results_have_the_documented_keys(finished):
    results, out = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["data"] == "aptos" and results["model"] == "head" and results["weights"] == "random start"
    assert "teaching" in results["randomness"]
    assert list(results["settings"]) == list(SETTINGS)
    for name, result in results["settings"].items():
        declared = SETTINGS[name]
        assert (result["sample_rate"], result["steps"]) == (declared.sample_rate, declared.steps)
        accuracy = result["test_accuracy"]
        assert len(accuracy["runs"]) == 2 and accuracy["mean"] == pytest.approx(np.mean(accuracy["runs"]))
        assert accuracy["std"] == pytest.approx(np.std(accuracy["runs"], ddof=1))
        assert len(result["recall_per_grade"]) == 5 and len(result["quadratic_kappa"]["runs"]) == 2
        assert [record["epoch"] for record in result["history"]] == list(range(1, EPOCHS + 1))
        assert result["history"][-1]["accuracy_mean"] == pytest.approx(accuracy["mean"])
        if declared.private:
            assert set(result["epsilon"]) == set(ACCOUNTANTS)
            spent = [record["epsilon_rdp_classic"] for record in result["history"]]
            assert all(np.diff(spent) >= 0) and spent[-1] == pytest.approx(result["epsilon"]["rdp_classic"])
            assert "Neighbours" in result["statement"] and "SEEDED" in result["statement"]
        else:
            assert result["epsilon"] is None and "not private" in result["statement"]
    assert results["settings"]["FPDP"]["epsilon_worst"]["prv"] >= results["settings"]["FPDP"]["epsilon"]["prv"]
    curious = results["settings"]["FSCDP"]["adversaries"]["hospital"]["prv"]
    assert curious > results["settings"]["FSCDP"]["adversaries"]["server"]["prv"]
    assert results["settings"]["CDP"]["adversaries"]["server"] is None


def test_metrics_are_the_results_row_by_row(finished):
    results, out = finished
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {tuple(row[key] for key in ("setting", "run", "epoch", "score")): float(row["value"]) for row in rows}
    assert len(found) == len(rows)
    for name, result in results["settings"].items():
        stated = {"accuracy": result["test_accuracy"]} | {key: result[key] for key in SCORES[1:]}
        stated |= {f"accuracy ({group})": own for group, own in result["group_accuracy"].items()}
        for score, spread in stated.items():
            last = [found[name, str(run), str(EPOCHS), score] for run in (0, 1)]
            assert last == spread["runs"] and np.mean(last) == pytest.approx(spread["mean"], abs=1e-12)
        recalls = [
            [found.get((name, str(run), str(EPOCHS), f"recall_{grade}")) for run in (0, 1)] for grade in range(5)
        ]
        means = [None if None in own else pytest.approx(np.mean(own), abs=1e-12) for own in recalls]
        assert means == result["recall_per_grade"]
        assert result["balanced_accuracy"]["mean"] == pytest.approx(
            np.mean([m for m in result["recall_per_grade"] if m is not None])
        )
        for record in result["history"]:
            each = [found[name, str(run), str(record["epoch"]), "accuracy"] for run in (0, 1)]
            assert np.mean(each) == pytest.approx(record["accuracy_mean"], abs=1e-12)


def test_scores_are_shown_beside_accuracy(finished):
    results, _ = finished
    lines = table(results).splitlines()
    (start,) = (i for i, line in enumerate(lines) if "sight-threatening" in line)
    for line, (name, result) in zip(lines[start + 2 :], results["settings"].items(), strict=False):
        sensitivity = result["sight_threatening_sensitivity"]["mean"]
        assert line.startswith(name) and f"{result['auroc']['mean']:.2f}" in line
        assert f"{100 * sensitivity:.1f}" in line


def test_records_of_an_older_version_are_gone_on_with(finished, small, tmp_path):
    """They have accuracy, kappa and recalls alone, and no epoch's other scores."""
    results, out = finished
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "runs").glob("F*-1.json"):
        record = read_record(path)
        kept = ("accuracy", "quadratic_kappa", "recall_per_grade", "charged", "aborted")
        history = [
            {key: entry[key] for key in ("epoch", "accuracy", "epsilon_rdp_classic")} for entry in record["history"]
        ]
        write_record(path, {key: record[key] for key in kept} | {"history": history})
    resumed = reproduce(Options(**small, runs=2, seed=5), tmp_path, resume=True, progress=False, workers=1)
    assert "balanced_accuracy" not in resumed["settings"]["F"]
    assert rounded(resumed["settings"]["C"]) == rounded(results["settings"]["C"])
    assert resumed["settings"]["F"]["test_accuracy"] == results["settings"]["F"]["test_accuracy"]
    assert [line.split()[0] for line in table(resumed).splitlines()[-4:-2]] == ["C", "CDP"]


def test_figure_and_table_come_from_the_results(finished):
    results, out = finished
    from PIL import Image

    with Image.open(out / "figure1.png") as picture:
        assert picture.size[0] > 800
    text = table(results)
    for name, result in results["settings"].items():
        assert f"{100 * result['test_accuracy']['mean']:.1f}" in next(
            line for line in text.splitlines() if name in line
        )


def test_figure_draws_every_setting_and_the_paper(finished):
    from dopamine_lib.reproduction.figure1 import figure1

    above, below = figure1(finished[0]).axes
    assert len(above.lines) == 10 and len(below.lines) == 3
    assert below.lines[0].get_ydata()[-1] == pytest.approx(9.134, abs=0.01)


def test_a_saved_model_grades_as_it_did(finished, small):
    results, out = finished
    dataset = load("aptos", small["data_dir"], size=32, seed=5)
    for name in SETTINGS:
        net, metadata = load_model(out / f"{name}-1.safetensors")
        assert metadata["setting"] == name and tuple(metadata["grades"]) == dataset.grades
        shape = metadata["preprocessing"]
        with torch.no_grad():
            logits = net(to_input(dataset.images[dataset.test], shape["mean"], shape["std"]))
        accuracy = float(np.mean(logits.argmax(1).numpy() == dataset.labels[dataset.test]))
        assert accuracy == pytest.approx(results["settings"][name]["test_accuracy"]["runs"][1])
        assert metadata["statement"].startswith(name)


def test_the_same_seed_gives_the_same_numbers_in_any_number_of_processes(finished, small, tmp_path):
    """Two workers give what one process gave, to the last bit, models included."""
    one, folder = finished
    two = reproduce(Options(**small, runs=2, seed=5, settings=("F", "FPDP")), tmp_path, progress=False, workers=2)
    for name in ("F", "FPDP"):
        assert rounded(two["settings"][name]) == rounded(one["settings"][name])
        for run in (0, 1):
            file = f"{name}-{run}.safetensors"
            mine, theirs = (load_file(place / file) for place in (tmp_path, folder))
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(finished, small, tmp_path):
    """SIGKILL several times; the end is the uninterrupted run's, number for number."""
    command = [sys.executable, "-m", "dopamine_lib", *arguments(small, tmp_path, "--runs", "2", "--seed", "5")]
    for _ in range(3):
        before = checkpoints(tmp_path)
        process = subprocess.Popen(command + ["--resume"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and not checkpoints(tmp_path) - before:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "results.json").exists()
    resumed = reproduce(Options(**small, runs=2, seed=5), tmp_path, resume=True, progress=False)
    for name, result in finished[0]["settings"].items():
        assert rounded(resumed["settings"][name]) == rounded(result)
    leftovers = [path.name for path in (tmp_path / "runs").iterdir() if path.suffix != ".json"]
    assert not leftovers


def test_resuming_a_finished_run_changes_nothing(finished, small, capsys):
    _, out = finished
    before = json.loads((out / "results.json").read_text())["settings"]
    assert main(arguments(small, out, "--runs", "2", "--seed", "5", "--resume")) == 0
    assert json.loads((out / "results.json").read_text())["settings"] == before
    assert "FSCDP" in capsys.readouterr().out


def test_a_finished_run_is_not_overwritten(finished, small, capsys):
    _, out = finished
    assert main(arguments(small, out, "--runs", "2", "--seed", "5")) == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_with_other_options_is_refused(finished, small, capsys):
    _, out = finished
    assert main(arguments(small, out, "--runs", "3", "--seed", "5", "--resume")) == 2
    assert "runs = 2, not 3" in capsys.readouterr().err


def test_resume_with_other_weights_of_the_same_name_is_refused(small, tmp_path, capsys):
    from safetensors.torch import save_file

    weights = tmp_path / "own.safetensors"
    mine = dict(small, weights=weights)
    for seed in (0, 1):
        torch.manual_seed(seed)
        features = {key: value for key, value in squeezenet(5).state_dict().items() if key.startswith("features.")}
        save_file(features, weights)
        status = main(arguments(mine, tmp_path / "out", "--runs", "1", "--settings", "F", "--seed", "1", "--resume"))
        assert status == (2 if seed else 0)
    assert "weights_sha256" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(small, tmp_path, capsys):
    for out in ("alone", "shared"):
        (tmp_path / out / "runs").mkdir(parents=True)
        (tmp_path / out / "runs" / "FSCDP-0.safetensors").write_bytes(b"torn")
    assert main(arguments(small, tmp_path / "alone", "--runs", "1", "--settings", "FSCDP")) == 2
    assert "ledger" in capsys.readouterr().err
    with pytest.raises(InputError, match="ledger"):  # the same from a worker
        options = Options(**small, runs=1, settings=("FSCDP", "C"))
        reproduce(options, tmp_path / "shared", progress=False, workers=2)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--model", "resnet"], "model 'resnet' is unknown"),
        (["--data", "imagenet"], "data 'imagenet' is unknown"),
        (["--settings", "C,XDP"], "setting 'XDP' is unknown"),
        (["--settings", ","], "no setting"),
        (["--runs", "0"], "runs is 0"),
        (["--hospitals", "1"], "hospitals is 1"),
        (["--hospitals", "999"], "hospitals for"),
        (["--split", "random"], "split 'random' is unknown"),
        (["--epsilon", "-1"], "epsilon is -1"),
        (["--epsilon", "nan"], "epsilon is nan"),
        (["--delta", "0"], "delta is 0"),
        (["--delta", "2"], "delta is 2"),
        (["--weights", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--size", "5"], "size 5"),
        (["--seed", "-3"], "seed is -3"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(small, tmp_path, capsys, more, said):
    assert main(arguments(small, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["reproduce"], ["epsilon", "--steps", "2.5"], ["reproduce", "--runs", "x"]]
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_an_out_that_is_a_file_is_refused(small, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert main(arguments(small, tmp_path / "taken")) == 2
    assert "taken" in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"


def test_epsilon_command(capsys):
    words = ["--noise-multiplier", "1.15", "--sample-rate", str(100 / 2930), "--steps", "3001", "--delta", "1e-4"]
    assert main(["epsilon", *words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["epsilon"]["rdp_classic"] == pytest.approx(10.832, abs=0.01)
    assert main(["epsilon", *words]) == 0
    assert "10.832 (classic RDP)" in capsys.readouterr().out


def test_a_bound_asked_for_is_kept(small, tmp_path):
    options = Options(**small, runs=1, seed=0, settings=("CDP", "FPDP", "FSCDP"), epsilon=3.0, accountant="rdp")
    results = reproduce(options, tmp_path, progress=False)
    for result in results["settings"].values():
        assert max(result["epsilon"]["rdp"], result.get("epsilon_worst", result["epsilon"])["rdp"]) <= 3.0
        assert result["epsilon"]["rdp"] > 2.0


@pytest.mark.slow
def test_the_cnn_learns_fashion_privately():
    """One of the paper's three other benchmark data sets, from Debian's package, with a shortened setting."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    experiment = Experiment.load(
        Options(data="fashion-mnist", data_dir=str(folder), model="cnn", seed=0), progress=False
    )
    short = replace(SETTINGS["FSCDP"], sample_rate=100 / 60000, rounds=200)
    training = experiment.training("FSCDP", setting=short)
    training.run()
    assert experiment.accuracy(training) > 0.5
    assert training.ledgers[0].charged == 200


def test_validation_patients_are_held_out_for_choices(small):
    experiment = Experiment.load(Options(**small), progress=False).held_out()
    dataset = experiment.dataset
    assert set(experiment.test) == set(dataset.validation)
    seen = np.concatenate([*experiment.patients, experiment.train])
    assert not np.isin(seen, dataset.validation).any() and not np.isin(seen, dataset.test).any()


def test_the_package_loads_nothing_heavy():
    code = (
        "import sys; import dopamine_lib; "
        "print(sorted({'torch', 'opacus', 'tenseal', 'syft', 'numpy'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert answer.stdout.strip() == "[]"


def test_what_a_search_found_is_what_reproduce_trains(small, tmp_path, monkeypatch, capsys):
    """The largest rate scores best here, and of its clips the first."""
    monkeypatch.setattr(
        "dopamine_lib.reproduction.tuning._accuracy", lambda _, training: training.plan.choice.learning_rate
    )
    own, tuned = tmp_path / "own.toml", str(tmp_path / "tuned.toml")
    own.write_text('[mine]\nlike = "CDP"\nsample_rate = 0.1\naveraging = 10\n')
    data = ["--data", "aptos", "--data-dir", small["data_dir"], "--size", "32", "--weights", "random"]
    words = [*data, "--hospitals", "4", "--seed", "1", "--loss", "balanced"]
    bound = ["--epsilon", "5", "--rounds", "40"]
    asked = ["--settings", f"C,FSCDP,{own}", *bound]
    assert main(["tune", *words, *asked, "--out", tuned]) == 0
    said = capsys.readouterr().out
    assert said.count("validation accuracy") == 5 + 15 + 15 and "no epsilon covers them" in said

    def options(*more):
        return chosen_options(parser().parse_args(["reproduce", *words, *more, "--out", "results"]))

    before = options(*asked)
    for more in ([], bound):  # said again, the bound changes nothing
        found = options("--settings", tuned, *more)
        assert found.settings == ("C-tuned", "FSCDP-tuned", "mine")
        for name, paper in zip(found.settings, before.settings, strict=True):
            one, other = make_plan(found, name, (15,) * 4, 100), make_plan(before, paper, (15,) * 4, 100)
            assert one.setting.title.startswith(other.setting.title)
            chosen = "learning rate and clip" if one.setting.private else "learning rate"
            assert one.setting.title.endswith(f", with {chosen} chosen on validation patients of aptos")
            assert replace(one.setting, name="", title="") == replace(other.setting, name="", title="")
            changed = {"learning_rate": 4 * other.choice.learning_rate}
            if other.setting.private:
                changed["max_grad_norm"] = other.choice.max_grad_norm / 2
            assert one.choice == replace(other.choice, **changed)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("tuned.json", "tuned.json.toml"),
        ("file/tuned.toml", "another file"),
        ("folder.toml", "another file"),
        ("again.toml", "C and c-Tuned under one name, c-tuned: tune them into two files"),
    ],
)
def test_a_search_is_refused_before_it_begins(tmp_path, monkeypatch, capsys, name, remedy):
    monkeypatch.setattr(Experiment, "load", lambda *options, **more: pytest.fail("it has begun"))
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "own.toml").write_text('[c-Tuned]\nlike = "CDP"\n')
    settings = f"C,{tmp_path / 'own.toml'}" if name == "again.toml" else "C,CDP"
    assert main(["tune", "--settings", settings, "--out", str(tmp_path / name)]) == 2
    assert remedy in capsys.readouterr().err


def test_a_rate_without_a_bound_is_no_candidate(monkeypatch):
    """It had ended the whole search, after hours."""
    monkeypatch.setattr(tuning, "_accuracy", lambda experiment, training: training.plan.choice.learning_rate)
    options = Options(data="heart", model="linear", settings=("FSCDP",), local_steps=3, rounds=100, epsilon=8.0)
    experiment = Experiment.load(options).held_out()
    present = experiment.plan("FSCDP").choice
    found = [choice.learning_rate / present.learning_rate for _, choice in tuning.tune(experiment, "FSCDP")]
    assert 1 in found and len(found) < len(tuning.LEARNING_RATES) * len(tuning.CLIPS)


@pytest.mark.parametrize("stops", [KeyboardInterrupt(), NotFinite("as if it diverged")])
def test_a_search_that_ends_early_keeps_what_it_has(small, tmp_path, monkeypatch, capsys, stops):
    """Nothing of C is written: it is stopped by hand, or every candidate diverges; FSCDP was done before."""

    def run(training):
        if training.plan.setting.name == "C":
            raise stops

    monkeypatch.setattr(Training, "run", run)
    monkeypatch.setattr(Experiment, "accuracy", lambda experiment, model: 0.5)
    out = tmp_path / "tuned.toml"
    words = ["--data", "aptos", "--data-dir", small["data_dir"], "--size", "32", "--weights", "random"]
    assert main(["tune", *words, "--settings", "FSCDP,C", "--out", str(out)]) != 0
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
    assert "[FSCDP-tuned]" in out.read_text() and "[C-tuned]" not in out.read_text()
    if isinstance(stops, NotFinite):
        assert "C diverges at all learning rates from 0.125 to 2; --settings" in capsys.readouterr().err


def test_a_setting_tuned_again_says_once_on_whom(small):
    options = Options(data="aptos", data_dir=small["data_dir"], size=32, weights="random", settings=("FSCDP",))
    experiment = Experiment.load(options).held_out()
    first = tuned_table(experiment, "FSCDP", experiment.plan("FSCDP").choice)
    own = read_settings(tomllib.loads(first), "head", "tuned.toml")
    again = replace(experiment, options=replace(options, settings=("FSCDP-tuned",), own=own))
    assert tuned_table(again, "FSCDP-tuned", experiment.plan("FSCDP").choice) == first
