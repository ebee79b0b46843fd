"""Every command that the README, its pages, CONTRIBUTING and the chapters tell a reader to type is run or parsed.

The heavy ones run elsewhere: the install and test commands and ``reproduce`` in .ci/run,
which takes them out of the README; ``homework`` and nbgrader's grading by test_homework.py; ``gallery``, ``site``,
``app``, ``report``, ``infer``, ``party`` and the MPI commands by the tests of these parts. Here all of them are held to
the parsers, each alternative of a synopsis on its own.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from io import StringIO

import pytest
from packaging.requirements import Requirement
from pins import REQUIREMENTS, read_requirements
from readme import (
    CHANGELOG,
    CONTRIBUTING,
    INTERFACES,
    NOTEBOOKS,
    PAGES,
    PROGRAMS,
    README,
    REPOSITORY,
    SECURITY,
    SHELL,
    commands,
    shell_lines,
    split_words,
    words_of,
)

from dopamine_lib import __main__ as command_line
from dopamine_lib.errors import InputError
from dopamine_lib.federation.arguments import chosen_options
from dopamine_lib.federation.flower.config import hospital_words
from dopamine_lib.federation.flower.config import words as run_words
from dopamine_lib.federation.settings import SETTINGS
from dopamine_lib.federation.wires.identities import make_identity

#: What stands for a word in capitals.
MEANT = {"D": "1e-4", "E": "2", "K": "10", "M": "5", "N": "1", "P": "0.1", "Q": "0.03", "S": "1.15", "T": "3001"}
MEANT |= {"PIXELS": "64", "PORT": "7100", "HOST:PORT": "127.0.0.1:7100"}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Cheap enough to be run here, as they stand.
RUN = ("epsilon", "--version", "--help")
TEXTS = [README, CONTRIBUTING, INTERFACES, CHANGELOG, SECURITY, *PAGES, *NOTEBOOKS]
#: Each command and where it stands first.
TOLD = list({tuple(words): path for path in reversed(TEXTS) for words in commands(words_of(path))}.items())


def alternatives(words) -> list[list[str]]:
    """A synopsis as commands: without what is optional, then with each optional part, then each ``this|that``."""
    text = " ".join(words)
    optional, bare = re.findall(r"\[([^\]]*)\]", text), re.sub(r"\[[^\]]*\]", "", text)
    found = []
    for part in ["", *optional]:
        if part and not part.startswith("-"):  # an optional word, such as [FILE]
            part = part.strip(".")
        line = f"{bare} {part}".split()
        choices = {at: word.split("|") for at, word in enumerate(line) if "|" in word}
        first = [choices[at][0] if at in choices else word for at, word in enumerate(line)]
        found.append(first)
        found += [first[:at] + [other] + first[at + 1 :] for at, others in choices.items() for other in others[1:]]
    return [[meant(word) for word in line] for line in found]


def meant(word: str) -> str:
    return MEANT.get(word, "x" if re.fullmatch(r"[A-Z]{2,}", word) and word not in SETTINGS else word)


def read_by(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace | None:
    """The arguments as parsed; None where the words end in ``...``: then the command must at least have a help."""
    try:
        if words[-1:] == ["..."]:
            with redirect_stdout(StringIO()):
                parser.parse_args([*words[:-1], "--help"])
        return parser.parse_args(words)
    except SystemExit as ended:
        assert words[-1:] == ["..."] and ended.code == 0, f"its parser refuses: {' '.join(words)}"
        return None


def check_kit(words: list[str], capsys) -> None:
    """``python -m dopamine_lib``: parsed; training options are looked up too; run where cheap."""
    for line in alternatives(words):
        arguments = read_by(command_line.parser(), line) if line[0] not in ("--version", "--help") else None
        if getattr(arguments, "command", None) in ("reproduce", "tune"):
            try:
                chosen_options(arguments)
            except InputError as error:
                assert "unknown" not in str(error), error
        if line[0] in RUN and "[" not in " ".join(words):
            ran = subprocess.run([sys.executable, "-m", "dopamine_lib", *line], capture_output=True, text=True)
            assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr


def check_python(words: list[str], tmp_path, capsys, monkeypatch) -> None:
    if words[:2] == ["-m", "dopamine_lib"]:
        check_kit(words[2:], capsys)
    elif " ".join(words[:2]).startswith("-m dopamine_lib.federation."):
        program = importlib.import_module(f"{words[1]}.__main__")

        if words[2] in ("identity", "fingerprints"):
            make_identity(tmp_path / "keys", "hospital-7")  # of another party: there is something to print
            assert program.main([*words[2:-1], str(tmp_path / words[-1])]) == 0
            assert "fingerprint" in capsys.readouterr().out
            return
        for line in alternatives(words[2:]):
            read_by(program._parser(10) if words[1].endswith("mpi") else program._parser(), line)
    elif words[:2] == ["-m", "venv"]:
        target = tmp_path / words[2]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
        assert (target / "bin" / "activate").exists() or (target / "Scripts").exists()
    elif words[0] == "data_download.py":
        import data_download

        for name in ("fetch_retinamnist", "fetch_aptos", "fetch_torchvision"):
            monkeypatch.setattr(data_download, name, lambda *_: None)
        assert all(data_download.main(line) == 0 for line in alternatives(words[1:]))
    else:
        assert words[0].endswith(".py") and (REPOSITORY / words[0]).is_file(), f"python {' '.join(words)}"


def check_pip(words: list[str]) -> None:
    assert words[0] in ("install", "wheel"), words
    for before, word in zip(words, words[1:], strict=False):
        word = word.replace("dopamine-kit", ".")
        if before in ("-r", "-c"):
            assert (REPOSITORY / word).is_file()
        elif re.fullmatch(r"\.(\[[a-z,]+\])?", word):  # the kit itself, perhaps with extras
            assert set(re.findall("[a-z]+", word)) <= PROJECT["optional-dependencies"].keys(), word
        elif not word.startswith("-") and not before.startswith("--"):
            named = Requirement(word)
            allowed = read_requirements(REQUIREMENTS)[named.name].specifier
            assert all(allowed.contains(one.version) for one in named.specifier), word


def check_pytest(words: list[str], config) -> None:
    for before, word in zip(["", *words], words, strict=False):
        if before == "-k":
            assert word in {path.stem for path in (REPOSITORY / "dopamine_lib").iterdir()}, word
        elif before == "-m":
            assert word.removeprefix("not ") in {line.split(":")[0] for line in config.getini("markers")}
        elif not word.startswith("-"):
            assert (REPOSITORY / word).exists(), word


def check_flower(program: str, words: list[str]) -> None:
    """What the kit reads of it: the run-config's keys, and the node-config's. Flower itself is not installed here."""
    assert program in ("flwr", "flower-superlink", "flower-supernode")
    for before, word in zip(words, words[1:], strict=False):
        if before in ("-c", "--node-config"):
            given = dict(pair.split("=") for pair in word.replace('"', "").split())
            assert run_words(given) if before == "-c" else hospital_words({}, given)


def check_nbgrader(words: list[str]) -> None:
    apps = pytest.importorskip("nbgrader.apps")
    app = apps.NbGraderApp.subcommands[words[0]][0]
    for word in words[1:]:
        if "=" in word and "." not in word.split("=")[0]:
            assert word.split("=")[0].lstrip("-") in app().aliases, word
        elif "=" in word:
            owner, trait = word.split("=")[0].lstrip("-").split(".")
            known = {one.__name__: one for one in app().all_configurable_classes()}
            assert trait in known[owner].class_traits(config=True), word
        elif word.startswith("-"):
            assert word.lstrip("-") in app().flags, word


@pytest.mark.parametrize("words, path", TOLD, ids=lambda value: value.stem if hasattr(value, "stem") else value[0])
def test_a_command_is_understood(words, path, tmp_path, capsys, monkeypatch, request):
    program, rest = words[0], list(words[1:])
    if program == "mpiexec":
        assert rest[:3] == ["-n", rest[1], "python"] and int(rest[1]) > 2, "one server and two hospitals at least"
        program, rest = "python", rest[3:]
    if program == "dopamine":
        check_kit(rest, capsys)
    elif program == "python":
        check_python(rest, tmp_path, capsys, monkeypatch)
    elif program == "pip":
        check_pip(rest)
    elif program == "pytest":
        check_pytest(rest, request.config)
    elif program == "ruff":
        assert rest[0] in ("check", "format") and importlib.util.find_spec("ruff")
    elif program == "nbgrader":
        check_nbgrader(rest)
    elif program == "jupyter":
        assert rest[0] == "lab" and importlib.util.find_spec("jupyterlab")
        assert all((REPOSITORY / word).exists() for word in rest[1:])
    elif program.startswith(("flwr", "flower-")):
        check_flower(program, rest)
    elif program == "ssh-keygen":
        assert rest[:2] == ["-t", "ecdsa"]  # of the kind that Flower's nodes take
    elif program == "docker":
        named = rest[rest.index("-f") + 1] if "-f" in rest else rest[-1]
        assert rest[0] in ("build", "run") and (named == "dopamine" or (REPOSITORY / named).is_file()), rest
    else:
        assert program == "bash" and (REPOSITORY / rest[0]).is_file(), f"say here how to check: {' '.join(words)}"


def test_every_line_of_a_block_is_a_command():
    for path in [path for path in TEXTS if path.suffix == ".md"]:
        for line in shell_lines(words_of(path)):
            for part in line.split(" && "):
                assert split_words(part)[0] in PROGRAMS + SHELL, f"{path.name}: say how to check: {line}"


def test_every_command_of_the_kit_is_on_its_page():
    (page,) = (path for path in PAGES if path.stem == "commands")
    of_kit = {words[3] for words in commands(words_of(page)) if words[:3] == ["python", "-m", "dopamine_lib"]}
    (choices,) = (action.choices for action in command_line.parser()._actions if action.dest == "command")
    assert set(choices) <= of_kit


def test_ci_runs_the_commands_at_the_top():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    for name in ("run", "test"):
        (block,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", README.read_text(encoding="utf-8"), re.DOTALL)
        assert split_words("pip install -r requirements.txt") in commands(block)
        assert re.search(rf"for name in [^\n]*\b{name}\b", script) and f"/{name}.sh" in script


@pytest.mark.parametrize(
    "text",
    [
        "`python -m dopamine_lib reprodce --out results`",
        "`python -m dopamine_lib reproduce --out DIR --models head`",
        "    python -m dopamine_lib reproduce [--data synthetic|eyepacs] --out DIR",
        "    python -m dopamine_lib bench dp|everything [--json FILE]",
        "    python -m dopamine_lib party hospital|nurse …",
        "    python data_download.py imagenet",
        "    mpiexec -n 11 python -m dopamine_lib.federation.mpi --turns 3 --out results",
        "    python -m dopamine_lib.federation.remote server --identities keys --port 3 --out results",
        "    python -m dopamine_lib.federation.remote hospital --identities keys --out results",
        "    python -m dopamine_lib.federation.flower hospital --identities keys --out results",
        "    flwr run APP here -c 'epsilom=3.0'",
        "    flower-supernode --superlink SERVER:8000 --node-config 'partition-id=3 keys=\"/home/h3/keys\"'",
        "`pip install -r requirement.txt`",
        "`pip install torch==1.0.0`",
        '`pip install "dopamine-kit[mpl]"`',
        "`dopamine curse DIR`",
        "`pytest -m fast`",
        "    nbgrader grade NAME",
        "`nbgrader autograde NAME --students=STUDENT`",
        "`jupyter lab notebooks/99_none.ipynb`",
        "    docker run dopamin",
        "    docker build -f Dockerfile .",
        "    python train.py",
    ],
)
def test_a_wrong_command_is_found(text, tmp_path, capsys, monkeypatch, request):
    (words,) = commands(text)
    with pytest.raises((AssertionError, KeyError, SystemExit, InputError)):
        test_a_command_is_understood(words, README, tmp_path, capsys, monkeypatch, request)


def test_commands_are_found_where_they_stand():
    text = "Run `python -m x` or `x`.\n\n```bash\nA=1 pip install y\n```\n\n"
    text += "    ruff check \\\n        --fix\n"
    text += (
        "    pytest  # all\n    python a.py [--b B]\n            [--c]\n    cd course && nbgrader export   # grades\n"
    )
    in_blocks = [["pip", "install", "y"], ["ruff", "check", "--fix"], ["pytest"]]
    in_blocks += [["python", "a.py", "[--b", "B]", "[--c]"], ["nbgrader", "export"]]
    assert commands(text) == [*in_blocks, ["python", "-m", "x"]]
