"""Nothing that a run releases depends on one training patient, but for what carries noise.

Two folders of photographs that differ in a few training patients are trained on, with everything that carries noise
(the noised gradient sums and feature sums) replaced by constants. What is left must be the same to the last byte:
results, models, reports, checkpoints, messages, standard output.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from held_noise import hold, shorten
from PIL import Image

from dopamine_lib.__main__ import main
from dopamine_lib.data import HEART, aptos, dataset, hospitals, load, table
from dopamine_lib.data.aptos import load_aptos
from dopamine_lib.data.dataset import Dataset
from dopamine_lib.federation import hospital
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.training import Training
from dopamine_lib.models.features import BATCH, extract_features
from dopamine_lib.models.weights import load_weights
from dopamine_lib.reproduction import run

N, SIZE = 150, 28
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
#: What sound code has released in this session, by folder and options.
RELEASED = {}


def photograph(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def write_folder(folder, patients):
    """A data set in Kaggle's layout; patients maps an id to its photograph's seed and its grade."""
    (folder / "train_images").mkdir(parents=True)
    for name, (seed, _) in patients.items():
        photograph(seed).save(folder / "train_images" / f"{name}.png")
    rows = [f"{name},{grade}\n" for name, (_, grade) in patients.items()]
    (folder / "train.csv").write_text("id_code,diagnosis\n" + "".join(rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Working directories with ``data/aptos``: one set, and sets with other training patients."""
    top = tmp_path_factory.mktemp("neighbours")
    patients = {f"eye{i}": (i, (i % 7) % 5) for i in range(N)}
    write_folder(top / "one" / "data" / "aptos", patients)
    whole = load_aptos(top / "one" / "data" / "aptos", size=SIZE)
    mine = [f"eye{i}" for i in whole.train]
    others = {}
    others["one fewer"] = {name: own for name, own in patients.items() if name != mine[3]}
    # another photograph of the patient is another hash: one that leaves the patient on the training side
    others["image replaced"] = dict(patients) | {mine[5]: (next(s for s in range(N, 2 * N) if trains(s, top)), 4)}
    others["a second image"] = dict(patients) | {"twin": (patients[mine[7]][0], 0)}
    # hospitals differ most where all of that happens at once, and to a whole hospital's worth of patients
    gone = mine[8:20]
    others["many"] = {name: own for name, own in others["a second image"].items() if name not in gone}
    for name, own in others.items():
        write_folder(top / name / "data" / "aptos", own)
    write_tables(top)
    write_own(top)
    return top


def write_tables(top):
    """In each of the working directories the heart-disease patients, as they are or with other training patients."""
    header, *rows = HEART.read_text().splitlines()
    mine = load("heart").train
    # a row of another patient who trains as well; nobody of the declared range has such an age or pressure
    other = next(row for i in range(99) if trains_too(row := f"Budapest,95,1,2,{250 + i},132,0,2,185,0,0,,,,1", top))
    fewer = [row for i, row in enumerate(rows) if i != mine[3]]
    many = [row for i, row in enumerate(rows) if i not in mine[5:200]] + [other, rows[mine[300]]]
    for name, own in {"one": rows, "one fewer": fewer, "many": many}.items():
        (top / name / "heart").mkdir()
        (top / name / "heart" / "heart.csv").write_text("\n".join([header, *own]) + "\n")
        shutil.copy(HEART.with_suffix(".toml"), top / name / "heart")


def write_own(top):
    """In two of the working directories a folder with persons and hospitals, and a file of arrays."""
    for name in ("one", "many"):
        place = top / name / "mine"
        write_folder(place, {f"eye{i}": (i, 0) for i in range(N)})
        (place / "train.csv").unlink()
        rows = [f"eye{i},{i % 3},p{i // 2},{'ab'[i // 2 % 2]},{30 + i % 40}\n" for i in range(N)]
        if name == "one":
            (place / "labels.csv").write_text("image,label,person,site,age\n" + "".join(rows))
            of = load(str(place), size=SIZE)
            gone = [i for i in of.train if i not in of.validation][2:40]
            gone = np.flatnonzero(np.isin(of.person, of.person[gone]))
        else:
            kept = [row for i, row in enumerate(rows) if i not in gone]
            (place / "labels.csv").write_text("image,label,person,site,age\n" + "".join(kept))
        rng, arrays = np.random.default_rng(0), {}
        for part, count in (("train", 90), ("val", 20), ("test", 30)):
            arrays[f"{part}_images"] = rng.integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)
            arrays[f"{part}_labels"] = np.arange(count) % 3
        if name == "many":
            arrays |= {key: arrays[key][20:] for key in ("train_images", "train_labels")}
        np.savez(top / name / "mine.npz", **arrays)


