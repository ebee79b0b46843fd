"""The report: it says what was accounted, recomputes it, and calls nothing else private."""

import json
import math
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dopamine_lib.__main__ import main
from dopamine_lib.auditing.planted_faults import scale_noise
from dopamine_lib.data import PATIENTS
from dopamine_lib.errors import InputError
from dopamine_lib.federation.metrics import SCORES
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.release import release
from dopamine_lib.federation.settings import CHOICES, SETTINGS, Choice
from dopamine_lib.federation.statement import SEEDED, privacy_statement
from dopamine_lib.report.collect import collect, short_audit, write_report
from dopamine_lib.report.markup import html, plain
from dopamine_lib.report.text import markdown
from dopamine_lib.report.verification import read_results, verify
from dopamine_lib.reproduction.run import reproduce


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_aptos):
    """A run of 60 small images at the paper's own noise and steps, its noise from the operating system."""
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    options = Options(
        data="aptos",
        data_dir=str(folder),
        size=32,
        weights="random",
        hospitals=4,
        runs=1,
        settings=("F", "FPDP", "FSCDP"),
    )
    out = tmp_path_factory.mktemp("results")
    reproduce(options, out, progress=False, workers=1)
    return out


@pytest.fixture
def results(made):
    return json.loads((made / "results.json").read_text())


def put_back(results, folder):
    """The results alone, without models, as a file in ``folder``."""
    (folder / "results.json").write_text(json.dumps(results))
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; a tag that is never closed is an error."""

    void = {"meta", "br", "hr", "img", "link"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.void:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    paths = write_report(made, out, progress=False)
    assert [path.name for path in paths] == ["report.md", "report.html"]
    return [path.read_text() for path in paths]


def test_report_says_all_that_a_privacy_statement_needs(report, results):
    text, _ = report
    assert "thresholds call" not in text  # none were asked for
    for name, result in results["settings"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{100 * result['test_accuracy']['mean']:.1f}" in line
        assert f"| {100 * result['balanced_accuracy']['mean']:.1f} % |" in line
        found = result["referable_sensitivity"]["mean"], result["referable_specificity"]["mean"]
        assert f"| {100 * found[0]:.0f} % at {100 * found[1]:.0f} % |" in line
        if result["epsilon"] is None:
            assert "**not private**: no noise was added" in line
        else:
            worst = result.get("epsilon_worst", result["epsilon"])
            assert "| **private** |" in line and f"{worst['prv']:.2f}" in line
            assert ("mean over hospitals" in line) == (name == "FPDP")  # after the worst, never alone
    for said in (
        "one patient, with all of their images",
        "pixel-identical images are one patient's",
        "one patient added or removed",
        "Poisson, rate 0.03413, 3001 steps",
        "Gaussian noise 1.15 times",
        "10.83 (classic RDP)",  # the golden number, with the mean features' small part
        f"0.0001 = {1e-4 * results['patients']['train']:.2g} / n, n = {results['patients']['train']}",
        "subtracts its own noise",
        "added the messages in the clear, as a simulation",
        "noise that nobody can predict",
        "chosen on validation patients",
        "not covered",
        "This folder as a whole.",
        "Not private: F was trained without any protection",
        "test patients: their scores",
        "how long anything takes",
        "operating system",
        "public seed 0",
        "dopamine-kit",
        "torch",
        "research",  # APTOS' licence, in the data sheet
        "age, sex, ethnicity",  # which subgroups the data cannot support
        "report --audit",
    ):
        assert said in text, said


def test_page_says_the_same_and_loads_nothing_from_elsewhere(report):
    text, page = report
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not [key for key, _ in parsed.attributes if key in ("src", "href") or key.startswith("on")]
    assert "url(" not in page and "@import" not in page and ("lang", "en") in parsed.attributes
    words = re.findall(r"[A-Za-z0-9.]{3,}", re.sub(r"[\\*|`#]", " ", text))
    missing = [word for word in words if word not in parsed.text]
    assert not missing, missing[:5]
    assert parsed.tags.count("table") >= 4 and parsed.tags.count("h1") == 1


def test_report_is_about_one_page(report):
    assert len(report[0].split()) < 1100


def test_report_from_the_command_line(made, tmp_path, capsys):
    assert main(["report", str(made / "results.json"), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_without_models_or_data_subgroups_are_left_out_and_it_says_so(results, tmp_path, made):
    text = markdown(collect(put_back(results, tmp_path), progress=False))
    assert "Subgroups were not computed" in text and "F-0.safetensors is not beside" in text
    elsewhere = tmp_path / "moved"
    shutil.copytree(made, elsewhere)
    text = markdown(collect(elsewhere, data_dir=tmp_path / "nowhere", progress=False))
    assert "Subgroups were not computed" in text and "**private**" in text


def seeded(text):
    """The statement of an unseeded run as a seeded one would carry it."""
    return text.replace(" Unit:", f" {SEEDED} Unit:", 1)


def composed(results):
    """The results, with a folder that agrees with their settings."""
    bounds, charged = {}, {}
    for name, result in results["settings"].items():
        sizes = results["hospitals"] if SETTINGS[name].federated else [results["patients"]["train"]]
        plan = Plan(SETTINGS[name], Choice.from_record(result["choice"]), tuple(sizes), d=2565)
        bounds[name], charged[name] = plan.bound, [plan.charged()]
    results["folder"] = release(bounds, charged, seeded=results["options"]["seed"] is not None)
    return results


def test_a_seeded_run_is_not_called_private(results, tmp_path):
    """FSCDP's rounds do not depend on the seed, so that its file with a seed is this one with three changes."""
    results["settings"] = {"FSCDP": results["settings"]["FSCDP"]}
    results["options"]["seed"], results["randomness"] = 3, "seeded with 3: for teaching only"
    results["settings"]["FSCDP"]["statement"] = seeded(results["settings"]["FSCDP"]["statement"])
    facts = collect(put_back(composed(results), tmp_path), progress=False)
    assert not facts["accounted"]["FSCDP"].private
    text = markdown(facts)
    assert "**private**" not in text and text.count("it hides nothing") == 1
    assert "if nobody could predict it" in text


