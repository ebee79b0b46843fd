"""Other people's terminals: in ASCII, without one of the three streams, and Python without docstrings."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dopamine_lib.__main__ import main
from dopamine_lib.machine import safe_output

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "reproduce tune epsilon pretrain infer party app report compare bench course homework gallery site slides".split()
)


def run(*words, python=(), **environment):
    command = [sys.executable, *python, *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


@pytest.mark.parametrize(
    "encoding, said", [("ascii", b"77.1 +- 0.2, caf?..."), ("utf-8", "77.1 ± 0.2, café…".encode())]
)
def test_a_finished_runs_table_is_printed_in_any_encoding(monkeypatch, encoding, said):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    safe_output()
    print("77.1 ± 0.2, café…", end="", flush=True)
    assert written.getvalue() == said


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["ascii", "POSIX"],
)
def test_commands_speak_to_an_ascii_terminal(environment):
    """The help of reproduce has an ellipsis in it."""
    ended = run("-m", "dopamine_lib", "reproduce", "--help", COLUMNS="40", **environment)
    assert ended.returncode == 0 and "C,CDP,..." in ended.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk_is_said_in_one_line(unbuffered):
    command = [sys.executable, "-m", "dopamine_lib", "epsilon", "--noise-multiplier", "2", "--sample-rate", "0.01"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run(
            [*command, "--steps", "10", "--delta", "1e-5"], cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full, stderr=subprocess.PIPE, text=True, encoding="utf-8", check=False,
        )  # fmt: skip
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert os.strerror(errno.ENOSPC) in ended.stderr and "make room" in ended.stderr


@pytest.mark.parametrize("raised", [OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "h.ipynb"), SafetensorError])
def test_a_full_disk_under_results_is_said_in_one_line(monkeypatch, capsys, raised):
    """The library that writes models has an exception of its own for it, made from one that is caught."""

    def fill(*_, **terms):
        raise raised if isinstance(raised, OSError) else raised(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    monkeypatch.setattr("dopamine_lib.reproduction.run.reproduce", fill)
    monkeypatch.setattr("dopamine_lib.__main__._drop_output", lambda: None)
    assert main(["reproduce", "--out", "results"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dopamine: ") and said.count("\n") == 1 and "--resume" in said


@pytest.mark.parametrize(
    "program", [["-m", "dopamine_lib"], ["-m", "dopamine_lib.federation.mpi"], ["data_download.py"]]
)
def test_help_needs_no_docstrings(program):
    ended = run(*program, "--help", python=["-OO"])
    assert ended.returncode == 0 and ended.stderr == "" and "usage" in ended.stdout


def test_no_commands_parser_needs_docstrings():
    code = "from dopamine_lib.__main__ import parser; assert False; print(*parser()._actions[-1].choices)"
    ended = run("-c", code, python=["-OO"])
    assert ended.stdout.split() == COMMANDS, ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the shell is POSIX's")
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_program_without_streams_keeps_what_is_printed_out_of_its_files(tmp_path, closed):
    """As services start it; the next file would else be the standard error of every library and of the workers."""
    code = (
        "import os, sys, subprocess; from dopamine_lib.machine import safe_output; safe_output()\n"
        "file = open(sys.argv[1], 'w'); print('out'); print('err', file=sys.stderr)\n"
        "os.write(1, b'C'), os.write(2, b'C')\n"
        "subprocess.run([sys.executable, '-c', 'print(1)'], stdout=2, check=True); file.write('result')"
    )
    path = tmp_path / "file"
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, str(path)]
    subprocess.run(shell, cwd=ROOT, check=True, capture_output=True)
    assert path.read_text() == "result"
