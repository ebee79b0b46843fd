"""The split: no patient is lost or doubled, skewed splits are skewed, and a patient's place depends on nobody else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopamine_lib.data.dataset import GRADES, Dataset, Datasheet, split_by_person
from dopamine_lib.data.hospitals import SPLITS as EVERY
from dopamine_lib.data.hospitals import declared_sizes, hospital_shares, split_hospitals

#: Those that deal patients to any number of hospitals; "site" leaves them where they are (test_table.py).
SPLITS = [kind for kind in EVERY if kind != "site"]


def make(n=600, seed=0, cameras=True):
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, n, p=[0.5, 0.1, 0.25, 0.05, 0.1])
    person = np.arange(n)
    person[10:50:2] = person[11:51:2]  # twenty people with two identical images each
    train, validation, test = split_by_person(person, test_fraction=0.2, seed=seed)
    images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    images[: n // 2] //= 4  # half of the images have little contrast
    attributes = {"camera": rng.choice(list("ABC"), n, p=[0.6, 0.3, 0.1])} if cameras else {}
    known = {"grade": dict(zip(GRADES, [0.5, 0.1, 0.25, 0.05, 0.1], strict=True))}
    known |= {"camera": {"A": 0.6, "B": 0.3, "C": 0.1}} if cameras else {}
    sheet = Datasheet("", "", "", patients=round(0.8 * n), proportions=known)
    return Dataset("test", images, labels, GRADES, person, train, validation, test, sheet, attributes)


DATASET = make()


@settings(deadline=None)
@given(kind=st.sampled_from(SPLITS), hospitals=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_every_patient_is_in_exactly_one_hospital(kind, hospitals, seed):
    parts = split_hospitals(DATASET, hospitals, split=kind, seed=seed)
    assert len(parts) == hospitals
    assert np.array_equal(np.sort(np.concatenate(parts)), DATASET.train)
    people = [set(DATASET.person[part]) for part in parts]
    assert sum(map(len, people)) == len(set().union(*people))
    assert not np.isin(np.concatenate(parts), DATASET.test).any()


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(SPLITS),
    cameras=st.booleans(),
    hospitals=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    gone=st.sets(st.integers(0, 599), min_size=1, max_size=9),
)
def test_a_patients_place_depends_on_that_patient_alone(kind, cameras, hospitals, seed, gone):
    """Whoever leaves or is replaced, all others stay in their part and in their hospital."""
    dataset = make(seed=seed % 3, cameras=cameras)
    gone = np.flatnonzero(np.isin(dataset.person, dataset.person[sorted(gone)]))  # with all their images
    kept = np.setdiff1d(np.arange(len(dataset)), gone)

    def places(dataset, rows):
        train, validation, test = split_by_person(dataset.person, test_fraction=0.2, seed=seed)
        dataset = replace(dataset, train=train, validation=validation, test=test)
        found = np.full((2, len(dataset)), -1)
        found[0, validation], found[0, test] = 1, 2
        for number, own in enumerate(split_hospitals(dataset, hospitals, split=kind, seed=seed)):
            found[1, own] = number
        return found[:, rows]

    fewer = dataset.rows(kept)
    assert np.array_equal(places(fewer, np.arange(len(kept))), places(dataset, kept))
    other = replace(dataset, labels=dataset.labels.copy(), images=dataset.images.copy(), person=dataset.person.copy())
    other.labels[gone], other.images[gone], other.person[gone] = 4 - other.labels[gone], 9, other.person[gone] + 10**9
    assert np.array_equal(places(other, kept), places(dataset, kept))


def test_sizes_are_as_declared_up_to_chance():
    """A hospital's patients and their public share: at most 6 standard deviations apart (1e-6 for 4000 hospitals)."""
    for kind in SPLITS:
        for seed in range(100):
            sizes = np.array([len(part) for part in split_hospitals(DATASET, 10, split=kind, seed=seed)])
            due = hospital_shares(DATASET, 10, split=kind, seed=seed) * len(DATASET.train)
            # pairs of images move together, and grades are not in their published proportions exactly
            assert (np.abs(sizes - due) < 6 * np.sqrt(2 * due) + 0.1 * due + 6).all(), (kind, seed)
            declared = declared_sizes(480, due / due.sum())
            assert sum(declared) == 480 and min(declared) >= 1