def trains_too(row, top):
    """Whether the patient of a row is a training patient."""
    folder = top / "look"
    folder.mkdir(exist_ok=True)
    (folder / "heart.csv").write_text(HEART.read_text() + row + "\n")
    shutil.copy(HEART.with_suffix(".toml"), folder)
    data = load("heart", folder)
    return 920 in data.train and 920 not in data.validation


def trains(seed, top):
    """Whether the photograph of this seed is a training patient's."""
    folder = top / f"look{seed}"
    write_folder(folder, {f"eye{i}": (i, 0) for i in range(60)} | {"new": (seed, 0)})
    return 60 in load_aptos(folder, size=SIZE).train


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Settings of a few rounds, one process, and a clock that stands still."""
    shorten(monkeypatch.setitem)
    monkeypatch.setattr(run, "fitting_workers", lambda jobs: 1)
    monkeypatch.setattr(run.time, "perf_counter", lambda: 0.0)


@pytest.fixture
def released(folders, tmp_path, monkeypatch, capsys):
    """A function: everything that a run on one of the folders releases, as bytes by name."""

    def release(which, *options, again=False):
        if not again and (which, options) in RELEASED:
            return RELEASED[which, options]
        kept, out = {}, tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()

        save, total = run.save_checkpoint, Training._total

        def save_and_keep(path, training):
            save(path, training)
            kept[f"checkpoint {len(kept)}"] = contents(path)

        def total_and_keep(self, number, invited, arrived, messages):
            found = total(self, number, invited, arrived, messages)
            sent = {k: np.asarray(message).tobytes() for k, message in messages.items()}
            kept[f"round {len(kept)}"] = repr((number, list(invited), list(arrived), sent)).encode()
            kept[f"total {len(kept)}"] = np.asarray(found).tobytes()
            return found

        with monkeypatch.context() as patch:
            patch.chdir(folders / which)
            hold(patch.setattr)
            patch.setattr(run, "save_checkpoint", save_and_keep)
            patch.setattr(Training, "_total", total_and_keep)
            images = [] if "heart" in options else ["--data", "aptos", "--size", str(SIZE)]
            words = [*images, "--hospitals", "4", "--runs", "1", *options]
            assert main(["reproduce", *words, "--out", str(out / "out")]) == 0
            assert main(["report", str(out / "out")]) == 0
        kept["stdout"] = capsys.readouterr().out.replace(str(out), "OUT").encode()
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".lock"]
        kept |= {str(path.relative_to(out)): contents(path) for path in files}
        return kept if again else RELEASED.setdefault((which, options), kept)

    return release


def contents(path):
    """A file's bytes; of tensors with the header in order, which their library writes in any."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return json.dumps(header, sort_keys=True).encode() + content[end:]


