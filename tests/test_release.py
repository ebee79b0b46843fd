"""A folder is a release: what everything in it spends together, and the statement's words."""

import math
from dataclasses import replace

import pytest

from dopamine_lib.auditing.membership import most_true_positives
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.release import release
from dopamine_lib.federation.results_table import table
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.statement import HOW, TUNING, privacy_statement
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon

RUNS = 5


@pytest.fixture(scope="module")
def plans():
    """The paper's five settings for its patients."""
    sizes = {name: (293,) * 10 if setting.federated else (2930,) for name, setting in SETTINGS.items()}
    return {name: Plan(setting, CHOICES["head"][name], sizes[name], d=2565) for name, setting in SETTINGS.items()}


def released(plans, *names, runs=RUNS, seeded=False):
    bounds = {name: plans[name].bound for name in names}
    return release(bounds, {name: [plans[name].charged(run) for run in range(runs)] for name in names}, seeded=seeded)


def test_five_runs_together_cost_what_composition_says(plans):
    """28.9 where one has 10.83, and 84 with the two other private settings beside them."""
    one = released(plans, "FSCDP", runs=1)
    assert one["epsilon"]["rdp_classic"] == pytest.approx(10.83, abs=0.01) and one["private"]
    five = released(plans, "FSCDP")
    by_hand = (SampledGaussian(40, 1, 5), SampledGaussian(1.15, 100 / 2930, 5 * 3001))
    assert five["epsilon"]["rdp_classic"] == pytest.approx(epsilon(by_hand, 1e-4), rel=1e-9)
    assert five["epsilon"]["rdp_classic"] == pytest.approx(28.9, abs=0.05)
    assert five["verdict"].startswith("Private on paper only") and "5 models of FSCDP" in five["verdict"]
    every = released(plans, "CDP", "FPDP", "FSCDP")
    assert every["private"] and every["epsilon"]["rdp_classic"] == pytest.approx(84.06, abs=0.05)
    assert every["epsilon"]["pld"] <= every["epsilon"]["rdp"] < every["epsilon"]["rdp_classic"]
    assert five["epsilon"]["pld"] == pytest.approx(25.49, abs=0.02)  # the tight one: unlike events, composed exactly


def test_the_verdict_says_what_an_attack_can_do(plans):
    """At epsilon 1 the bound is that of membership attacks: e f + delta of the patients at f = 1 % false alarms."""
    bound = replace(plans["FSCDP"], setting=SETTINGS["FSCDP"].with_noise(8.0)).bound
    folder = release({"FSCDP": bound}, {"FSCDP": [[3001]]}, seeded=False)
    most = float(most_true_positives(0.01, min(filter(None, folder["epsilon"].values())), 1e-4))
    assert f"recognises {most:.1%} of the training patients at most" in folder["verdict"] and most < 0.1
    assert folder["verdict"].startswith("Private as a whole: 1 model of FSCDP")


def test_a_folder_that_no_accountant_can_bound_is_not_private(plans):
    """Discrete noise has no bound where epsilon is so large that the sampler's error takes all of delta."""
    integer = {name: replace(plans[name], discrete=True) for name in ("CDP", "FPDP", "FSCDP")}
    folder = released(integer, *integer)
    assert not folder["private"] and set(folder["epsilon"].values()) == {None}
    assert folder["verdict"].startswith("Not private: 15 models") and "no accountant has a bound" in folder["verdict"]


def test_a_patient_is_in_one_hospital_in_all_runs(plans):
    """The worst-off hospital of five runs together is not five times the worst-off of each."""
    charged = [plans["FPDP"].charged(run) for run in range(RUNS)]
    most = max(sum(steps) for steps in zip(*charged, strict=True))
    assert most < sum(max(steps) for steps in charged)
    together = released(plans, "FPDP")["epsilon"]["rdp_classic"]
    assert together == pytest.approx(epsilon(plans["FPDP"].bound.events(most, runs=RUNS), 1e-4), rel=1e-9)


