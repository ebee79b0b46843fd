"""What the kit made once and finds again: believed only if it is whole, of the right shape, finite and this user's."""

import gzip
import os

import numpy as np
import pytest
import torch
from torchvision import datasets

from dopamine_lib.data import cache
from dopamine_lib.data.benchmarks import _unpack
from dopamine_lib.data.cache import cache_dir, read_array, write_array
from dopamine_lib.models.features import extract_features
from dopamine_lib.models.weights import load_weights

SHAPE = (30, 7)
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype("<f4")


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "array.npy"
    assert (write_array(path, SHAPE, "<f4", [VALUES[:11], VALUES[11:]]) == VALUES).all()
    return path


def test_an_array_comes_back_without_a_word_and_is_ordinary_npy(written, tmp_path, caplog):
    found = read_array(written, SHAPE, "<f4")
    assert (found == VALUES).all() and not found.flags.writeable and (np.load(written) == VALUES).all()
    assert read_array(tmp_path / "nowhere.npy", SHAPE, "<f4") is None and not caplog.records


@pytest.mark.parametrize("at", [0, 9, 40, 130, 500, -5, -1])
def test_a_changed_byte_anywhere_is_found_and_said(written, at, caplog):
    content = bytearray(written.read_bytes())
    content[at] ^= 4
    written.write_bytes(content)
    assert read_array(written, SHAPE, "<f4") is None
    assert str(written) in caplog.text and "damaged" in caplog.text and "made anew" in caplog.text


@pytest.mark.parametrize("shape, dtype", [((29, 7), "<f4"), ((7, 30), "<f4"), ((30, 7, 1), "<f4"), (SHAPE, "<i4")])
def test_another_shape_or_type_is_not_believed(written, shape, dtype, caplog):
    assert read_array(written, shape, dtype) is None and "made anew" in caplog.text


def test_an_array_of_an_older_version_is_made_anew_without_a_word(written, caplog):
    np.save(written, VALUES)
    assert read_array(written, SHAPE, "<f4") is None and not caplog.records


@pytest.mark.parametrize("kept", [0, 5, 128, 400, -5, -1])
def test_a_torn_file_is_not_believed(written, kept, caplog):
    written.write_bytes(written.read_bytes()[:kept])
    assert read_array(written, SHAPE, "<f4") is None and "made anew" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_not_believed(tmp_path, value, caplog):
    values = VALUES.copy()
    values[3, 3] = value
    write_array(tmp_path / "array.npy", SHAPE, "<f4", [values])
    assert read_array(tmp_path / "array.npy", SHAPE, "<f4") is None and "not finite" in caplog.text


def test_another_users_file_is_not_believed_but_root_s_is(written, monkeypatch, caplog):
    owner = written.stat().st_uid
    monkeypatch.setattr(cache.os, "geteuid", lambda: owner + 1000)
    assert (read_array(written, SHAPE, "<f4") is None) == (owner != 0)
    if owner == 0:
        os.chown(written, 4321, -1)
        assert read_array(written, SHAPE, "<f4") is None
    assert "belongs to user" in caplog.text and "DOPAMINE_CACHE" in caplog.text


def test_features_are_computed_again_where_the_cache_is_not_to_be_believed(tmp_path, monkeypatch, caplog):
    """Three rows for four images, norms of 1000 and NaN were all taken without a word."""
    monkeypatch.setenv("DOPAMINE_CACHE", str(tmp_path))
    images, weights = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8), load_weights("random")
    right = extract_features(weights, images, progress=False)
    (path,) = cache_dir().glob("features-*.npy")
    whole, wrong = path.read_bytes(), np.where(np.eye(4, 512) > 0, np.nan, right.numpy() * 1000).astype("<f4")
    foreign = {"rows": right.numpy()[:3], "values": wrong}
    for change in ("torn", "empty", "rows", "values", "a bit"):
        caplog.clear()
        if change in foreign:
            np.save(path, foreign[change])
        else:
            path.write_bytes({"torn": whole[:-100], "empty": b"", "a bit": whole[:1000] + b"\0" + whole[1001:]}[change])
        assert torch.equal(extract_features(weights, images, progress=False), right)
        assert ("made anew" in caplog.text) == (change != "values")  # which is an older version's file, too
        assert path.read_bytes() == whole
    caplog.clear()
    assert torch.equal(extract_features(weights, images, progress=False), right) and not caplog.records


def test_an_unpacked_file_that_was_damaged_is_unpacked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DOPAMINE_CACHE", str(tmp_path / "cache"))
    packed = [tmp_path / "a-idx3-ubyte.gz"]
    packed[0].write_bytes(gzip.compress(b"pixels" * 100))
    target = _unpack("mnist", datasets.MNIST, packed) / "MNIST" / "raw" / "a-idx3-ubyte"
    for damaged in (b"pixelz" * 100, b"", b"pixels" * 99):
        target.write_bytes(damaged)
        _unpack("mnist", datasets.MNIST, packed)
        assert target.read_bytes() == b"pixels" * 100
