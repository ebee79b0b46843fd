"""How the kit writes files: whole or not at all, and with no more rights than the user grants."""

import os
import stat

import pytest

from dopamine_lib.files import atomic_path, cache_dir


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
