"""A function of the user's own may raise anything: one line says what, and where in the user's file."""

import pytest

from dopamine_lib.__main__ import main
from dopamine_lib.data.function import call_function
from dopamine_lib.errors import InputError


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_raising.py").write_text(
        "def raises(*_, **__):\n    return 1 / 0\n\ndef takes(one, *, size=3):\n    return one, size\n\nnumber = 3\n"
    )
    return tmp_path


@pytest.mark.parametrize("option", ["--data", "--model"])
def test_what_it_raises_is_one_line_with_its_place(option, mine, capsys):
    words = ["reproduce", option, "mine_raising:raises", "--size", "28", "--out", str(mine / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err
    *before, error = said.splitlines()  # a network is made once the data are read, and that is said
    assert "ZeroDivisionError: division by zero (mine_raising.py, line 2)" in error
    assert [line[:9] for line in before] == ["synthetic"] * (option == "--model")
    assert not (mine / "out").exists()


def test_it_is_given_what_it_takes(mine):
    assert call_function("mine_raising:takes", "model", 5, size=8, channels=3) == (5, 8)


@pytest.mark.parametrize("name", ["mine_raising:none", "no_module_here:x", "mine_raising:number"])
def test_what_is_no_function_is_refused(name, mine):
    with pytest.raises(InputError, match=f"model {name}: .*put it right"):
        call_function(name, "model", 5)