def difference(one, other):
    """The names of what differs."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


DECLARED = ("--patients", "480")


@pytest.mark.parametrize("which", ["one fewer", "image replaced", "a second image", "many"])
@pytest.mark.parametrize("split", ["iid", "skewed"])
def test_neighbours_release_the_same(released, folders, which, split):
    terms = (*DECLARED, "--split", split)
    one, other = released("one", *terms), released(which, *terms)
    assert difference(one, other) == []
    names = {
        "results.json",
        "metrics.csv",
        "report.md",
        "report.html",
        "figure1.png",
        "FSCDP-0.safetensors",
        "options.json",
    }
    assert {f"out/{name}" for name in names} <= one.keys() and any(name.startswith("checkpoint") for name in one)
    assert b"n = 480" in one["out/report.md"]


@pytest.mark.parametrize(
    "options",
    [
        ("--aggregation", "bfv", "--settings", "F,FPDP,FSCDP", "--hospitals", "6"),
        ("--aggregation", "masks", "--settings", "F,FPDP,FSCDP", "--hospitals", "6", "--loss", "balanced"),
        ("--noise", "integer", "--specificity", "0.9"),
        ("--aggregation", "bfv", "--noise", "integer", "--settings", "FSCDP"),
        ("--aggregation", "masks", "--noise", "integer", "--settings", "FSCDP", "--least", "3", "--dropout", "0.2"),
        ("--epsilon", "5", "--settings", "FSCDP,FPDP", "--accountant", "rdp", "--local-steps", "3", "--rounds", "50"),
        ("--model", "cnn", "--loss", "balanced", "--augment", "2"),
        ("--split", "unequal", "--settings", "FPDP"),
        ("--split", "quality", "--settings", "FPDP"),
        pytest.param(("--model", "squeezenet"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_with_every_model_noise_and_aggregation(released, options):
    assert difference(released("one", *DECLARED, *options), released("many", *DECLARED, *options)) == []


HEART_OPTIONS = ("--data", "heart", "--data-dir", "heart")


@pytest.mark.parametrize(
    "which, terms",
    [
        pytest.param("one fewer", (), marks=pytest.mark.slow),
        ("many", ()),
        pytest.param("many", ("--split", "skewed"), marks=pytest.mark.slow),
        ("many", ("--model", "mlp", "--epsilon", "5", "--local-steps", "2", "--rounds", "20", "--specificity", "0.9")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_patients_in_a_table(released, which, terms):
    one, other = (released(name, *HEART_OPTIONS, *terms) for name in ("one", which))
    assert difference(one, other) == []
    assert b"n = 613" in one["out/report.md"] and {"out/figure1.png", "out/FPDP-0.safetensors"} <= one.keys()


@pytest.mark.parametrize(
    "source", [("--data", "mine", "--split", "site", "--hospitals", "2"), ("--data", "./mine.npz")]
)
def test_data_of_one_s_own(released, source):
    terms = (*DECLARED, *source, "--model", "cnn", "--settings", "FPDP,FSCDP")
    assert difference(released("one", *terms), released("many", *terms)) == []


@pytest.mark.slow
def test_between_processes(folders, tmp_path):
    """Over MPI as well: results, models, and every rank's messages, or their lengths where nobody can read them."""
    pytest.importorskip("mpi4py", reason="needs mpi4py and an MPI")
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if mpiexec is None:
        pytest.skip("needs mpiexec")
    runs = [("FSCDP", "plain", "float"), ("FSCDP", "bfv", "float"), ("FSCDP", "masks", "integer")]
    runs += [("FPDP", "plain", "float"), ("FPDP", "masks", "float"), ("F", "bfv", "float")]
    found = {}
    for which in ("one", "many"):
        out, jobs = tmp_path / which, []
        for name, kind, noise in runs:
            options = {"data": "aptos", "size": SIZE, "hospitals": 6, "runs": 1, "patients": 480, "settings": [name]}
            options |= {"aggregation": kind, "noise": noise}
            jobs.append({"options": options, "out": str(out / f"{name}-{kind}-{noise}")})
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        program = [sys.executable, "-W", "ignore", "-m", "mpi4py", Path(__file__).parent / "mpi_neighbours.py"]
        command, environment = [mpiexec, "-n", "7", *program, tmp_path / "jobs.json"], os.environ | ONE_THREAD
        terms = {"capture_output": True, "text": True, "timeout": 600, "env": environment}
        ended = subprocess.run(command, cwd=folders / which, **terms)
        assert ended.returncode == 0, ended.stderr
        found[which] = {
            str(path.relative_to(out)): contents(path)
            for path in out.rglob("*")
            if path.is_file() and path.suffix != ".lock"
        }
    assert difference(found["one"], found["many"]) == []
    assert {f"{name}-{kind}-{noise}/results.json" for name, kind, noise in runs} <= found["one"].keys()
    assert all(found["one"]["FSCDP-plain-float/rank-1.txt"].splitlines())


# --- each fault, put back --------------------------------------------------------------------------------------------


def true_sizes(patch):
    """Hospitals' true numbers of patients in place of the declared ones: in divisors, weights, results, statements."""
    load = Experiment.load.__func__

    def load_and_count(cls, options, **more):
        experiment = load(cls, options, **more)
        return replace(experiment, sizes=tuple(map(len, experiment.patients)))

    patch.setattr(Experiment, "load", classmethod(load_and_count))


def true_divisor(patch):
    """The total divided by the true number of patients; everything else as declared."""
    patch.setattr(Training, "_patients", lambda self, arrived: sum(len(self.hospitals[k]) for k in arrived))


