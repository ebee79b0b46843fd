"""Files that a run goes on from are bound by a checksum: what is damaged is refused, and never another ledger."""

import io
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dopamine_lib.federation.run_folder import check_out, read_record, write_record
from dopamine_lib.models import weights
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint
from dopamine_lib.models.weights import read_state

RECORD = {"server_steps": 30, "charged": [30, 29], "epoch": 1, "reserved": 2, "history": [{"accuracy": 0.5}]}


def training(vectors=None, record=None):
    """Something with a state; ``taken`` is what was put back into it."""
    found = SimpleNamespace(taken=None, state=lambda: (vectors, record))
    found.restore = lambda *state: setattr(found, "taken", state)
    return found


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "FSCDP-0.safetensors"
    save_checkpoint(path, training({"w": torch.arange(4.0), "velocity": torch.ones(4)}, RECORD))
    return path


def again(path, change, vectors=lambda kept: None):
    """Write a checkpoint anew with its state and its tensors changed, and its checksum as it was."""
    with safe_open(path, "pt") as file:
        metadata, kept = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    state = json.loads(metadata["state"])
    change(state), vectors(kept)
    save_file(kept, path, metadata | {"state": json.dumps(state)})


def test_a_checkpoint_comes_back(saved):
    load_checkpoint(saved, taker := training())
    assert taker.taken[1] == RECORD and taker.taken[0]["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("change", [{"charged": [0, 0]}, {"reserved": 1}, {"server_steps": 3}, {"history": []}])
def test_another_ledger_is_refused(saved, change, refuses):
    again(saved, lambda state: state.update(change))
    with refuses("damaged", "another --out"):
        load_checkpoint(saved, taker := training())
    assert taker.taken is None


def test_another_model_is_refused(saved, refuses):
    for change in (lambda kept: kept["w"].add_(1), lambda kept: kept.pop("velocity"), lambda kept: kept["w"].neg_()):
        again(saved, lambda state: None, change)
        with refuses("damaged"):
            load_checkpoint(saved, training())


def test_a_checkpoint_of_an_older_version_has_no_checksum(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "old.safetensors", {"state": json.dumps(RECORD)})
    load_checkpoint(tmp_path / "old.safetensors", taker := training())
    assert taker.taken[1] == RECORD


def test_a_record_comes_back_or_is_refused(tmp_path, refuses):
    path = tmp_path / "FSCDP-0.json"
    write_record(path, RECORD)
    assert read_record(path) == RECORD
    text = path.read_text()
    for damaged in (text.replace("30", "31"), text.replace("0.5", "0.6"), text.replace('"sha256"', '"sha257"'), "[1]"):
        path.write_text(damaged)
        with refuses("damaged", "another --out"):
            read_record(path)
    for damaged in (text[:50], "", "[" * 100_000, "\x00"):
        path.write_text(damaged)
        with refuses("damaged"):
            read_record(path)
    path.write_text(json.dumps(RECORD))  # of an older version
    assert read_record(path) == RECORD


@pytest.mark.parametrize("damaged", ["", "[1]", "[" * 100_000, "3", "{"])
def test_damaged_options_are_refused(tmp_path, damaged, refuses):
    (tmp_path / "options.json").write_text(damaged)
    with refuses("cannot be read"):
        check_out(tmp_path, {"runs": 1}, resume=True)


@pytest.mark.parametrize("kind", ["npz", "pth", "safetensors"])
def test_weights_beyond_the_limit_are_not_unpacked(tmp_path, monkeypatch, refuses, kind):
    path, zeros = tmp_path / f"weights.{kind}", np.zeros(2**20, np.float32)
    if kind == "npz":
        np.savez_compressed(path, w=zeros)
        assert path.stat().st_size < 2**14
    elif kind == "pth":
        torch.save({"w": torch.from_numpy(zeros)}, stored := io.BytesIO())
        with zipfile.ZipFile(stored) as flat, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for member in flat.infolist():
                packed.writestr(member.filename, flat.read(member), zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 2**14
    else:
        save_file({"w": torch.from_numpy(zeros)}, path)
    monkeypatch.setattr(weights, "MAX_WEIGHTS", 2**20)
    with refuses("holds 4,", "at most 1,048,576"):
        read_state(path)
