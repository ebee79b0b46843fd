"""How the kit writes files: whole or not at all, and with no more rights than the user grants."""

import ast
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dopamine_lib.data import cache
from dopamine_lib.data.cache import cache_dir, cached
from dopamine_lib.data.synthetic import load_synthetic
from dopamine_lib.files import atomic_path, read_key, write_key
from dopamine_lib.machine import place_for

#: A file system of 1 MB under a folder, then a Python program with it as the cache.
SMALL_DISK = 'mount -t tmpfs -o size=1m tmpfs "$DOPAMINE_CACHE" && exec "$@"'


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
def test_the_users_umask_is_kept_and_the_cache_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DOPAMINE_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o022)
    try:
        for mask, granted in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(mask)
            with atomic_path(tmp_path / "file") as temporary:
                temporary.write_text("x")
            assert rights(tmp_path / "file") == granted
            assert os.umask(mask) == mask  # looking at it has not changed it
        os.umask(0o022)
        assert rights(cache_dir()) == 0o700
    finally:
        os.umask(before)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_place_where_no_file_can_be_is_refused_before_the_work(tmp_path, refuses):
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path, tmp_path / "file" / "one"):
        with refuses(f"--out {place} cannot be written", "name another file"), place_for(place, "--out"):
            pytest.fail("the work has begun")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files by /proc")
@pytest.mark.parametrize("write", ["atomic", "key"])
def test_a_file_and_its_name_are_on_disk_when_it_is_written(write, tmp_path, monkeypatch):
    """After the file's own content, its folder is synced, and so is the folder of every folder that was made."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    path = tmp_path / "new" / "runs" / "file"
    if write == "atomic":
        with atomic_path(path) as temporary:
            temporary.write_text("x")
        written = [str(temporary), "replace"]
    else:
        write_key(path, b"x")
        written = [str(path)]
    assert set(done[:2]) == {str(tmp_path), str(tmp_path / "new")}
    assert done[2:] == [*written, str(path.parent)]


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
def test_a_key_is_for_its_owner_only_and_never_replaced(tmp_path):
    path = tmp_path / "keys" / "one.key"
    before = os.umask(0)
    try:
        write_key(path, b"secret")
    finally:
        os.umask(before)
    assert rights(path) == 0o600 and read_key(path) == b"secret"
    with pytest.raises(FileExistsError):
        write_key(path, b"another")
    assert read_key(path) == b"secret" and list(path.parent.iterdir()) == [path]
    for mode in (0o640, 0o604, 0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(PermissionError, match="read by others than its owner"):
            read_key(path)


# --- other people's disks ---------------------------------------------------------------------------------


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("variable, value", [("DOPAMINE_CACHE", "a file"), ("XDG_CACHE_HOME", "a file"), ("", "")])
def test_without_a_place_for_the_cache_one_line_names_the_variable(tmp_path, monkeypatch, refuses, variable, value):
    """Where a file has its name, where one has its parent's, and for a user without a home."""
    (tmp_path / "a file").write_text("")
    for name in ("DOPAMINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / value))
    monkeypatch.setattr(Path, "home", no_home)
    with refuses("cache", "DOPAMINE_CACHE"):
        cache_dir()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_under_the_cache_is_said_in_one_line_and_leaves_nothing(tmp_path, refuses, number):
    with refuses(os.strerror(number), str(tmp_path), "DOPAMINE_CACHE"), cached(tmp_path / "features.npy") as temporary:
        temporary.write_text("half of th")
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_the_cache_is_written_to_and_never_mapped_for_writing(monkeypatch):
    """A page of a map that finds no room on the disk ends the process without a word."""

    def map_file(path, mode="r+", **shape):
        assert mode == "r"
        return np.memmap(path, mode=mode)

    class Mapped(np.memmap):
        def __new__(cls, path, dtype, mode, *where):
            assert mode == "r"
            return super().__new__(cls, path, dtype, mode, *where)

    monkeypatch.setattr(cache.np, "memmap", Mapped)
    monkeypatch.setattr(np.lib.format, "open_memmap", map_file)
    with pytest.raises(AssertionError):
        np.lib.format.open_memmap("file", mode="w+", dtype=np.uint8, shape=(1,))
    load_synthetic(n=41, size=28)


def test_a_disk_that_is_really_full(tmp_path):
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    environment = os.environ | {"DOPAMINE_CACHE": str(tmp_path)}
    try:
        subprocess.run([*alone, SMALL_DISK, "sh", "true"], env=environment, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs unshare, and the right to mount in a name space of one's own")
    code = (
        "import os; from dopamine_lib.data.synthetic import load_synthetic\n"
        "try: load_synthetic(n=600, size=28)\n"
        "except ValueError as error: print(error, os.listdir(os.environ['DOPAMINE_CACHE']))"
    )
    command = [*alone, SMALL_DISK, "sh", sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "No space left" in ended.stdout and "DOPAMINE_CACHE" in ended.stdout and ended.stdout.endswith(" []\n")


def test_what_a_killed_process_was_writing_goes_after_a_day(tmp_path):
    torn, fresh = tmp_path / ".dopamine-old.npy", tmp_path / ".dopamine-another's.npy"
    torn.write_text("half"), fresh.write_text("half")
    os.utime(torn, (0, 0))
    with cached(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, "file"]


def test_a_drive_that_knows_no_rights_is_written_all_the_same(tmp_path, monkeypatch):
    def refused(*arguments, **more):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refused)
    with atomic_path(tmp_path / "results.json") as temporary:
        temporary.write_text("{}")
    assert (tmp_path / "results.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_every_text_file_is_utf_8_whatever_the_machine_prefers():
    """Windows and the POSIX locale would read and write others; only calls that name no encoding are found here."""
    root, unnamed = Path(__file__).parents[1], []
    for path in [*root.glob("dopamine_lib/**/*.py"), root / "data_download.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            plain = isinstance(node.func, ast.Name) and node.func.id == "open"
            binary = any("b" in ast.unparse(mode) for mode in node.args[1:2])
            if method in ("read_text", "write_text") or (plain and not binary):
                unnamed.append(f"{path.name}:{node.lineno}")
    assert unnamed == []
