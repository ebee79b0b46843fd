"""How the kit writes files: whole or not at all, and with no more rights than the user grants."""

import os
import stat

import pytest

from dopamine_lib.files import atomic_path, cache_dir, read_key, write_key


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
