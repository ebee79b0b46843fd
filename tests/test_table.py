"""Patients in tables: rows by a data sheet, the embedded heart-disease patients, and tables that are wrong."""

import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from held_noise import shorten
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from dopamine_lib.__main__ import main
from dopamine_lib.data import HEART, load
from dopamine_lib.data.cells import in_range, one_of
from dopamine_lib.data.csv_file import CsvFile
from dopamine_lib.data.hospitals import hospital_shares, split_hospitals
from dopamine_lib.data.table import encoded_rows, load_table
from dopamine_lib.fairness.scores import cannot_say, subgroups
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.inference.network.plan import evaluate
from dopamine_lib.inference.network.serving import load as served
from dopamine_lib.inference.network.serving import row_inputs
from dopamine_lib.models.checkpoints import load_model
from dopamine_lib.page.served_model import facts
from dopamine_lib.reproduction import run

SITES = ("Cleveland", "Budapest", "Long Beach", "Switzerland")
SHEET = """
target = "ill"
person = "id"
site = "clinic"
[classes]
no = [0]
yes = ["1", "severe"]
[sites]
north = 40
south = 20
[inputs]
age = { range = [0, 100] }
pressure = { range = [80, 200], missing = [0] }
smokes = { categories = ["no", "yes", "gave up"], missing = [] }
[attributes.age]
bands = [40, 60]
[attributes.sex]
column = "s"
values = { female = ["f"], male = ["m"] }
"""
HEADER = "id,ill,clinic,age,pressure,smokes,s"


def rows(n=60):
    kinds = ["no", "yes", "gave up", ""]
    fixed = ("north,{},0,{},f", "south,{},120,{},m")
    return [f"p{i // 2},{(0, 1, 'severe')[i % 3]},{fixed[i % 2].format(i, kinds[i % 4])}" for i in range(n)]


def write(folder, lines, sheet=SHEET, header=HEADER):
    (folder / "own.csv").write_text("\n".join([header, *lines]) + "\n")
    (folder / "own.toml").write_text(sheet)
    return folder / "own.csv"


def test_the_embedded_patients_are_the_published_ones(check_dataset):
    assert hashlib.sha256(HEART.read_bytes()).hexdigest().startswith("b77ae9b496a1e9cb")
    data = load("heart")
    check_dataset(data)
    assert len(data) == 920 and data.grades == ("No disease", "Disease") and data.sheet.licence == "CC BY 4.0"
    site = data.attributes["site"]
    assert [(site == name).sum() for name in SITES] == [303, 294, 200, 123]
    assert [data.labels[site == name].sum() for name in SITES] == [139, 106, 149, 115]
    assert [(data.attributes["sex"][site == name] == "female").sum() for name in SITES] == [97, 81, 6, 10]
    assert (HEART.parent / "README.md").read_text().count("CC BY 4.0") == 1
    # chol 0 is missing, and all of Switzerland's
    missing = data.images[:, data.inputs.index("chol missing")] > 0
    assert missing.sum() == 172 + 30 and missing[site == "Switzerland"].all()


def test_a_pooled_regression_is_as_good_as_others_found():
    data = load("heart")
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    assert 0.80 < cross_val_score(LogisticRegression(max_iter=1000), data.images, data.labels, cv=folds).mean() < 0.85


def test_rows_have_norm_1_at_most_whatever_they_hold(tmp_path):
    lines = rows() + [f"w{i},0,north,{10.0**i},{-(10.0**i)},yes,f" for i in range(0, 300, 20)]
    data = load_table(write(tmp_path, lines))
    norms = np.linalg.norm(data.images.astype(float), axis=1)
    assert norms.max() <= 1 + 1e-6
    assert np.linalg.norm(load("heart").images, axis=1).max() <= 1