def test_the_paper_s_split_holds_up_to_chance():
    """2931 and 731 of 3,662 images, and every grade's share: within 5.5 standard deviations (4e-8), 20 seeds."""
    labels = np.repeat(np.arange(5), [1805, 370, 999, 193, 295])
    person = np.arange(3662)
    pairs = np.random.default_rng(0).permutation(3662)[:246].reshape(123, 2)
    person[pairs[:, 1]] = person[pairs[:, 0]]
    for seed in range(20):
        train, validation, test = split_by_person(person, test_fraction=731 / 3662, seed=seed)
        assert len(train) + len(test) == 3662 and abs(len(test) - 731) < 5.5 * 26
        assert abs(len(validation) - 0.1 * len(train)) < 5.5 * 18
        for grade, n in enumerate(np.bincount(labels)):
            assert abs((labels[test] == grade).sum() - n * 731 / 3662) < 5.5 * np.sqrt(1.1 * n * 0.16)


def mixture_distance(parts, values):
    """Mean total-variation distance between the hospitals' mixtures of ``values`` and that of all patients."""
    kinds = np.unique(values)
    overall = np.array([np.mean(values[DATASET.train] == kind) for kind in kinds])
    own = [np.array([np.mean(values[part] == kind) for kind in kinds]) for part in parts]
    return np.mean([np.abs(mixture - overall).sum() / 2 for mixture in own])


@pytest.mark.parametrize("kind, values", [("skewed", DATASET.labels), ("quality", DATASET.attributes["camera"])])
def test_a_skewed_split_is_skewed_in_its_attribute(kind, values):
    skewed = np.mean([mixture_distance(split_hospitals(DATASET, 5, split=kind, seed=s), values) for s in range(10)])
    equal = np.mean([mixture_distance(split_hospitals(DATASET, 5, seed=s), values) for s in range(10)])
    assert skewed > 3 * equal


def test_quality_without_known_cameras_goes_by_sharpness():
    dataset = make(cameras=False)
    parts = split_hospitals(dataset, 5, split="quality", seed=1)
    assert np.array_equal(np.sort(np.concatenate(parts)), dataset.train)
    contrast = [np.std(dataset.images[part], axis=(1, 2, 3)).mean() for part in parts]
    assert max(contrast) > 1.3 * min(contrast)
    assert np.allclose(hospital_shares(dataset, 5, split="quality", seed=1), 0.2)  # nothing is published of sharpness


def test_the_same_seed_gives_the_same_split():
    one, other, third = (split_hospitals(DATASET, 7, split="skewed", seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, third, strict=True))


@pytest.mark.parametrize("hospitals", [0, -1, 5000])
def test_a_wrong_number_of_hospitals_is_refused(refuses, hospitals):
    with refuses(f"{hospitals} hospitals", "choose 1 to"):
        split_hospitals(DATASET, hospitals)


def test_declared_numbers_alone_decide_how_many_hospitals_there_may_be(refuses):
    """Where nothing is published, one patient fewer than hospitals was refused: that told how many there are."""
    undeclared = replace(DATASET, sheet=replace(DATASET.sheet, patients=None))
    assert len(split_hospitals(undeclared, 5000)) == 5000
    with refuses("5000 hospitals for 480 declared patients"):
        declared_sizes(480, hospital_shares(undeclared, 5000))


def test_an_unknown_split_is_refused(refuses):
    with refuses("split 'fair'", "iid"):
        split_hospitals(DATASET, 3, split="fair")