def true_local_divisor(patch):
    """A hospital's local steps divided by its true number of patients."""

    def change(self, w, round_number):
        steps, batch = self.plan.setting.local_steps, self.plan.setting.sample_rate * len(self)
        noisy = lambda local, i: self.noisy_sum(local, round_number * steps + i)  # noqa: E731
        return hospital.local_change(w, noisy, self.plan.choice, steps, batch)

    patch.setattr(Hospital, "local_change", change)


def true_counts(patch):
    """Training patients per grade in the report."""
    counts = Dataset.counts

    def training_too(self):
        return {part: counts(self)["train"] for part in counts(self)}

    patch.setattr(Dataset, "counts", training_too)


def checksum_of_all(patch):
    """A checksum over all images."""
    real = aptos.content_checksum
    patch.setattr(aptos, "content_checksum", lambda images, labels, test: real(images, labels, np.arange(len(labels))))


def range_of_the_data(patch):
    """A table's ranges read off its rows."""
    encoded = table._encoded

    def as_found(name, told, values):
        numbers = [value for value in values if value is not None]
        return encoded(name, told | {"range": [min(numbers), max(numbers)]} if "range" in told else told, values)

    patch.setattr(table, "_encoded", as_found)


def checksum_of_all_rows(patch):
    """A checksum over all rows of a table."""
    real = table.content_checksum
    patch.setattr(table, "content_checksum", lambda images, labels, test: real(images, labels, np.arange(len(labels))))


@pytest.mark.parametrize("fault", [range_of_the_data, checksum_of_all_rows])
def test_each_fault_of_a_table_is_seen(released, fault):
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        one, other = (released(which, *HEART_OPTIONS, "--settings", "FSCDP", again=True) for which in ("one", "many"))
        assert "out/report.md" in difference(one, other)


def split_by_rank(patch):
    """A split that deals persons by their rank among all."""

    def place(person, purpose, seed):
        people, rank = np.unique(person, return_inverse=True)
        return (np.random.default_rng([seed, len(purpose)]).permutation(len(people))[rank] + 0.5) / len(people)

    for module in (dataset, hospitals):
        patch.setattr(module, "place", place)


@pytest.mark.parametrize(
    "fault, seen",
    [
        (true_sizes, "out/results.json"),
        (true_divisor, "out/FSCDP-0.safetensors"),
        (true_local_divisor, "out/FPDP-0.safetensors"),
        (true_counts, "out/report.md"),
        (checksum_of_all, "out/report.md"),
        (split_by_rank, "out/results.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_fault_is_seen(released, fault, seen):
    """The test above fails where a fault is put back."""
    terms = (*DECLARED, "--settings", "FPDP,FSCDP")
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        assert seen in difference(*(released(which, *terms, again=True) for which in ("one", "many")))
    assert difference(released("one", *terms), released("many", *terms)) == []


def test_a_counted_number_is_named_public(released):
    """Without a published or declared number the count is what everything is divided by, and the statement says so."""
    results = json.loads(released("one", "--settings", "FSCDP")["out/results.json"])
    assert results["patients"]["counted"] and "which is their count" in results["settings"]["FSCDP"]["statement"]
    declared = json.loads(released("one", *DECLARED, "--settings", "FSCDP")["out/results.json"])
    assert not declared["patients"]["counted"] and "their count" not in declared["settings"]["FSCDP"]["statement"]
    assert declared["patients"]["train"] == sum(declared["hospitals"]) == 480


def test_a_set_of_about_aptos_size_is_declared_as_published(folders, monkeypatch):
    """One patient fewer of APTOS is still APTOS, with the paper's 2931 training patients."""
    monkeypatch.setattr(aptos, "APTOS_TEST", 30)
    for images, declared in ((N, N - 30), (N + 10, N - 20), (2 * N, None)):
        monkeypatch.setattr(aptos, "APTOS_IMAGES", images)
        assert load_aptos(folders / "one" / "data" / "aptos", size=SIZE).sheet.patients == declared


def test_an_images_features_do_not_tell_how_many_there_are(tmp_path, monkeypatch):
    """The same to the last bit, whoever else is in the batch: a short batch would be computed by another kernel."""
    monkeypatch.setenv("DOPAMINE_CACHE", str(tmp_path))
    images = load("synthetic", size=28).images[: BATCH + 6]
    weights = load_weights(None)
    whole = extract_features(weights, images, progress=False)
    for gone in (3, BATCH + 2):
        fewer = extract_features(weights, np.delete(images, gone, 0), progress=False)
        assert torch.equal(fewer, whole[np.delete(np.arange(len(images)), gone)])