def test_a_row_by_its_sheet(tmp_path):
    data = load_table(write(tmp_path, rows()))
    names = ("age", "pressure", "pressure missing", "smokes=no", "smokes=yes", "smokes=gave up")
    assert data.inputs == names and data.images.dtype == np.float32
    found = data.images * np.sqrt(3)
    assert np.allclose(found[1], [-0.98, 2 * 40 / 120 - 1, 0, 0, 1, 0]) and np.allclose(found[0, 1:3], [0, 1])
    assert not found[3, 3:].any()  # a category that is missing
    assert data.labels[:3].tolist() == [0, 1, 1]
    assert (data.person[0::2] == data.person[1::2]).all() and len(set(data.person.tolist())) == 30
    assert data.attributes["age"][[0, 40, 59]].tolist() == ["below 40", "40 to below 60", "40 to below 60"]
    assert data.sheet.patients is None and data.sheet.sites == ("north", "south")


@pytest.mark.parametrize(
    "text, line",
    [
        ('a,b\n1,2\n"3,4\n5,6\n', 3),
        ('a,"b\n1,2', 1),
        ('a,b\n1,"', 2),
        ('a,b\n1,2\n"', 3),
        ('a,b\n"1,2\n3,4\n"5,6\n7,8\n', 2),  # what closes it begins another
        ('a,b\n1,2\n"3,' + "4\n5," * 30_000, 3),
    ],
)
def test_a_quotation_mark_that_is_not_closed_is_found_where_it_stands(text, line, refuses):
    with refuses(f"t.csv, line {line}: a quotation mark is not closed at the end of a cell"):
        CsvFile.read(Path("t.csv"), text.encode())
    table = CsvFile.read(Path("t.csv"), b'a,b\n1,"two\nlines"')
    assert (table.header, table.rows) == (["a", "b"], [(3, ["1", "two\nlines"])])
    assert CsvFile.read(Path("t.csv"), b"").rows == []
    spaced = CsvFile.read(Path("t.csv"), b'a,b\n"1" , "2"\n3,4"\n')
    assert spaced.rows == [(2, ["1", "2"]), (3, ["3", '4"'])]


def test_a_message_has_the_first_line_of_a_cell(refuses):
    for read in (in_range, one_of({"mild": [1]}, "t.toml")):
        with refuses("t.csv, line 9: a '1,2 …' is not") as error:
            read("1,2\n3,4", "t.csv, line 9: a")
        assert "3,4" not in str(error.value)


@pytest.mark.parametrize("odd", ["bom", "utf-16", "crlf", "semicolons", "tabs", "quotes", "spaces", "blank lines"])
def test_odd_files_are_the_same_table(odd, tmp_path):
    path = write(tmp_path, rows())
    text, plain = path.read_text(), load_table(path)
    content = {
        "bom": lambda: b"\xef\xbb\xbf" + text.encode(),
        "utf-16": lambda: text.encode("utf-16"),
        "crlf": lambda: text.replace("\n", "\r\n").encode(),
        "semicolons": lambda: text.replace(",", ";").encode(),
        "tabs": lambda: text.replace(",", "\t").encode(),
        "quotes": lambda: "\n".join(",".join(f'"{c}"' for c in line.split(",")) for line in text.split("\n")).encode(),
        "spaces": lambda: text.replace(",", " , ").encode(),
        "blank lines": lambda: text.replace("\n", "\n\n").encode(),
    }[odd]()
    path.write_bytes(content)
    found = load_table(path)
    assert np.array_equal(found.images, plain.images) and np.array_equal(found.test, plain.test)
    assert found.sheet.checksum == plain.sheet.checksum


def test_a_column_of_parts_is_obeyed(tmp_path):
    parts = ["Test", "training", "val", "train"]
    lines = [f"{line},{parts[(i // 2) % 4]}" for i, line in enumerate(rows())]
    path = write(tmp_path, lines, 'split = "part"\n' + SHEET, HEADER + ",part")
    data = load_table(path)
    pair = np.arange(60) // 2 % 4
    assert np.array_equal(data.test, np.flatnonzero(pair == 0))
    assert np.array_equal(data.validation, np.flatnonzero(pair == 2)) and len(data.train) == 60 - len(data.test)
    assert np.array_equal(load_table(path, seed=7).train, data.train)