def test_a_seed_that_only_the_models_admit_is_found(made, tmp_path, refuses):
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    path = folder / "FSCDP-0.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["statement"] = json.dumps(seeded(json.loads(metadata["statement"])))
    save_file(load_file(path), path, metadata)
    with refuses("FSCDP-0.safetensors", "SEEDED"):
        collect(folder, progress=False)


@pytest.mark.slow
def test_discrete_noise_is_accounted_again_too(results, tmp_path):
    kept = {key: value for key, value in results["options"].items() if key != "weights_sha256"}
    options = Options(**kept | {"settings": ("FSCDP",), "seed": 3, "noise": "integer"})
    reproduce(options, tmp_path, progress=False, workers=1)
    read, folder = read_results(tmp_path)
    (one,) = verify(read, folder).values()
    assert not one.private and one.epsilon == {  # fine Skellam noise is next to rounded Gaussian noise
        key: pytest.approx(value, rel=1e-3) for key, value in results["settings"]["FSCDP"]["epsilon"].items()
    }
    assert "Skellam" in markdown(collect(tmp_path, progress=False))
    read["settings"]["FSCDP"]["epsilon"]["rdp"] *= 0.99
    with pytest.raises(InputError, match="FSCDP's epsilon"):
        verify(read, folder)


def test_a_trusted_curator_is_called_one(results, tmp_path):
    """CDP's golden numbers, in a file of our own making: it is accounted as if it had been trained."""
    declared = SETTINGS["CDP"]
    bound = Plan(declared, CHOICES["head"]["CDP"], sizes=(results["patients"]["train"],), d=2565).bound
    own = {key: getattr(declared, key) for key in ("noise_multiplier", "sample_rate", "rounds", "steps")}
    own |= {"epsilon": bound.epsilons(5862), "adversaries": bound.adversaries(5862), "choice": bound.choice.record()}
    n, counted = results["patients"]["train"], results["patients"]["counted"]
    own["statement"] = privacy_statement(bound, charged=[5862], patients=n, seeded=False, counted=counted, data="aptos")
    results["settings"]["CDP"] = results["settings"]["FSCDP"] | own
    facts = collect(put_back(composed(results), tmp_path), progress=False)
    assert facts["accounted"]["CDP"].private and "a trusted curator" in markdown(facts)
    assert facts["accounted"]["CDP"].epsilon["rdp_classic"] == pytest.approx(9.134, abs=0.01)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"epsilon": None}, "no epsilon was accounted"),
        ({"noise_multiplier": None}, "no epsilon was accounted"),
        ({"statement": ""}, "carries no privacy statement"),
        ({"statement": None}, "carries no privacy statement"),
    ],
)
def test_what_was_not_accounted_is_not_called_private(results, tmp_path, change, why):
    results["settings"]["FSCDP"].update(change)
    facts = collect(put_back(results, tmp_path), progress=False)
    assert not facts["accounted"]["FSCDP"].private and why in facts["accounted"]["FSCDP"].why
    line = next(line for line in markdown(facts).splitlines() if line.startswith("| FSCDP"))
    assert why in line and "**private**" not in line
    assert facts["accounted"]["FPDP"].private


