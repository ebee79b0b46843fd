"""Malicious archives, and the commands that fetch a whole folder: Kaggle's and torchvision's."""

import os
import socket
import stat
import zipfile

import pytest

import data_download
from dopamine_lib.data.transfer import new_folder, unpack_zip
from dopamine_lib.errors import InputError

GOOD = {"train.csv": b"id_code,diagnosis\n", "train_images/a.png": b"picture", "test_images/b.png": b"unused"}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(capsys, *arguments):
    """Exit status and standard error."""
    status = data_download.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def unpack(archive, target, max_bytes=10_000, max_files=10):
    unpack_zip(archive, target, prefix="train", max_bytes=max_bytes, max_files=max_files)


def test_only_wanted_members_are_unpacked(tmp_path):
    unpack(make_zip(tmp_path / "a.zip", GOOD), tmp_path / "aptos")
    assert names(tmp_path) == ["a.zip", "aptos"] and names(tmp_path / "aptos") == [
        "train.csv",
        "train_images",
    ]
    assert (tmp_path / "aptos" / "train_images" / "a.png").read_bytes() == b"picture"
    with pytest.raises(InputError, match="already there; move it away"):
        unpack(tmp_path / "a.zip", tmp_path / "aptos")


def _link():
    link = zipfile.ZipInfo("train_images/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return link


@pytest.mark.parametrize(
    "members, said",
    [
        (GOOD | {"../evil": b"x"}, "unsafe member '../evil'"),
        (GOOD | {"train_images/../../evil": b"x"}, "unsafe member"),
        (GOOD | {"/evil": b"x"}, "unsafe member '/evil'"),
        (GOOD | {"C:evil": b"x"}, "unsafe member 'C:evil'"),
        (GOOD | {"..\\evil": b"x"}, "unsafe member"),
        (GOOD | {_link(): b"/etc/hosts"}, "unsafe member 'train_images/link'"),
        (GOOD | {"train_images/big": bytes(20_000)}, "bytes unpacked, but the limit is 10000"),
        (GOOD | {f"train_images/{i}": b"" for i in range(8)}, "11 files, but at most 10"),
        ({"other.csv": b""}, r"no train\* files in it"),
    ],
)
def test_malicious_archives(members, said, tmp_path):
    archive = make_zip(tmp_path / "a.zip", members)
    with pytest.raises(InputError, match=said):
        unpack(archive, tmp_path / "in" / "aptos")
    assert names(tmp_path) == ["a.zip", "in"] and names(tmp_path / "in") == []


def test_damaged_archives(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"train.csv": os.urandom(1000)})
    whole = archive.read_bytes()
    spoiled = whole[:500] + bytes([whole[500] ^ 255]) + whole[501:]
    # the directory at the end says 100 bytes instead of 1,000
    lying = whole.replace((1000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    for content in (whole[:600], spoiled, lying, b""):
        archive.write_bytes(content)
        with pytest.raises(InputError, match="damaged or encrypted"):
            unpack(archive, tmp_path / "aptos")
        assert names(tmp_path) == ["a.zip"]


def test_two_members_of_the_same_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("train.csv", b"1")
        archive.writestr("train.csv", b"2")
    with pytest.raises(InputError, match="two files of the same name"):
        unpack(tmp_path / "a.zip", tmp_path / "aptos")


def test_new_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with new_folder(tmp_path / "new") as folder:
        (folder / "whole").touch()
    assert names(tmp_path / "new") == ["whole"]


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """An empty home and a PATH of one folder; returns a function that installs a ``kaggle`` there."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def install(script):
        tool = tmp_path / "bin" / "kaggle"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)

    return install


def test_aptos_says_what_to_do(kaggle, tmp_path, monkeypatch, capfd):
    out = tmp_path / "data"
    status, said = run(capfd, "aptos", "--out", out)
    assert status == 2 and "the kaggle command is not installed" in said and "pip install kaggle" in said
    assert "/rules" in said and str(out / f"{data_download.COMPETITION}.zip") in said
    kaggle("echo 403 - Forbidden; exit 1")
    status, said = run(capfd, "aptos", "--out", out)
    assert status == 2 and "no Kaggle credentials found" in said and "kaggle.json" in said
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "s3cret")
    status = data_download.main(["aptos", "--out", str(out)])
    said = "".join(capfd.readouterr())
    assert status == 2 and "status 1" in said and "403: rules" in said and "s3cret" not in said
    assert names(out) == []


def test_aptos_by_the_users_kaggle(kaggle, tmp_path, capfd):
    archive = make_zip(tmp_path / "made.zip", GOOD)
    (tmp_path / "home" / ".kaggle").mkdir()
    (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text("{}")
    # called as: kaggle competitions download -c COMPETITION -p FOLDER
    kaggle(f'/bin/cp "{archive}" "$6/$4.zip"')
    out = tmp_path / "data"
    assert run(capfd, "aptos", "--out", out)[0] == 0
    assert names(out / "aptos") == ["train.csv", "train_images"]
    kaggle("exit 1")
    assert run(capfd, "aptos", "--out", out)[0] == 0  # existing files are not fetched again


def test_aptos_from_a_zip_downloaded_by_hand(kaggle, tmp_path, capfd):
    make_zip(tmp_path / f"{data_download.COMPETITION}.zip", GOOD)
    assert run(capfd, "aptos", "--out", tmp_path)[0] == 0
    assert names(tmp_path / "aptos") == ["train.csv", "train_images"]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_torchvision_offline(name, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    status, said = run(capsys, name, "--out", tmp_path)
    assert status == 2 and said.startswith(f"data_download: {name} could not be downloaded")
    assert said.count("\n") == 1 and names(tmp_path) == []
    assert socket.getdefaulttimeout() is None


def test_torchvision_whole(tmp_path, monkeypatch, capsys):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "MNIST", lambda root, download: (root / "MNIST").mkdir())
    assert run(capsys, "mnist", "--out", tmp_path)[0] == 0
    assert names(tmp_path / "mnist") == ["MNIST"]
    status, said = run(capsys, "mnist", "--out", tmp_path)
    assert status == 2 and "already there; move it away" in said