def sheet(old, new):
    return lambda folder: write(folder, rows(), SHEET.replace(old, new, 1))


def line(number, text):
    def damage(folder):
        lines = rows()
        lines[number] = text
        write(folder, lines)

    return damage


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "own.toml").unlink(), ["own.toml: no such file", "data sheet beside it"]),
        (lambda folder: (folder / "own.csv").unlink(), ["own.csv: cannot be read"]),
        (lambda folder: (folder / "own.csv").write_bytes(b"\xff\xd8\xff\x00"), ["own.csv: not a UTF-8 CSV file"]),
        (lambda folder: write(folder, []), ["own.csv: no rows"]),
        (sheet('target = "ill"', "target = ill"), ["own.toml: cannot be read as TOML"]),
        (sheet('target = "ill"', "target = 3"), ["'target' is 3", "must be text in quotation marks"]),
        (sheet('target = "ill"', 'target = "sick"'), ["own.csv: no column sick", "'target'"]),
        (sheet("target", "targets"), ["'targets' is unknown", "target"]),
        (sheet('target = "ill"\n', ""), ["own.toml: no 'target'"]),
        (sheet('yes = ["1", "severe"]', ""), ["[classes] has one class"]),
        (sheet("no = [0]", "no = 0"), ["[classes]: no is 0", "list"]),
        (sheet("range = [0, 100]", "range = [100, 0]"), ["[inputs], age: range is [100, 0]", "below"]),
        (sheet("range = [0, 100]", "range = [0]"), ["[inputs], age: range is [0]", "two numbers"]),
        (sheet("range = [0, 100]", "span = [0, 100]"), ["[inputs], age", "range or categories"]),
        (sheet("missing = [0]", "missing = 0"), ["[inputs], pressure: missing is 0", "list"]),
        (sheet('categories = ["no", "yes", "gave up"]', 'categories = ["no"]'), ["smokes: categories is ['no']"]),
        (sheet("bands = [40, 60]", "bands = [60, 40]"), ["[attributes], age: bands is [60, 40]", "ascending"]),
        (sheet("north = 40", "north = 0"), ["[sites] has north = 0"]),
        (sheet("north = 40", "west = 40"), ["own.csv, line 2: clinic 'north' is not declared", "[sites]"]),
        (sheet('target = "ill"', 'target = "ill"\ntest = 1.5'), ["'test' is 1.5", "(0, 1)"]),
        (line(3, "p1,0,north,old,0,no,f"), ["own.csv, line 5: age 'old' is not a number"]),
        (line(3, "p1,0,north,inf,0,no,f"), ["own.csv, line 5: age 'inf' is not a number"]),
        (line(3, "p1,0,north,,0,no,f"), ["own.csv, line 5: age is missing", "missing = []"]),
        (line(3, "p1,2,north,5,0,no,f"), ["own.csv, line 5: ill '2' is not declared", "[classes]"]),
        (line(3, "p1,0,north,5,0,maybe,f"), ["own.csv, line 5: smokes 'maybe' is not declared"]),
        (line(3, ",0,north,5,0,no,f"), ["own.csv, line 5: id is missing", "leave out the row"]),
        (line(3, "p1,0,north,5,0,no,x"), ["own.csv, line 5: s 'x' is not declared", "[attributes], sex"]),
        (line(3, "p1"), ["own.csv, line 5: ill '' is not declared"]),
        (lambda folder: write(folder, rows(6)), ["of 3 persons are too few"]),
    ],
)
def test_each_fault_in_one_line(damage, said, tmp_path, refuses):
    write(tmp_path, rows())
    damage(tmp_path)
    with refuses(*said):
        load_table(tmp_path / "own.csv")