def tampered(results):
    """Changes to what a file says, each with a part of the complaint."""
    own = results["settings"]
    cases = []

    def case(said, *path, value):
        changed = deepcopy(results)
        at = changed
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value(at[path[-1]])
        cases.append((changed, said))

    case("FSCDP's epsilon (prv)", "settings", "FSCDP", "epsilon", "prv", value=lambda e: e * 0.99)
    case("FSCDP's epsilon (rdp_classic)", "settings", "FSCDP", "epsilon", "rdp_classic", value=lambda e: 1.0)
    case("FPDP's epsilon", "settings", "FPDP", "epsilon", "rdp", value=lambda e: e - 0.1)
    case("worst-off", "settings", "FPDP", "epsilon_worst", "rdp", value=lambda e: e - 0.1)
    case("FSCDP's epsilon", "settings", "FSCDP", "noise_multiplier", value=lambda s: s * 1.01)
    case("FSCDP's sample rate", "settings", "FSCDP", "sample_rate", value=lambda q: q / 2)
    case("FSCDP's number of steps", "settings", "FSCDP", "steps", value=lambda t: t // 2)
    case("FSCDP's delta", "settings", "FSCDP", "delta", value=lambda d: 1e-3)
    case("the delta", "delta", value=lambda d: 1e-6)
    case("FSCDP's adversaries", "settings", "FSCDP", "adversaries", "outsider", "prv", value=lambda e: 0.5)
    case(
        "FSCDP's statement", "settings", "FSCDP", "statement", value=lambda text: text.replace("Not covered", "Covered")
    )
    case("FSCDP's epsilon", "settings", "FSCDP", "choice", "centre", value=lambda c: 1e4)
    case("FSCDP's statement", "settings", "FSCDP", "choice", "max_grad_norm", value=lambda c: c / 2)
    case("F's epsilon", "settings", "F", "epsilon", value=lambda e: own["FSCDP"]["epsilon"])
    case("the randomness", "randomness", value=lambda text: "seeded with 3: for teaching only")
    case("randomness", "options", "seed", value=lambda seed: 3)
    case("the folder", "folder", "private", value=lambda private: True)
    case("the folder", "folder", "epsilon_private", "rdp", value=lambda e: e / 2)
    case("the folder", "folder", "verdict", value=lambda text: "Private.")
    case("patients", "patients", "train", value=lambda n: 10 * n)
    case("FSCDP's test_accuracy", "settings", "FSCDP", "test_accuracy", "mean", value=lambda a: a + 0.01)
    for score in SCORES[1:]:
        case(f"FSCDP's {score}", "settings", "FSCDP", score, "mean", value=lambda a: (a or 0) + 0.01)
    case("F's balanced_accuracy", "settings", "F", "recall_per_grade", 0, value=lambda r: r - 0.01)
    return cases


def test_what_was_changed_is_found_by_doing_the_accounting_again(results, tmp_path, refuses):
    verify(results, tmp_path)
    for changed, said in tampered(results):
        with refuses(said):
            verify(changed, tmp_path)


def test_models_that_do_not_score_as_stated_are_found(made, results, tmp_path, refuses):
    folder = tmp_path / "changed"
    shutil.copytree(made, folder)
    accuracy = results["settings"]["FPDP"]["test_accuracy"]
    accuracy["mean"] = (accuracy["mean"] + 0.5) % 1
    accuracy["runs"] = [accuracy["mean"]]
    with refuses("FPDP-0.safetensors", "results.json says"):
        collect(put_back(results, folder), progress=False)
    path = folder / "FPDP-0.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({key: value[:1] for key, value in load_file(path).items()}, path, metadata)
    with refuses("does not fit"):
        collect(folder, progress=False)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "JSON"),
        ("[]", "no settings"),
        ('{"settings": {}}', "no settings"),
        ('{"settings": {"FSCDP": {}}}', "not what reproduce writes"),
        (b"\xff\xfe", "JSON"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, content, said):
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_more_bad_input(results, made, tmp_path, refuses):
    with refuses("does not exist", "reproduce"):
        write_report(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with refuses("--out"):
        write_report(put_back(results, tmp_path), tmp_path / "file", progress=False)
    for path, value in (("settings", "many"), ("runs", "five"), ("data", 7), ("hospitals", 3)):
        changed = deepcopy(results)
        changed["options"][path] = value
        with refuses():
            verify(changed, tmp_path)
    for missing in ("options", "hospitals", "patients", "weights_sha256", "randomness"):
        changed = deepcopy(results)
        del changed[missing]
        with refuses():
            collect(put_back(changed, tmp_path), progress=False)
    changed = deepcopy(results)
    changed["settings"]["other"] = changed["settings"]["F"]
    with refuses("other", "unknown"):
        verify(changed, tmp_path)
    del results["settings"]["FSCDP"]["test_accuracy"]
    with refuses("test_accuracy"):
        verify(results, tmp_path)


def test_what_the_report_has_no_use_for_is_refused(results, tmp_path, capsys):
    """Synthetic eyes are in no folder, and a network that the results are not of has nothing to say about them."""
    drawn = deepcopy(results) | {"data": "synthetic", "persons": PATIENTS["synthetic"]}
    drawn["options"] |= {"data": "synthetic", "data_dir": None}
    for made, given, said in (
        (drawn, ["--data-dir", "eyes"], "--data-dir is eyes, but synthetic eyes are drawn, not read: leave it out"),
        (results, ["--model", "mynets:small"], "--model is mynets:small, but the results are of head: leave it out"),
    ):
        assert main(["report", str(put_back(made, tmp_path)), *given]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "![x](http://a.example/y)", "a | b", "`code` *b* # c"]
)
def test_nothing_that_a_file_says_becomes_a_tag_a_link_or_a_cell(results, tmp_path, hostile):
    pages = []
    for results["weights"] in ("harmless", hostile):
        pages.append(Page(html(markdown(collect(put_back(results, tmp_path), progress=False)))))
    assert pages[0].tags == pages[1].tags and not {"script", "img", "a"} & set(pages[1].tags)
    assert hostile in " ".join(pages[1].text.split())
    assert plain("a\n\nb") == "a b"