@pytest.mark.parametrize("names", [("C",), ("F",), ("C", "FSCDP"), ("FPDP", "F", "C")])
def test_one_model_without_noise_leaves_nothing_bounded(plans, names):
    folder = released(plans, *names)
    assert not folder["private"] and folder["epsilon"] is None and folder["verdict"].startswith("Not private: ")
    assert "without any protection" in folder["verdict"] and "Do not pass it on" in folder["verdict"]
    assert (folder["epsilon_private"] is None) == (not {"CDP", "FPDP", "FSCDP"} & set(names))


def test_a_seed_makes_the_folder_not_private(plans):
    folder = released(plans, "FSCDP", runs=1, seeded=True)
    assert not folder["private"] and "seed" in folder["verdict"]


def test_the_table_says_what_the_folder_spends_and_the_worst_hospital_before_the_mean(plans):
    spread = {"mean": 0.7, "std": 0.0, "runs": [0.7] * 5}
    results = {"data": "synthetic", "model": "head", "weights": "embedded", "delta": 1e-4, "settings": {}}
    for name in ("F", "FPDP"):
        scores = dict.fromkeys(("test_accuracy", "balanced_accuracy", "quadratic_kappa"), spread)
        results["settings"][name] = scores | {"epsilon": None}
    results["settings"]["FPDP"] |= {
        "epsilon": {"rdp_classic": 19.05, "rdp": 17.82, "prv": 16.45},
        "epsilon_worst": {"rdp_classic": 20.79, "rdp": 19.5, "prv": 18.0},
    }
    results["folder"] = released(plans, "F", "FPDP")
    lines = table(results).splitlines()
    worst = next(i for i, line in enumerate(lines) if line.startswith("FPDP"))
    assert "20.79" in lines[worst] and "worst hospital" in lines[worst]
    assert "19.05" in lines[worst + 1] and "mean over hospitals" in lines[worst + 1]
    assert f"{results['folder']['epsilon_private']['rdp_classic']:.2f}" in lines[worst + 2]
    assert lines[-1] == "this folder: " + results["folder"]["verdict"]


def said(plans, name, *, charged=None, **terms):
    terms = {"patients": 2930, "seeded": False} | terms
    return privacy_statement(plans[name].bound, charged=charged or plans[name].charged(), **terms)


def test_a_server_that_reads_every_message_has_the_bound_of_one_share(plans):
    """231 and not 10.83: over MPI with --aggregation plain nothing else stands between it and a hospital's message."""
    alone = epsilon(plans["FSCDP"].bound.events(3001, colluding=9), 1e-4)
    assert alone == pytest.approx(231.9, abs=0.5)
    text = said(plans, "FSCDP", apart=True)
    assert f"Against the server: epsilon {alone:.2f} (classic RDP)" in text and "if sums are aggregated" not in text
    assert plans["FSCDP"].bound.adversaries(3001, in_clear=True)["server"]["rdp_classic"] == alone
    for aggregation in HOW:  # behind encryption, or in one process, the server's bound is the total's
        if aggregation != "plain":
            assert "Against the server: the same, if" in said(plans, "FSCDP", apart=True, aggregation=aggregation)
    assert "Against the server: the same, if" in said(plans, "FSCDP")


def test_the_statement_names_what_it_does_not_cover(plans):
    for model, who in TUNING.items():
        text = said(plans, "FSCDP", model=model)
        assert who in text and "Not covered: " in text
        for left_out in (
            "test patients",
            "how long anything takes",
            "other models trained on",
            "weights that training starts",
        ):
            assert left_out in text
    assert "validation patients" not in said(plans, "CDP", model="cnn")  # nobody tuned it


def test_the_worst_hospital_comes_first_and_the_mean_bounds_nobody(plans):
    charged = plans["FPDP"].charged()
    text, bound = said(plans, "FPDP"), plans["FPDP"].bound
    worst, mean = bound.epsilon(max(charged)), sum(map(bound.epsilon, charged)) / len(charged)
    assert worst > mean and text.index(f"{worst:.2f}") < text.index(f"{mean:.2f} (classic RDP) is the mean")
    assert math.isclose(mean, 19.06, abs_tol=0.2) and "bounds nobody" in text


def test_a_seeded_run_says_first_that_it_hides_nothing(plans):
    text = said(plans, "FSCDP", seeded=True)
    assert text.index("SEEDED and hides nothing") < text.index("Unit") < text.index("epsilon 10.83")