@pytest.mark.parametrize(
    "part, said",
    [("later", ["line 2: part 'later' is no part", "train, validation, test"]), ("test", ["is train", "same person"])],
)
def test_a_wrong_part_in_one_line(part, said, tmp_path, refuses):
    lines = [f"{line},{part if i == 0 else 'train'}" for i, line in enumerate(rows())]
    with refuses(*said):
        load_table(write(tmp_path, lines, 'split = "part"\n' + SHEET, HEADER + ",part"))
    lines = [f"{line},train" for line in rows()]
    with refuses("none of them for test"):
        load_table(write(tmp_path, lines, 'split = "part"\n' + SHEET, HEADER + ",part"))


def test_the_hospitals_are_those_that_the_data_names(refuses):
    data = load("heart")
    parts = split_hospitals(data, 4, split="site")
    assert [set(data.attributes["site"][own]) for own in parts] == [{name} for name in SITES]
    assert np.array_equal(np.sort(np.concatenate(parts)), data.train)
    assert np.allclose(hospital_shares(data, 4, split="site"), np.array([303, 294, 200, 123]) / 920)
    with refuses("5 hospitals, but heart names 4", "--hospitals 4"):
        split_hospitals(data, 5, split="site")
    with refuses("synthetic names 0", "another --split"):
        split_hospitals(load("synthetic", size=28), 4, split="site")
    with refuses("'quality' is for pictures", "heart is a table"):
        split_hospitals(data, 4, split="quality")


def test_what_is_left_out_fits_the_data(refuses):
    heart = Options(data="heart")
    assert (heart.model, heart.split, heart.hospitals) == ("linear", "site", None)
    assert Experiment.load(heart, progress=False).sizes == (202, 196, 133, 82)
    dealt = Experiment.load(Options(data="heart", split="iid", model="mlp"), progress=False)
    assert len(dealt.sizes) == 10 and sum(dealt.sizes) == 613 and dealt.features is None
    assert (Options().model, Options().split, Options().hospitals) == ("head", "iid", 10)
    for options, said in (
        ({"data": "heart", "model": "head"}, "model 'head' does not take a table"),
        ({"model": "linear", "size": 28}, "model 'linear' does not take images"),
        ({"data": "heart", "hospitals": 10}, "heart names 4"),
    ):
        with refuses(said):
            Experiment.load(Options(**options), progress=False)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_every_gradient_is_bounded_and_is_the_plain_one(model):
    """Clipped at 1 and without clipping: the sums are those of the plain loop."""
    experiment = Experiment.load(Options(data="heart", model=model), progress=False)
    task, index = experiment.task(), torch.arange(40)
    w = task.start + 0.1 * torch.randn(task.d, generator=torch.Generator().manual_seed(0))
    net = experiment.task().net
    torch.nn.utils.vector_to_parameters(w, net.parameters())
    total = torch.zeros(task.d)
    for i in index:
        row, label = torch.from_numpy(experiment.dataset.images[i])[None], experiment.labels[i][None]
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(row), label).backward()
        own = torch.cat([p.grad.flatten() for p in net.parameters()])
        total += own / max(1, own.norm() / 0.3)
    assert torch.allclose(task.clipped_sums(w, index, 0.3)[0], total, atol=1e-5)


