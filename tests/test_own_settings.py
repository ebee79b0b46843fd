"""Settings of one's own: declared in a file, trained, accounted for and reported like the paper's five."""

import json
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from dopamine_lib.__main__ import main
from dopamine_lib.errors import InputError
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.own_settings import as_toml, from_record, read_settings
from dopamine_lib.federation.results_table import table
from dopamine_lib.federation.settings import CHOICES, SETTINGS, Choice, setting
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.reproduction.config import config_words

FEW_ROUNDS = """
[FSCDP-20]
like = "FSCDP"
rounds = 20
sample_rate = 0.34
noise_multiplier = 3.0
learning_rate = 2.0

[FedSGD]   # nothing of the five is in it
sample_rate = 0.2
rounds = 6
local_steps = 1
participation = 1.0
federated = true
shared_noise = true
learning_rate = 1.0
"""


def test_a_setting_that_is_written_is_read_again():
    """Each field of the five with each model's choice; C's clip is infinite, and its noise none."""
    odd = Choice(1e-5, 3.0, averaging=0.0, mean_noise_multiplier=1e5, reach=0.5, counts=0.25)
    several = replace(setting("FSCDP"), local_steps=4, trajectories=True)
    for declared, choice in [
        *((setting(name), choice) for own in CHOICES.values() for name, choice in own.items()),
        *((replace(setting("CDP"), title=title), odd) for title in ('"[a.b]"\n# \\u', "\x7f\t\0 é 👁", "")),
        (several, odd),
    ]:
        record = read_settings(tomllib.loads(as_toml("it", declared, choice)), "head", "my.toml")["it"]
        assert from_record("it", record) == (replace(declared, name="it"), choice)
    assert 'title = "eyes ?"' in as_toml("it", replace(setting("C"), title="eyes \udcff"), odd)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.toml"
    path.write_text(FEW_ROUNDS)
    return path


@pytest.fixture(scope="module")
def words(own, tmp_path_factory, make_aptos):
    """A finished run of both, and the words that asked for it; the last is its folder."""
    folder, out = make_aptos(tmp_path_factory.mktemp("eyes")), tmp_path_factory.mktemp("results") / "out"
    asked = f"reproduce --data aptos --data-dir {folder} --size 32 --weights random --hospitals 4 --runs 1"
    found = [*asked.split(), "--settings", str(own), "--out", str(out)]
    assert main(found) == 0
    return found


@pytest.fixture
def results(words):
    return json.loads((Path(words[-1]) / "results.json").read_text())


def test_accounted_like_the_five(results):
    few, plain = results["settings"]["FSCDP-20"], results["settings"]["FedSGD"]
    alone = epsilon([SampledGaussian(40.0, 1.0, 1), SampledGaussian(3.0, 0.34, 20)], 1e-4, "rdp_classic")
    assert few["epsilon"]["rdp_classic"] == pytest.approx(alone, rel=1e-3)
    assert few["steps"] == 20 and few["choice"]["learning_rate"] == 2.0 and few["choice"]["max_grad_norm"] == 0.5
    assert [record["epoch"] for record in few["history"]] == list(range(1, 21))
    assert plain["epsilon"] is None and len(plain["history"]) == 6
    assert "a file declared" in few["statement"] and "FSCDP-20" in table(results)


def test_reported_and_resumed_like_the_five(words, own, tmp_path, capsys):
    assert main(["report", words[-1], "--out", str(tmp_path)]) == 0
    assert "FSCDP-20" in (tmp_path / "report.md").read_text()
    assert main([*words, "--resume"]) == 0
    other = tmp_path / "own.toml"
    other.write_text(FEW_ROUNDS.replace("rounds = 20", "rounds = 21"))
    capsys.readouterr()
    assert main([str(other) if word == str(own) else word for word in words] + ["--resume"]) == 2
    assert "own" in capsys.readouterr().err


def test_a_report_does_not_believe_another_number_of_rounds(words, results):
    """What is verified against is the declaration in the folder's options, which its epsilons must follow."""
    from dopamine_lib.report.verification import options_of, verify

    assert verify(results, Path(words[-1]))["FSCDP-20"].private
    results["options"]["own"]["FSCDP-20"]["setting"]["rounds"] = 30
    with pytest.raises(InputError, match="steps"):
        verify(results, Path(words[-1]))
    results["options"]["own"]["FSCDP-20"]["setting"]["rounds"] = "many"
    with pytest.raises(InputError, match="rounds is 'many'"):
        options_of(results)


