"""What can be one's own without a line of the library: the page's examples as they stand, and what becomes of epsilon.

The examples of INTERFACES.md are read from there, written into a folder, and run by the page's own commands.
"""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from readme import INTERFACES, commands, words_of

from dopamine_lib.__main__ import main
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.release import release
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.statement import privacy_statement
from dopamine_lib.federation.training import Training
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.report.collect import write_report
from dopamine_lib.report.verification import read_results, verify

TEXT = words_of(INTERFACES)
BLOCKS = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
#: A few rounds of each setting that a command names, so that all commands together take seconds.
QUICK = {"FSCDP": 'like = "FSCDP"\nrounds = 12\nepochs = 2\n', "FPDP": 'like = "FPDP"\nrounds = 4\nepochs = 2\n'}
QUICK["F"] = QUICK["FPDP"].replace("FPDP", "F")

MINE = '''
import torch

def total(messages):
    return messages.sum(0)

def weighted(messages, patients, round_number):
    assert round_number >= 0 and len(patients) == len(messages) and set(patients.tolist()) <= {20, 40}
    return messages.sum(0)

def sgd(parameters, lr, momentum):
    return torch.optim.SGD(parameters, lr, momentum)

class Sign(torch.optim.Optimizer):
    """Numbers, and none before its first step."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                at = self.state[w]["at"] = self.state[w].get("at", 0) + 1
                w -= group["lr"] / at * w.grad.sign()

class Hoarder(Sign):
    def step(self):
        self.state[self.param_groups[0]["params"][0]]["seen"] = [object()]

class Fails(Sign):
    def step(self):
        raise RuntimeError("no")

def list_of_one(parameters):
    return [parameters]

def half(messages):
    return messages[:, : messages.shape[1] // 2].sum(0)

def infinite(messages):
    return messages.sum(0) / 0

def numpy_sum(messages):
    return messages.sum(0).numpy()

def rdp(composed, delta):
    from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
    return epsilon([SampledGaussian(*one) for one in composed], delta, "rdp")

def tenth(composed, delta):
    return rdp(composed, delta) / 10

def never(composed, delta):
    return None

def negative(composed, delta):
    return -1.0
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with the page's files in it, and some more."""
    for name, source in [*BLOCKS, ("mine.py", MINE)]:
        (tmp_path / name).write_text(source)
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in {Path(name).stem for name, _ in BLOCKS} | {"mine"}:
        if name not in before:
            sys.modules.pop(name, None)


def test_the_page_has_an_example_of_each_in_twenty_lines():
    rows = re.findall(r"^\| \[(\w+)\]\(#(\w+)\) \| `(--\w+)", TEXT, re.MULTILINE)
    titles = re.findall(r"^## (\w+)$", TEXT, re.MULTILINE)
    assert [own.lower() for own, _, _ in rows] == [title.lower() for title in titles] and len(rows) == len(BLOCKS) == 6
    for name, source in BLOCKS:
        assert len([line for line in source.splitlines() if line.strip()]) <= 20, name


@pytest.mark.parametrize("words", commands(TEXT), ids=lambda words: words[-1])
def test_an_example_runs_as_it_stands(words, folder, capsys):
    """By its own command, but for fewer rounds and one run; then reported."""
    words, out = words[3:], folder / words[-1]
    asked = next((value for word, value in zip(words, words[1:], strict=False) if word == "--settings"), "FSCDP")
    if not asked.endswith(".toml"):
        quick = "\n".join(f"[Quick-{name}]\n{QUICK[name]}" for name in asked.split(","))
        (folder / "quick.toml").write_text(quick)
        words += ["--settings", "quick.toml"]
    assert main([*words, "--runs", "1", "--workers", "1"]) == 0, capsys.readouterr().err
    results, _ = read_results(out)
    found = verify(results, out)
    told = capsys.readouterr().out
    model = next((value for word, value in zip(words, words[1:], strict=False) if word == "--model"), None)
    text = [path.read_text() for path in write_report(out, model=model, progress=False)][0]
    for name, one in found.items():
        summed = "--aggregation" not in words or "FPDP" in name
        assert one.private == (summed and name != "Quick-F"), one.why
        if not summed:
            assert results["settings"][name]["epsilon"] is None and "not private here" in _statement(results, name)
            assert "takes the place of the sum that its noise is sized for" in text
    if "--aggregation" in words:
        assert "messages were not summed" in told and results["folder"]["private"] is False
        assert "mysum:trimmed_mean, code of one's own" in _statement(results, "Quick-FPDP")
    if "--optimizer" in words:
        assert "steps on noised totals" in _statement(results, "Quick-FSCDP")
    if "--accountant" in words:
        own = results["settings"]["Quick-FSCDP"]["own_accountant"]
        assert own["name"] == "myaccountant:clt" and own["epsilon"] == pytest.approx(1, rel=0.01)
        assert "by myaccountant:clt, which is not checked here: epsilon 1.00" in told
        assert "nobody has checked" in _statement(results, "Quick-FSCDP")


def _statement(results, name):
    return results["settings"][name]["statement"]


# --- what they do to training -----------------------------------------------------------------------------------------


@pytest.fixture
def task():
    torch.manual_seed(0)
    return HeadTask(torch.nn.Linear(4, 3), torch.randn(120, 4), torch.arange(120) % 3)


def training(task, name="FSCDP", rounds=12, **terms):
    declared = replace(SETTINGS[name], rounds=rounds, epochs=4)
    choice = replace(CHOICES["head"][name], mean_noise_multiplier=None)
    cuts = np.split(np.arange(120), [20, 40, 60, 80])
    plan = Plan.of(declared, choice, task, cuts if declared.federated else [np.arange(120)], **terms)
    return Training(plan, task, cuts if declared.federated else [np.arange(120)], Randomness(0))


@pytest.mark.parametrize("name", ["F", "FPDP", "FSCDP"])
@pytest.mark.parametrize("own", ["total", "weighted"])
def test_a_sum_of_one_s_own_is_the_sum(task, name, own):
    """Decoded one by one and then added, messages give the total of the integers: the same model, to rounding."""
    usual, mine = training(task, name).run(), training(task, name, aggregation=f"mine:{own}").run()
    assert torch.allclose(mine.server.w, usual.server.w, rtol=0, atol=1e-5) and mine.server.w.abs().max() > 0.05


@pytest.mark.parametrize("name", ["CDP", "FSCDP", "FPDP"])
def test_momentum_is_torch_s_sgd(task, name):
    """Where the server steps on gradients it is handed the setting's rate and momentum; on changes, 1 and none."""
    usual = training(task, name).run()
    for optimizer in ("mine:sgd", "torch.optim:SGD"):
        mine = training(task, name, optimizer=optimizer).run()
        assert torch.allclose(mine.server.model, usual.server.model, rtol=0, atol=1e-5)
    assert not torch.allclose(training(task, name, optimizer="torch.optim:Adam").run().server.w, usual.server.w)


@pytest.mark.parametrize("optimizer", ["torch.optim:Adam", "torch.optim:SGD", "mine:Sign"])
@pytest.mark.parametrize("epochs", [0, 2])
def test_what_an_optimiser_keeps_is_in_the_checkpoint(task, optimizer, epochs, tmp_path):
    whole = training(task, optimizer=optimizer).run()
    half = training(task, optimizer=optimizer)
    if epochs:
        half.run(after=lambda epoch: epoch == epochs)
    save_checkpoint(tmp_path / "half", half)
    resumed = training(task, optimizer=optimizer)
    load_checkpoint(tmp_path / "half", resumed)
    assert torch.equal(resumed.run().server.w, whole.server.w) and resumed.server.steps == whole.server.steps


@pytest.mark.parametrize(
    "terms, said",
    [
        ({"aggregation": "mine:half"}, ["mine:half gives a tensor (7,) for 5 messages in round 1", "(15,)"]),
        ({"aggregation": "mine:infinite"}, ["numbers that are not finite", "round 1"]),
        ({"aggregation": "mine:numpy_sum"}, ["gives a ndarray", "it must give a tensor (15,)"]),
        ({"aggregation": "mine:nothing"}, ["aggregation mine:nothing: AttributeError", "put it right there"]),
        ({"optimizer": "mine:list_of_one"}, ["gives a list", "torch.optim.Optimizer"]),
        ({"optimizer": "mine:Fails"}, ["optimizer mine:Fails: RuntimeError: no (mine.py, line "]),
        ({"optimizer": "torch.optim:LBFGS"}, ["optimizer torch.optim:LBFGS: TypeError", "closure"]),
    ],
)
def test_what_they_give_is_checked(task, terms, said, refuses):
    with refuses(*said):
        training(task, **terms).run()


def test_an_optimiser_that_keeps_what_no_checkpoint_holds_is_refused(task, refuses):
    with refuses("keeps seen as its state", "tensors and numbers"):
        training(task, optimizer="mine:Hoarder").run(save=lambda: None).state()


# --- what becomes of epsilon ------------------------------------------------------------------------------------------


def plan_of(name, **changes):
    sizes = (293,) * 10 if SETTINGS[name].federated else (2930,)
    return Plan(SETTINGS[name], CHOICES["head"][name], sizes, d=2565, **changes)


def test_no_bound_for_what_is_no_sum_where_noise_is_shared():
    """A share of noise is in a message, and the accountants' bound is for all shares: nothing is charged or claimed."""
    own = plan_of("FSCDP", aggregation="mine:total")
    assert own.setting.private and not own.bound.holds and own.ledgers() == []
    said = privacy_statement(own.bound, charged=[], patients=2930, seeded=False, aggregation="mine:total")
    alone = epsilon(plan_of("FSCDP").bound.events(3001, colluding=9), 1e-4)
    assert said.startswith("FSCDP is not private here: mine:total") and f"epsilon {alone:.0f} (classic RDP)" in said
    folder = release({"FSCDP": own.bound}, {"FSCDP": [[]]}, seeded=False)
    assert not folder["private"] and folder["epsilon"] is None and folder["epsilon_private"] is None
    assert folder["verdict"].startswith("Not private: the noise in FSCDP is sized for sums")
    beside = {"FSCDP": own.bound, "C": plan_of("C").bound}
    verdict = release(beside, {name: [[]] for name in beside}, seeded=False)["verdict"]
    assert "C was trained without any protection, and the noise in FSCDP is sized for sums" in verdict


def test_a_message_with_all_of_its_noise_keeps_its_bound():
    own, usual = plan_of("FPDP", aggregation="mine:total"), plan_of("FPDP")
    assert own.bound.holds and own.bound.epsilons(1250) == usual.bound.epsilons(1250)
    assert len(own.ledgers()) == 10 and own.charged() == usual.charged()
    assert plan_of("CDP", optimizer="torch.optim:Adam").bound.epsilons(9) == plan_of("CDP").bound.epsilons(9)


@pytest.mark.parametrize("name", ["FSCDP", "FPDP"])
def test_an_accountant_of_one_s_own_sizes_the_noise(name):
    """The kit's formula by another name gives the kit's sigma; one that says a tenth buys less noise, and no more."""
    options = Options(epsilon=2.0, accountant="rdp")
    usual = make_plan(options, name, (293,) * 10, 2565)
    own = make_plan(replace(options, accountant="mine:rdp"), name, (293,) * 10, 2565)
    assert own.setting.noise_multiplier == pytest.approx(usual.setting.noise_multiplier, rel=2e-3)
    assert max(own.charged()) == own.setting.steps == max(usual.charged())
    less = make_plan(replace(options, accountant="mine:tenth"), name, (293,) * 10, 2565)
    assert less.bound.epsilon(less.setting.steps, "rdp") == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize(
    "name, said", [("mine:never", "beyond 1000"), ("mine:negative", "epsilon by mine:negative is -1.0")]
)
def test_an_accountant_without_a_bound_is_refused(name, said, refuses):
    with refuses(said):
        make_plan(Options(epsilon=2.0, accountant=name), "FSCDP", (293,) * 10, 2565)


def test_what_an_accountant_is_told():
    told = []
    events = [SampledGaussian(40, 1, 1), SampledGaussian(1.15, 0.1, 7), SampledGaussian(1.15, 0.1, 3)]
    epsilon(events, 1e-4, lambda composed, delta: told.append((composed, delta)) or 1.0)
    assert told == [(((40.0, 1.0, 1), (1.15, 0.1, 10)), 1e-4)]


@pytest.mark.parametrize("option", ["aggregation", "optimizer", "accountant"])
def test_a_wrong_name_is_refused(option, refuses):
    with refuses(f"{option} 'mean' is unknown", "or a function of yours as module:function"):
        Options(**{option: "mean"})


def test_no_file_makes_the_report_run_code(folder, capsys):
    """The report knows the names of functions, and does without their code."""
    (folder / "quick.toml").write_text(f"[Quick]\n{QUICK['FPDP']}")
    words = "reproduce --data heart --runs 1 --settings quick.toml --out out --workers 1 --aggregation mine:total"
    assert main([*words.split(), "--optimizer", "mine:sgd", "--accountant", "mine:rdp"]) == 0
    (folder / "mine.py").write_text("raise SystemExit('was run')")
    sys.modules.pop("mine")
    assert verify(*read_results("out"))["Quick"].private
    results = json.loads((folder / "out" / "results.json").read_text())
    own = results["settings"]["Quick"]["own_accountant"]["epsilon"]
    assert own == pytest.approx(results["settings"]["Quick"]["epsilon_worst"]["rdp"], rel=1e-9)
    assert not math.isnan(own) and "mine:total reads every message" in write_report("out")[0].read_text()