def test_the_paper_s_epsilons_do_not_depend_on_the_data():
    """CDP and FSCDP as on APTOS; the mean over four hospitals of FPDP is that of ten, up to the draw of rounds."""
    experiment = Experiment.load(Options(data="heart"), progress=False)
    spent = {
        name: experiment.plan(name).bound.epsilon(experiment.plan(name).setting.steps) for name in ("CDP", "FSCDP")
    }
    assert spent == {"CDP": pytest.approx(9.13, abs=0.01), "FSCDP": pytest.approx(10.83, abs=0.01)}
    plan = experiment.plan("FPDP")
    assert plan.bound.epsilon(1250) == pytest.approx(19.05, abs=0.06) and len(plan.ledgers()) == 4


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch.setitem)
    monkeypatch.setattr(run, "fitting_workers", lambda jobs: 1)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_from_the_command_line_to_the_report(model, short, tmp_path, capsys, refuses):
    out = tmp_path / "out"
    words = ["reproduce", "--data", "heart", "--model", model, "--runs", "1", "--out", str(out)]
    assert main(words) == 0 and main([*words, "--resume"]) == 0
    assert "paper" not in (said := capsys.readouterr().out) and "balanced" in said
    results = json.loads((out / "results.json").read_text())
    assert results["grades"] == ["No disease", "Disease"] and results["inputs"] == 29
    assert results["options"]["hospitals"] == 4 and results["hospitals"] == [202, 196, 133, 82]
    assert not results["patients"]["counted"]
    for result in results["settings"].values():
        assert result["balanced_accuracy"]["mean"] == pytest.approx(np.mean(result["recall_per_grade"]))
    assert "with all of their rows" in results["settings"]["FSCDP"]["statement"]
    assert main(["report", str(out)]) == 0
    report = (out / "report.md").read_text()
    assert all(f"site: {name}" in report for name in SITES) and "sex: female" in report and "age: 60 up" in report
    assert "ethnicity and other illnesses are not" in report
    for read in (load_model, facts):
        with refuses(f"FSCDP-0.safetensors is a model of a table's rows ({model})"):
            read(out / "FSCDP-0.safetensors")
    net, _ = load_model(out / "FSCDP-0.safetensors", tables=True)
    plan, weights, grades = served(out / "FSCDP-0.safetensors")
    declared = row_inputs(out / "FSCDP-0.safetensors")
    table = CsvFile.read(HEART)
    rows, names = encoded_rows(table, declared, "the provider")
    assert list(names) == [*load("heart").inputs] and grades == results["grades"]
    wanted = net(torch.from_numpy(rows[::40])).detach().numpy()
    found = [evaluate(plan, weights, row[:, None, None]) for row in rows[::40]]
    assert np.abs([logits for logits, _ in found] - wanted).max() < 1e-3 * np.ptp(wanted)
    assert max(max(room.values()) for _, room in found) < 0.9
    with refuses("size is 64", "leave it out"):
        served(out / "FSCDP-0.safetensors", size=64)


def test_encrypted_and_masked(short, tmp_path):
    found = {}
    for kind in ("plain", "bfv", "masks"):
        out = tmp_path / kind
        words = ["--data", "heart", "--aggregation", kind, "--settings", "FSCDP", "--runs", "1", "--seed", "3"]
        assert main(["reproduce", *words, "--out", str(out)]) == 0
        found[kind] = json.loads((out / "results.json").read_text())["settings"]["FSCDP"]["test_accuracy"]["mean"]
    assert found["plain"] == found["bfv"] == found["masks"]


def test_subgroups_without_pictures():
    data = load("heart")
    groups = subgroups(data, data.test)
    assert {"sex", "age", "site", "grade", "sex x site"} <= groups.keys() and "sharpness" not in groups
    assert set(groups["site"]) == set(SITES)
    assert "ethnicity and other illnesses are not" in cannot_say(data)


def test_the_sheet_s_own_remarks_are_true():
    declared = tomllib.loads(HEART.with_suffix(".toml").read_text())
    assert sum(declared["sites"].values()) == 920 and declared["patients"] == round(920 * (1 - declared["test"]))


def test_somebody_else_s_idea_of_a_person_is_not_believed(short, tmp_path, refuses):
    out = tmp_path / "out"
    assert main(["reproduce", "--data", "heart", "--settings", "FSCDP", "--runs", "1", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(results | {"persons": "nobody"}))
    from dopamine_lib.report.collect import write_report

    with refuses("who is one patient"):
        write_report(out)