def test_like_one_of_the_five_and_no_more_is_that_one():
    for name, declared in SETTINGS.items():
        same, choice = from_record("mine", read_settings({"mine": {"like": name}}, "head", "x.toml")["mine"])
        assert (same.steps, same.noise_multiplier, same.epochs) == (declared.steps, declared.noise_multiplier, 100)
        assert choice == CHOICES["head"][name]


def test_a_bound_asked_for_is_calibrated():
    record = read_settings({"mine": {"like": "FSCDP", "rounds": 100, "sample_rate": 0.34}}, "head", "x.toml")
    plan = make_plan(Options(settings=("mine",), own=record, epsilon=3.0), "mine", (293,) * 10, 2565)
    assert 2.9 < plan.bound.epsilon(100, "prv") <= 3.0
    assert plan.setting.noise_multiplier > setting("FSCDP").noise_multiplier
    assert plan.choice.learning_rate < CHOICES["head"]["FSCDP"].learning_rate


@pytest.mark.parametrize("asked", [{"rounds": 150}, {"rounds": 150, "sample_rate": 0.34}, {"rounds": "auto"}])
@pytest.mark.parametrize("target", [1.0, 3.0])
def test_other_rounds_meet_the_same_epsilon_and_move_as_far(asked, target):
    """Noise moves the model by eta sigma sqrt(T) C / (q N): as far in few rounds as in the paper's."""
    sizes, few = (293,) * 10, Options(epsilon=target, accountant="rdp", **asked)
    plan, paper = (
        make_plan(options, "FSCDP", sizes, 2565) for options in (few, replace(few, rounds=None, sample_rate=None))
    )
    used = plan.setting
    assert used.rounds == {150: 150, "auto": 100}[asked["rounds"]] and used.epochs == 100
    assert used.sample_rate == pytest.approx(asked.get("sample_rate", min(1, 100 / 2930 * 3001 / used.rounds)))
    assert 0.99 * target < plan.bound.epsilon(used.rounds, "rdp") <= target
    drift = [p.choice.learning_rate * p.setting.noise_multiplier * math.sqrt(p.setting.rounds) for p in (plan, paper)]
    assert drift[0] / used.sample_rate == pytest.approx(drift[1] / SETTINGS["FSCDP"].sample_rate)
    # what a hospital's patients agree on, a fifth of C each at the start, is not clamped
    assert plan.noise.box > 0.2 * plan.choice.max_grad_norm * used.sample_rate * sizes[0]
    assert few.setting("C") == SETTINGS["C"]
    assert Options(epsilon=target, rounds="auto").setting("FPDP") == SETTINGS["FPDP"]  # 100 rounds, the fewest


