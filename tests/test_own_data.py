"""Data of one's own: the field's layouts as they come, files that are wrong, and what a run makes of them."""

import json
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from held_noise import shorten
from PIL import Image

from dopamine_lib.__main__ import main
from dopamine_lib.data import load
from dopamine_lib.data.dataset import GRADES
from dopamine_lib.data.folder import SUFFIXES
from dopamine_lib.data.hospitals import split_hospitals
from dopamine_lib.fairness.scores import subgroups
from dopamine_lib.federation.options import Options
from dopamine_lib.reproduction import run

N = 60


def picture(path, seed, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=kind)


def table(path, header, rows, join=",", end="\n", start=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = end.join(join.join(map(str, row)) for row in [header.split(","), *rows]) + end
    path.write_bytes(start + text.encode())


def ours(top, n=N):
    """labels.csv with everything; two images a person."""
    for i in range(n):
        picture(top / "pictures" / f"scan{i}.png", i)
    kinds, sites = ("ill", "well"), ("north", "south")
    rows = [(f"scan{i}.png", kinds[i % 2], f"p{i // 2}", sites[i // 2 % 2], 30 + i % 9) for i in range(n)]
    table(top / "labels.csv", "image,label,person,site,age", rows)


def odd(top):
    """The same with a byte-order mark, Windows line ends, semicolons, capital suffixes and a Mac's files."""
    ours(top)
    for path in list((top / "pictures").iterdir()):
        path.rename(path.with_suffix(".PNG"))
        (path.parent / f"._{path.name}").write_bytes(b"resource fork")
    text = (top / "labels.csv").read_text().replace(",", ";").replace("\n", "\r\n")
    (top / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    picture(top / "__MACOSX" / "scan0.png", 99)
    (top / ".DS_Store").write_bytes(b"\0")


def obeyed(top):
    ours(top)
    lines = (top / "labels.csv").read_text().splitlines()
    parts = ["train", "train", "test", "val"]
    lines = [lines[0] + ",split"] + [f"{line},{parts[i // 2 % 4]}" for i, line in enumerate(lines[1:])]
    (top / "labels.csv").write_text("\n".join(lines))


def kaggle(top):
    """APTOS: images in a folder of the archive's name, twice; a table without labels, and a sample submission."""
    top = top / "aptos2019-blindness-detection" / "aptos2019"
    for i in range(N):
        picture(top / "train_images" / f"a{i}.png", i)
    table(top / "train.csv", "id_code,diagnosis", [(f"a{i}", i % 5) for i in range(N)])
    table(top / "test.csv", "id_code", [(f"b{i}",) for i in range(3)])
    table(top / "sample_submission.csv", "id_code,diagnosis", [(f"b{i}", 0) for i in range(3)])


def eyepacs(top):
    for i in range(N):
        picture(top / "train" / f"{i // 2}_{('left', 'right')[i % 2]}.jpeg", i, "JPEG")
    table(top / "trainLabels.csv", "image,level", [(f"{i // 2}_{('left', 'right')[i % 2]}", i % 5) for i in range(N)])


def messidor(top):
    """Messidor 1, exported from its Excel files: the column of hospitals, German Excel's semicolons."""
    names = [f"20051020_{i}_0100_PP.png" for i in range(N)]
    for i, name in enumerate(names):
        picture(top / "Base11" / name, i)
    rows = [
        (name, ("Service Ophtalmologie Lariboisière", "LaTIM - CHU de BREST")[i % 2], i % 4, 0)
        for i, name in enumerate(names)
    ]
    header = "Image name,Ophthalmologic department,Retinopathy grade,Risk of macular edema"
    table(top / "Annotation_Base11.csv", header, rows, join=";")


def messidor2(top):
    for i in range(N):
        picture(top / "IMAGES" / f"IM{i:04}.JPG", i, "JPEG")
    rows = [(f"IM{i:04}.jpg", f"{i % 5}.0", 0, 1) for i in range(N)]
    table(top / "messidor_data.csv", "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable", rows)


def idrid(top):
    """Numbers from 1 in both parts, empty columns at the end."""
    grading = top / "B. Disease Grading"
    for letter, part, count in (("a", "Training", 40), ("b", "Testing", 20)):
        for i in range(count):
            picture(
                grading / "1. Original Images" / f"{letter}. {part} Set" / f"IDRiD_{i + 1:03}.jpg",
                ord(letter) * 999 + i,
            )
        rows = [(f"IDRiD_{i + 1:03}", i % 5, 0, "", "") for i in range(count)]
        name = f"{letter}. IDRiD_Disease Grading_{part} Labels.csv"
        table(grading / "2. Groundtruths" / name, "Image name,Retinopathy grade,Risk of macular edema ,,", rows)


def ham10000(top):
    """Pictures in two folders, several of one lesion."""
    for i in range(N):
        picture(top / f"HAM10000_images_part_{1 + i % 2}" / f"ISIC_{i:07}.jpg", i)
    kinds = ("nv", "mel", "bkl")
    rows = [
        (f"HAM_{i // 2:07}", f"ISIC_{i:07}", kinds[i // 2 % 3], "histo", 45.0, "male", "back", "vidir")
        for i in range(N)
    ]
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"
    table(top / "HAM10000_metadata.csv", header, rows)


def classes(top):
    for i in range(N):
        picture(top / ("10 severe", "2 mild")[i % 2] / f"x{i}.jpg", i)


def chest(top):
    """Kaggle's chest X-rays: a folder for each part, the archive's name around it, a Mac's leftovers."""
    for i in range(N):
        part = ("train", "train", "test", "val")[i // 2 % 4]
        picture(top / "chest_xray" / part / ("NORMAL", "PNEUMONIA")[i % 2] / f"person{i}.jpeg", i, "JPEG")
        (top / "chest_xray" / part / ("NORMAL", "PNEUMONIA")[i % 2] / f"._person{i}.jpeg").write_bytes(b"fork")


#: Each layout with its classes, and the hospitals that it names.
LAYOUTS = {
    ours: (("ill", "well"), ("north", "south")),
    odd: (("ill", "well"), ("north", "south")),
    obeyed: (("ill", "well"), ("north", "south")),
    kaggle: (GRADES, ()),
    eyepacs: (GRADES, ()),
    messidor: (("0", "1", "2", "3"), ("LaTIM - CHU de BREST", "Service Ophtalmologie Lariboisière")),
    messidor2: (GRADES, ()),
    idrid: (tuple("01234"), ()),
    ham10000: (("bkl", "mel", "nv"), ("vidir",)),
    classes: (("2 mild", "10 severe"), ()),
    chest: (("NORMAL", "PNEUMONIA"), ()),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_layout_as_it_comes(layout, tmp_path, check_dataset):
    layout(tmp_path)
    data = load(str(tmp_path), size=16)
    check_dataset(data)
    grades, sites = LAYOUTS[layout]
    assert len(data) == N and data.grades == grades and data.sheet.sites == sites
    assert len(np.unique(data.images.reshape(N, -1), axis=0)) == N  # everyone has a picture of its own
    if layout is not idrid:  # a label counts as often as it was written
        assert sorted(Counter(data.labels.tolist()).values()) in ([30, 30], [12] * 5, [15] * 4, [20] * 3)
    if layout in (ours, odd, eyepacs, ham10000, obeyed):
        assert len(set(data.person.tolist())) == N // 2
    if layout in (obeyed, chest):
        pair = np.arange(N) // 2 % 4
        counted = {"train": (pair != 2).sum(), "validation": (pair == 3).sum(), "test": (pair == 2).sum()}
        assert {part: len(getattr(data, part)) for part in counted} == counted
    if layout is idrid:
        assert len(data.train) == 40 and len(data.test) == 20
    public = "made" not in data.sheet.persons and "which makes them public" not in data.sheet.persons
    assert public == (not sites and grades == GRADES)


def test_pictures_that_are_not_read_are_not_left_out_without_a_word(tmp_path, refuses):
    classes(tmp_path / "classes")
    (tmp_path / "classes" / "2 mild" / "Thumbs.db").write_bytes(b"")
    assert len(load(str(tmp_path / "classes"), size=16)) == N
    (tmp_path / "classes" / "2 mild" / "y.TIF").write_bytes(b"II")
    with refuses("'2 mild/y.TIF': not .png, .jpg, .jpeg", "convert"):
        load(str(tmp_path / "classes"), size=16)
    picture = next(path for path in (tmp_path / "classes" / "2 mild").iterdir() if path.suffix.lower() in SUFFIXES)
    (tmp_path / "classes" / "2 mild" / "y.TIF").rename(picture.with_suffix(".tif"))  # was converted, and is kept beside
    assert len(load(str(tmp_path / "classes"), size=16)) == N
    for name in ("eye.ppm", "eye.nii.gz"):
        (tmp_path / "classes" / name).write_bytes(b"")
        with refuses(f"'{name}': not .png, .jpg, .jpeg"):
            load(str(tmp_path / "classes"), size=16)
        (tmp_path / "classes" / name).unlink()
    ours(tmp_path / "ours")
    (tmp_path / "ours" / "pictures" / "mask.tif").write_bytes(b"II")  # its table says what counts
    assert len(load(str(tmp_path / "ours"), size=16)) == N
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "eye.dcm").write_bytes(b"DICM")
    with refuses("no pictures with suffix .png", "convert 'eye.dcm'"):
        load(str(tmp_path / "scans"), size=16)


def test_odd_files_are_the_same_data(tmp_path):
    ours(tmp_path / "one")
    odd(tmp_path / "two")
    one, two = (load(str(tmp_path / name), size=16) for name in ("one", "two"))
    assert np.array_equal(one.images, two.images) and np.array_equal(one.person, two.person)
    assert np.array_equal(one.train, two.train) and one.attributes["age"].tolist() == two.attributes["age"].tolist()


def test_eyepacs_as_kaggle_s_aptos_has_both_eyes_of_a_person(tmp_path, check_dataset):
    """``--data aptos`` on a folder of EyePACS: one person, and the right sheet."""
    eyepacs(tmp_path)
    data = load("aptos", tmp_path, size=16)
    check_dataset(data)
    assert len(set(data.person.tolist())) == N // 2 and "EyePACS" in data.sheet.source
    assert data.sheet.patients is None and "both eyes are one" in data.sheet.persons
    kaggle(tmp_path / "other")
    assert "APTOS" in load("aptos", tmp_path / "other", size=16).sheet.source


def test_a_sheet_beside_the_table_declares(tmp_path):
    ours(tmp_path)
    (tmp_path / "labels.toml").write_text(
        'source = "mine"\npatients = 24\n[classes]\nsound = ["well"]\nsick = ["ill"]\n[sites]\nsouth = 1\nnorth = 2\n'
        "[attributes.age]\nbands = [35]\n"
    )
    data = load(str(tmp_path), size=16)
    assert data.grades == ("sound", "sick") and data.labels[:2].tolist() == [1, 0]
    assert data.sheet.patients == 24 and data.sheet.sites == ("south", "north") and data.sheet.source == "mine"
    assert "public" not in data.sheet.persons and set(data.attributes["age"]) == {"below 35", "35 up"}
    parts = split_hospitals(data, 2, split="site")
    assert [set(data.attributes["site"][own]) for own in parts] == [{"south"}, {"north"}]


def test_a_file_s_name_in_two_folders_is_told_by_its_path(tmp_path, refuses):
    for i in range(N):
        picture(tmp_path / "ab"[i % 2] / f"s{i // 2}.png", i)
    table(tmp_path / "labels.csv", "image,label", [(f"{'ab'[i % 2]}\\s{i // 2}.png", i % 3) for i in range(N)])
    data = load(str(tmp_path), size=16)
    assert len(np.unique(data.images.reshape(N, -1), axis=0)) == N
    table(tmp_path / "labels.csv", "image,label", [("s0", 1), ("s1", 2)])
    with refuses("labels.csv, line 2: image 's0' may be", "give its path"):
        load(str(tmp_path), size=16)


# --- files of arrays -------------------------------------------------------------------------------------------------


def arrays(n=40, side=28, channels=None, classes=3, **more):
    rng, found = np.random.default_rng(0), {}
    for part, count in (("train", n), ("val", n // 4), ("test", n // 2)):
        shape = (count, side, side) if channels is None else (count, side, side, channels)
        found[f"{part}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        found[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
    return found | more


@pytest.mark.parametrize("terms", [{}, {"channels": 3}, {"side": 64}, {"channels": 1, "classes": 2}], ids=str)
def test_any_file_of_medmnist_s_family(terms, tmp_path, check_dataset):
    np.savez(tmp_path / "own.npz", **arrays(**terms))
    data = load(str(tmp_path / "own.npz"))
    check_dataset(data)
    assert (len(data.fit), len(data.validation), len(data.test)) == (40, 10, 20)
    assert data.size == terms.get("side", 28) and len(data.grades) == terms.get("classes", 3)
    assert load(str(tmp_path / "own.npz"), size=32).size == 32


@pytest.mark.parametrize("data", ["own.npz", "retinamnist"])
@pytest.mark.parametrize("model, pixels", [("head", 224), ("squeezenet", 224), ("cnn", None), ("resnet18", None),
                                           ("my_nets:small", None)])  # fmt: skip
def test_a_network_gets_small_images_as_they_are_unless_it_sees_nothing_in_them(data, model, pixels, capsys):
    assert Options(data=data, model=model).image_size == pixels and Options(data=data, model=model, size=32).size == 32
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    assert "own, but 224 for head and squeezenet on retinamnist or a .npz)" in " ".join(capsys.readouterr().out.split())


def test_an_empty_val_is_none(tmp_path, check_dataset, refuses):
    empty = {"val_images": np.zeros((0, 28, 28), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)}
    np.savez(tmp_path / "own.npz", **arrays(**empty))
    data = load(str(tmp_path / "own.npz"))
    check_dataset(data)
    assert len(data) == 60 and len(data.train) == 40
    np.savez(tmp_path / "own.npz", **arrays(**{key.replace("val", "test"): value for key, value in empty.items()}))
    with refuses("test_images is empty, (0, 28, 28); put pictures there"):
        load(str(tmp_path / "own.npz"))


def test_an_image_that_is_in_two_parts_is_a_test_image(tmp_path):
    held = arrays()
    held["test_images"][0] = held["train_images"][5]
    np.savez(tmp_path / "own.npz", **held)
    data = load(str(tmp_path / "own.npz"))
    assert (
        5 in data.test and len(data.test) == 21 and not np.isin(data.person[data.train], data.person[data.test]).any()
    )


def test_the_published_file_in_its_own_name(shared_data, check_dataset):
    mine, theirs = (
        load(name, at) for name, at in ((str(shared_data / "retinamnist.npz"), None), ("retinamnist", shared_data))
    )
    check_dataset(mine)
    assert len(mine) == len(theirs) == 1600 and np.array_equal(mine.labels, theirs.labels)


# --- functions -------------------------------------------------------------------------------------------------------

MODULE = """
from dopamine_lib.data.synthetic import load_synthetic
from dataclasses import replace
import numpy as np

def eyes(size=28):
    return load_synthetic(n=120, size=size)

def shared():
    data = eyes()
    return replace(data, person=np.zeros_like(data.person))

def long():
    data = eyes()
    return replace(data, images=np.ones((120, 3), np.float32), inputs=("a", "b", "c"))

def nothing():
    return None

CHANGES = {
    "list": lambda data: {"labels": data.labels.tolist()},
    "column": lambda data: {"labels": data.labels[:, None]},
    "flat": lambda data: {"images": data.labels},
    "numbers": lambda data: {"person": data.person.astype(float)},
    "indices": lambda data: {"train": data.train.tolist()},
    "mask": lambda data: {"train": np.isin(np.arange(120), data.train)},
    "outside": lambda data: {"test": np.array([9999])},
    "negative": lambda data: {"test": np.array([-1])},
    "twice": lambda data: {"train": np.concatenate([data.train, data.fit[:1]])},
    "groups": lambda data: {"attributes": {"age": ["old"] * 120}},
    "sites": lambda data: {"sheet": replace(data.sheet, sites=("north", "south"))},
    "elsewhere": lambda data: {
        "sheet": replace(data.sheet, sites=("north", "south")),
        "attributes": {"site": np.array(["north", "south", "west"])[np.arange(120) % 3]},
    },
}

def __getattr__(name):
    data = eyes()
    return lambda: replace(data, **CHANGES[name](data))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_eyes.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_eyes", None)


def test_a_function_of_one_s_own(module, refuses, check_dataset):
    check_dataset(load("my_eyes:eyes"))
    assert load("my_eyes:eyes", size=32).size == 32
    for name, said in (
        ("my_eyes:shared", "a person is in two parts"),
        ("my_eyes:long", "a row has norm 1.73"),
        ("my_eyes:nothing", "it gives NoneType"),
        ("my_eyes:list", "labels are not an array (N,)"),
        ("my_eyes:column", "labels are not an array (N,)"),
        ("my_eyes:flat", "images are not an array"),
        ("my_eyes:numbers", "person is not an int64 array"),
        ("my_eyes:indices", "train is not an int64 array"),
        ("my_eyes:mask", "train is not an int64 array"),
        ("my_eyes:outside", "an index in test lies outside 0 to 119"),
        ("my_eyes:negative", "an index in test lies outside 0 to 119"),
        ("my_eyes:twice", "train has an image twice"),
        ("my_eyes:groups", "attribute 'age' is not an array of 120 texts"),
        ("my_eyes:sites", "2 sites, but there is no attribute 'site'"),
        ("my_eyes:elsewhere", "site 'west' is not one of the sheet's sites, 'north', 'south'"),
        ("my_eyes:gone", "KeyError"),
        ("no_such_module:eyes", "ModuleNotFoundError"),
    ):
        with refuses(f"data {name}", said):
            load(name)


def test_nobody_goes_to_a_hospital_that_is_not_theirs(tmp_path, refuses):
    ours(tmp_path)
    data = load(str(tmp_path), size=16)
    data.attributes["site"][data.attributes["site"] == "south"] = "west"
    with refuses("site 'west' is not one of the declared 'north', 'south'"):
        split_hospitals(data, 2, split="site")


def test_a_report_calls_nobody_s_function(module, short, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["--data", "my_eyes:eyes", "--model", "cnn", "--settings", "FSCDP", "--runs", "1", "--hospitals", "3"]
    assert main(["reproduce", *words, "--out", str(out)]) == 0
    monkeypatch.setitem(sys.modules, "my_eyes", None)
    assert main(["report", str(out)]) == 0
    assert "calls nobody's code" in (out / "report.md").read_text()


# --- what is wrong ---------------------------------------------------------------------------------------------------


def rows(top, change):
    """labels.csv with its lines changed."""
    path = top / "labels.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def header(old, new):
    return lambda top: rows(top, lambda lines: [lines[0].replace(old, new), *lines[1:]])


def line(number, text):
    return lambda top: rows(top, lambda lines: [*lines[: number - 1], text, *lines[number:]])


def sheet(text):
    return lambda top: (top / "labels.toml").write_text(text)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda top: shutil.rmtree(top), ["no such file or folder", "module:function"]),
        (lambda top: shutil.rmtree(top / "pictures"), ["no pictures with suffix .png"]),
        (lambda top: (top / "labels.csv").unlink(), ["in no class's folder", "labels.csv"]),
        (lambda top: (top / "labels.csv").write_bytes(b"\xff\xd8"), ["labels.csv: not a UTF-8 CSV"]),
        (lambda top: rows(top, lambda lines: lines[:1]), ["labels.csv: no rows"]),
        (header("label", "x"), ["labels.csv: no column label"]),
        (header("image", "x"), ["labels.csv: no column image"]),
        (line(3, "scan99.png,ill,p1,north,40"), ["line 3: image 'scan99.png': no such picture", "leave out the row"]),
        (line(3, "scan0.png,ill,p0,north,40"), ["line 3: scan0.png is in line 2 as well"]),
        (line(3, "../scan1.png,ill,p0,north,40"), ["line 3: image '../scan1.png' leads out of the folder"]),
        (line(3, "/etc/scan1.png,ill,p0,north,40"), ["line 3: image '/etc/scan1.png' leads out of the folder"]),
        (line(3, "scan1.png,,p0,north,40"), ["line 3: label is missing"]),
        (line(3, "scan1.png"), ["line 3: label is missing"]),
        (line(3, "scan1.png,ill,,north,40"), ["line 3: person is missing"]),
        (line(3, "scan1.png,ill,p0,,40"), ["line 3: site is missing"]),
        (lambda top: rows(top, lambda lines: [one.replace("well", "ill") for one in lines]), ["every label is 'ill'"]),
        (lambda top: (top / "pictures" / "scan4.png").write_bytes(b"\x89PNG"), ["scan4.png: not a PNG or JPEG image"]),
        (lambda top: rows(top, lambda lines: lines[:5]), ["of 2 persons are too few"]),
        (sheet("classes = 3"), ["labels.toml: 'classes' is 3", "must be a table: [classes]"]),
        (sheet('[classes]\na = ["ill"]\nb = ["sound"]'), ["line 3: label 'well' is not declared", "[classes]"]),
        (sheet("[sites]\nnorth = 3"), ["site 'south' is not declared", "[sites]"]),
        (sheet('person = "who"'), ["labels.csv: no column who", "data sheet"]),
        (sheet("[attributes.weight]\nbands = [60]"), ["no column weight"]),
        (sheet("[attributes.age]\nbands = 60"), ["[attributes], age: bands is 60"]),
        (sheet("[attributes]\nage = 3"), ["[attributes], age: 3 must have values"]),
        (header("person", "Patient-Code"), ["column 'Patient-Code' may", 'person = "Patient-Code"', "rename"]),
        (obeyed, None),
    ],
)  # fmt: skip
def test_each_fault_in_one_line(damage, said, tmp_path, refuses):
    top = tmp_path / "own"
    ours(top)
    damage(top)
    if said is None:  # a person in two parts
        rows(top, lambda lines: [lines[0], lines[1].replace("train", "test"), *lines[2:]])
        said = ["line 3: split is train, but another row of the same person is test"]
    with refuses(*said):
        load(f"{top}/", size=16)


PERSON_COLUMNS = "subject_id|PatientID|patientid|patient id|Patient-ID|participant_id|Participant|Subject ID|personID"


@pytest.mark.parametrize("name", PERSON_COLUMNS.split("|"))
def test_a_column_of_persons_is_found(name, tmp_path):
    ours(tmp_path)
    expected = load(str(tmp_path), size=16)
    header("person", name)(tmp_path)
    found = load(str(tmp_path), size=16)
    assert np.array_equal(found.person, expected.person) and np.array_equal(found.train, expected.train)


def test_a_column_that_only_looks_like_persons(tmp_path):
    """It is an attribute where the sheet says so, and where another column has the persons, before lesions."""
    ours(tmp_path)
    expected = load(str(tmp_path), size=16).person
    header(",age", ",patient_age")(tmp_path)
    assert "patient_age" in load(str(tmp_path), size=16).attributes
    header("person", "lesion")(tmp_path)
    sheet('[attributes.age]\ncolumn = "patient_age"\nbands = [35]')(tmp_path)
    assert "below 35" in load(str(tmp_path), size=16).attributes["age"]
    sheet("")(tmp_path)
    header("lesion", "patient_id")(tmp_path)
    header("patient_age", "lesion_id")(tmp_path)
    assert np.array_equal(load(str(tmp_path), size=16).person, expected)


def test_tables_of_parts_agree_about_persons(tmp_path, refuses):
    ours(tmp_path)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "test.csv").write_text("\n".join([lines[0].replace("person", "eye"), *lines[1:20]]))
    (tmp_path / "train.csv").write_text("\n".join([lines[0], *lines[21:]]))
    with refuses("train.csv: persons or sites are in some tables only"):
        load(str(tmp_path), size=16)


def test_two_tables_and_a_table_without_columns(tmp_path, refuses):
    ours(tmp_path)
    (tmp_path / "labels.csv").rename(tmp_path / "one.csv")
    shutil.copy(tmp_path / "one.csv", tmp_path / "two.csv")
    with refuses("several tables of labels", "one.csv", "two.csv", "labels.csv"):
        load(str(tmp_path), size=16)
    (tmp_path / "two.csv").unlink()
    (tmp_path / "one.csv").write_text("a,b\n1,2\n")
    with refuses("one.csv: no columns of images and labels", "'a', 'b'"):
        load(str(tmp_path), size=16)


@pytest.mark.parametrize(
    "held, said",
    [
        ({"test_images": None}, ["test_images", "a file like MedMNIST's has"]),
        ({"train_images": np.zeros((40, 28, 28, 28), np.uint8)}, ["train_images is uint8 (40, 28, 28, 28)", "flat"]),
        ({"train_images": np.zeros((40, 28, 28))}, ["train_images is float64", "uint8"]),
        ({"train_images": np.zeros((40, 14, 14), np.uint8)}, ["images of (14, 14), (28, 28), (28, 28) pixels"]),
        ({"train_labels": np.zeros((40, 14), np.uint8)}, ["train_labels is uint8 (40, 14)", "one label an image"]),
        ({"train_labels": np.full((40, 1), -1)}, ["train_labels, row 0 is -1"]),
        ({"train_labels": np.array([None] * 40)}, ["own.npz: cannot be read"]),
    ],
)
def test_each_fault_of_a_file_of_arrays(held, said, tmp_path, refuses):
    np.savez(tmp_path / "own.npz", **{key: value for key, value in arrays(**held).items() if value is not None})
    with refuses("own.npz", *said):
        load(str(tmp_path / "own.npz"))


def test_other_names_and_files(tmp_path, refuses):
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4")
    (tmp_path / "own.xlsx").write_bytes(b"PK")
    for name, said in (("cut.npz", "cannot be read"), ("own.xlsx", "not read"), ("none.csv", "no such file")):
        with refuses(name, said):
            load(f"{tmp_path}/{name}")
    for name in ("aptoss", ""):
        with refuses(f"data {name!r} is unknown", "a folder"):
            Options(data=name)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch.setitem)
    monkeypatch.setattr(run, "fitting_workers", lambda jobs: 1)


def test_a_folder_from_the_command_line_to_the_report(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours(tmp_path / "mine")
    words = "--data mine --size 32 --model cnn --split site --settings FSCDP --runs 1".split()
    assert main(["reproduce", *words, "--out", "out"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"] == "./mine" and results["options"]["hospitals"] == 2 and results["patients"]["counted"]
    statement = results["settings"]["FSCDP"]["statement"]
    assert "same person in the table" in statement and "which makes them public" in statement
    assert main(["report", "out"]) == 0
    assert "labels.csv" not in (report := (tmp_path / "out" / "report.md").read_text()) and "ill" in report
    shutil.move("mine", "elsewhere")
    assert main(["report", "out", "--data-dir", "elsewhere"]) == 0
    assert (tmp_path / "out" / "report.md").read_text() == report.replace("mine: age", "elsewhere: age").replace(
        "source: mine", "source: elsewhere"
    )


def test_an_attribute_of_many_values_makes_no_groups(tmp_path):
    ours(tmp_path)
    data = load(str(tmp_path), size=16)
    assert set(subgroups(data, np.arange(N), least=2)) >= {"age", "site", "grade"}
    data.attributes["age"] = np.arange(N).astype(str)
    assert "age" not in subgroups(data, np.arange(N), least=2)
