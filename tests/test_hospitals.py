"""The split into hospitals: no patient is lost or doubled, and skewed splits are skewed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopamine_lib.data.dataset import GRADES, Dataset, Datasheet, split_by_person
from dopamine_lib.data.hospitals import SPLITS, split_hospitals


def make(n=600, seed=0, cameras=True):
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, n, p=[0.5, 0.1, 0.25, 0.05, 0.1])
    person = np.arange(n)
    person[10:50:2] = person[11:51:2]  # twenty people with two identical images each
    train, validation, test = split_by_person(labels, person, test_fraction=0.2, seed=seed)
    images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    images[: n // 2] //= 4  # half of the images have little contrast
    attributes = {"camera": rng.choice(list("ABC"), n, p=[0.6, 0.3, 0.1])} if cameras else {}
    return Dataset("test", images, labels, GRADES, person, train, validation, test, Datasheet("", "", ""), attributes)


DATASET = make()


@given(kind=st.sampled_from(SPLITS), hospitals=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_every_patient_is_in_exactly_one_hospital(kind, hospitals, seed):
    parts = split_hospitals(DATASET, hospitals, split=kind, seed=seed)
    assert len(parts) == hospitals and min(map(len, parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), DATASET.train)
    people = [set(DATASET.person[part]) for part in parts]
    assert sum(map(len, people)) == len(set().union(*people))
    assert not np.isin(np.concatenate(parts), DATASET.test).any()


@given(hospitals=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_equal_hospitals_differ_by_one_patient_at_most(hospitals, seed):
    sizes = [len(part) for part in split_hospitals(DATASET, hospitals, seed=seed)]
    assert max(sizes) - min(sizes) <= 1


def test_unequal_hospitals_follow_their_shares():
    sizes = np.array([len(part) for part in split_hospitals(DATASET, 5, split="unequal")])
    shares = 1 / np.arange(1, 6)
    assert np.abs(sizes - shares / shares.sum() * sizes.sum()).max() <= 2


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


def test_the_same_seed_gives_the_same_split():
    one, other, third = (split_hospitals(DATASET, 7, split="skewed", seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, third, strict=True))


@pytest.mark.parametrize("hospitals", [0, -1, 5000])
def test_a_wrong_number_of_hospitals_is_refused(refuses, hospitals):
    with refuses(f"{hospitals} hospitals", "choose 1 to"):
        split_hospitals(DATASET, hospitals)


def test_an_unknown_split_is_refused(refuses):
    with refuses("split 'fair'", "iid"):
        split_hospitals(DATASET, 3, split="fair")