def test_rounds_are_told_in_results_statement_and_report(words, own, tmp_path):
    asked = [str(tmp_path / "out") if word == words[-1] else word for word in words]
    asked[asked.index(str(own))] = "FSCDP"
    assert main([*asked, "--epsilon", "3", "--rounds", "auto", "--accountant", "rdp"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["settings"]
    assert (results["FSCDP"]["rounds"], results["FSCDP"]["steps"], results["FSCDP"]["sample_rate"]) == (100, 100, 1)
    assert "T = 100 and q = 1 in place of 3001 and 0.0341" in results["FSCDP"]["statement"]
    assert main(["report", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "words, said",
    [
        ("--rounds 150", "say --epsilon too"),
        ("--sample-rate 0.3", "say --epsilon too"),
        ("--rounds 0 --epsilon 1", "rounds is 0"),
        ("--rounds -3 --epsilon 1", "rounds is -3"),
        ("--rounds few --epsilon 1", "rounds is 'few', but must be a whole number, or auto"),
        ("--rounds 1.5 --epsilon 1", "rounds is '1.5'"),
        ("--rounds ² --epsilon 1", "rounds is '²'"),
        ("--sample-rate 1.5 --epsilon 1", "sample rate is 1.5"),
        ("--sample-rate nan --epsilon 1", "sample rate is nan"),
    ],
)
def test_rounds_that_no_bound_or_training_goes_with_are_refused(words, said, tmp_path, capsys):
    assert main(["reproduce", *words.split(), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "table, said",
    [
        ({"like": "FSCPD"}, "'FSCPD' is unknown"),
        ({"like": 3}, "is unknown"),
        ({"like": "FSCDP", "round": 3}, "round is unknown; choose from like"),
        ({"rounds": 3}, "does not say sample_rate"),
        ({"like": "FSCDP", "rounds": 0}, "rounds is 0"),
        ({"like": "FSCDP", "rounds": 2.5}, "rounds is 2.5"),
        ({"like": "FSCDP", "rounds": "ten"}, "rounds is 'ten', but must be a number"),
        ({"like": "FSCDP", "rounds": True}, "rounds is True"),
        ({"like": "FSCDP", "sample_rate": 1.5}, "sample_rate is 1.5"),
        ({"like": "FSCDP", "sample_rate": math.nan}, "sample_rate is nan"),
        ({"like": "FSCDP", "noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"like": "FSCDP", "noise_multiplier": math.inf}, "noise_multiplier is inf"),
        ({"like": "C", "noise_multiplier": 1.0}, "max_grad_norm is inf"),
        ({"like": "FSCDP", "centre": 0}, "centre is 0"),
        ({"like": "FSCDP", "counts": 1.5}, "counts is 1.5"),
        ({"like": "FSCDP", "local_steps": 1001}, "at most 1000"),
        ({"like": "FSCDP", "participation": 0.5}, "single steps"),
        ({"like": "CDP", "local_steps": 2}, "single steps"),
        ({"like": "CDP", "shared_noise": False}, "single steps|curator"),
        ({"like": "FSCDP", "federated": "yes"}, "federated is 'yes'"),
        ({"like": "FSCDP", "epochs": 4000}, "epochs is 4000"),
        ({"like": "FSCDP", "momentum": 1.0}, "momentum is 1.0"),
        ({"like": "FSCDP", "title": 3}, "title is 3"),
        ({"like": "FPDP", "participation": 0.01, "rounds": 3}, "takes no step"),
        (3, "outside a table"),
    ],
)
def test_what_cannot_be_trained_or_has_no_bound_is_refused(table, said):
    with pytest.raises(InputError, match=said) as error:
        read_settings({"mine": table}, "head", "x.toml")
    assert "x.toml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["FSCDP", "fscdp", "-x", "a b", "../x", "1", "x" * 33, ""])
def test_names_that_a_file_or_a_table_cannot_have(name):
    with pytest.raises(InputError, match="its name must"):
        read_settings({name: {"like": "FSCDP"}}, "head", "x.toml")


@pytest.mark.parametrize("text", ["", "[mine\n", "rounds = 3\n", "[mine]\nrounds = 1\nrounds = 2\n"])
def test_a_broken_file_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "own.toml"
    path.write_text(text)
    assert main(["reproduce", "--settings", str(path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "own.toml" in err
    assert main(["reproduce", "--settings", str(tmp_path / "no.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "no.toml" in capsys.readouterr().err


# a whole experiment in a file

CONFIG = """
data = "aptos"
size = 32
weights = "random"
hospitals = 4
runs = 1
settings = ["FSCDP-20"]

[setting.FSCDP-20]
like = "FSCDP"
rounds = 20
sample_rate = 0.34

[sweep]
epsilon = [1, 3]
split = ["iid", "skewed"]
"""


def config(folder: Path, text: str = CONFIG) -> str:
    path = folder / "experiment.toml"
    path.write_text(text)
    return str(path)


def test_a_sweep_is_one_run_for_each_combination_and_is_resumed(tmp_path, make_aptos):
    given = ["--config", config(tmp_path), "--data-dir", str(make_aptos(tmp_path / "eyes"))]
    out = tmp_path / "out"
    assert main(["reproduce", *given, "--split", "iid", "--out", str(out)]) == 0  # the command line wins
    assert sorted(path.name for path in out.iterdir()) == ["epsilon=1", "epsilon=3"]
    for asked in (1, 3):
        results = json.loads((out / f"epsilon={asked}" / "results.json").read_text())
        assert 0.9 * asked < results["settings"]["FSCDP-20"]["epsilon"]["prv"] <= asked
        assert results["options"]["split"] == "iid" and results["options"]["runs"] == 1
    (out / "epsilon=3" / "results.json").unlink()
    assert main(["reproduce", *given, "--split", "iid", "--out", str(out), "--resume"]) == 0
    assert (out / "epsilon=3" / "results.json").exists()


def test_a_config_is_the_command_line_in_a_file(tmp_path):
    said = dict(config_words(config(tmp_path)))
    assert list(said) == [f"epsilon={e},split={split}" for e in (1, 3) for split in ("iid", "skewed")]
    assert said["epsilon=3,split=iid"][-4:] == ["--epsilon", "3", "--split", "iid"]
    for given in (["--epsilon", "2"], ["--epsilon=2"]):  # the command line's word: not swept
        assert list(dict(config_words(config(tmp_path), given))) == ["split=iid", "split=skewed"]
    ((folder, words),) = config_words(config(tmp_path, "[setting.mine]\nlike = 'C'\n"))
    assert folder == "" and words == ["--settings", "mine"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("colour = 3\n", "--colour, which is no option"),
        ("runs = 0\n", "runs is 0"),
        ("config = 'other.toml'\n", "take that line out"),
        ("[sweep]\nconfig = ['a', 'b']\n", "take that line out"),
        ("[sweep]\nepsilon = 3\n", "give a list of different values"),
        ("[sweep]\nepsilon = []\n", "give a list"),
        ("[sweep]\nepsilon = [1, 1]\n", "give a list of different values"),
        ("[sweep]\nepsilon = [1, -3]\n", "epsilon is -3"),
        ("sweep = 3\n", "must be a table"),
        ("setting = 3\n", "must be a table"),
        ("settings = ['mine']\n", "'mine' is unknown"),
        ("[setting.mine]\nlike = 'D'\n", "'D' is unknown"),
        ("[run]\nruns = 3\n", "a table \\[run\\]"),
        ("runs == 3\n", "is not TOML"),
    ],
)
def test_a_config_that_is_wrong_anywhere_is_refused_before_anything_runs(text, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["reproduce", "--config", config(tmp_path, text), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count("\n") == 1 and not out.exists()


def test_an_option_in_short_is_refused_and_not_lost(tmp_path, capsys):
    """``--conf`` would be read by one parser and missed by the one that looks for a file."""
    with pytest.raises(SystemExit):
        main(["reproduce", "--conf", config(tmp_path), "--out", str(tmp_path / "out")])
    assert "unrecognized arguments: --conf" in capsys.readouterr().err


def test_what_could_train_nothing_or_not_be_told_apart_is_refused(tmp_path, capsys):
    few = read_settings({"few": {"like": "FPDP", "participation": 0.3}}, "head", "x.toml")
    with pytest.raises(InputError, match="invites 1 of 3 hospitals a round"):
        make_plan(Options(settings=("few",), own=few, aggregation="masks"), "few", (100,) * 3, 2565)
    centred = read_settings({"mine": {"like": "FSCDP", "centre": 40}}, "cnn", "x.toml")
    with pytest.raises(InputError, match="centre, which is for head and linear models"):
        Options(settings=("mine",), own=centred, model="cnn")
    with pytest.raises(InputError, match="counts is 0.5, but centre"):
        read_settings({"mine": {"like": "FSCDP", "counts": 0.5}}, "cnn", "x.toml")
    counted = read_settings({"mine": {"like": "FSCDP", "counts": 1.0, "centre": 20}}, "cnn", "x.toml")
    assert Options(settings=("mine",), own=counted, model="cnn").choice("mine").counts == 1
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text('[A]\nlike = "C"\n')
    words = ["reproduce", "--settings", f"{tmp_path / 'a.toml'},{tmp_path / 'b.toml'}", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "declares A, which another file declares, too" in capsys.readouterr().err
    for name, title in (("a.toml", "A"), ("b.toml", "a")):  # one file on file systems that ignore case
        (tmp_path / name).write_text(f'[{title}]\nlike = "C"\n')
    assert main(words) == 2
    assert "differ in capitals alone" in capsys.readouterr().err