def test_a_recorded_audit_is_shown_and_one_above_the_bound_overrules_it(results, tmp_path, refuses):
    row = {"setting": "FSCDP", "epsilon": 1.5, "delta": 1e-4, "confidence": 0.95}
    row |= {"canaries": 400, "guesses": 40, "correct": 35}
    results["audit"] = [row]
    facts = collect(put_back(results, tmp_path), progress=False)
    text = markdown(facts)
    assert "at least 1.50 at delta 0.0001 (95 %)" in text and "not repeated" in text
    assert facts["accounted"]["FSCDP"].private
    row["epsilon"] = 20.0
    facts = collect(put_back(results, tmp_path), progress=False)
    assert not facts["accounted"]["FSCDP"].private and facts["accounted"]["FPDP"].private
    assert "whole.** Not private: FSCDP: an audit found" in markdown(facts)
    assert "at least 20.00" in next(line for line in markdown(facts).splitlines() if line.startswith("| FSCDP"))
    for bad in ({**row, "epsilon": "1"}, {**row, "epsilon": math.nan}, {key: row[key] for key in ("setting",)}, 7):
        results["audit"] = [bad]
        with refuses("audit"):
            collect(put_back(results, tmp_path), progress=False)


@pytest.mark.slow
def test_a_short_audit_passes_the_sound_training_and_catches_one_without_noise(results, tmp_path):
    options = Options(settings=("FSCDP",), hospitals=4)
    one = verify(results, tmp_path)["FSCDP"]
    assert 0 < short_audit(one, options, canaries=100, seed=0)["epsilon"] < one.epsilon["prv"]
    # at the paper's epsilon of 9 no hundred guesses would prove a fault: ask for 1
    louder = Plan(one.bound.setting.with_noise(8.0), one.bound.choice, sizes=(293,) * 4, d=one.bound.noise.d)
    quiet = replace(one, bound=louder.bound)
    silent = short_audit(quiet, options, canaries=100, seed=0, plant=lambda training: scale_noise(training, 0.01))
    assert silent["epsilon"] > quiet.bound.epsilon(SETTINGS["FSCDP"].steps, "prv")
