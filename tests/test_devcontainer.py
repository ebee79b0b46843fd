"""The container: Binder's pins, no rights, nothing of a user's in the image, and a check that knows dead from alive.

No Docker is needed: its files are read, and its commands run here.
"""

import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from pins import BINDER, REPOSITORY

from dopamine_lib import __main__ as command_line
from dopamine_lib.page.app import PORT

FOLDER = REPOSITORY / ".devcontainer"
#: Instructions in order, as (name, words).
STEPS = re.findall(r"^([A-Z]+) (.+)$", (FOLDER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
IGNORED = [line for line in (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line]


def step(name: str) -> str:
    (words,) = (words for one, words in STEPS if one == name)
    return words


def health(port: int) -> int:
    """What the image's health check says of a server on a port here: 0 for alive."""
    program, *words = json.loads(step("HEALTHCHECK").partition("CMD ")[2])
    assert program == "python" and words[0] == "-c" and str(PORT) in words[1]
    ran = subprocess.run([sys.executable, "-c", words[1].replace(str(PORT), str(port))], capture_output=True)
    return ran.returncode


def test_it_is_binders_python_and_binders_packages():
    version = (BINDER.parent / "runtime.txt").read_text(encoding="utf-8").strip().partition("-")[2]
    assert step("FROM") == f"python:{version}-slim"
    installed = [words for name, words in STEPS if name == "RUN" and "pip install" in words]
    assert len(installed) == 1 and "--no-cache-dir -r binder/requirements.txt &&" in installed[0]
    assert installed[0].endswith("-c constraints.txt jupyterlab"), (
        "Binder brings a JupyterLab; here it is the pinned one"
    )


def test_the_page_is_served_by_a_user_without_rights():
    names = [name for name, _ in STEPS]
    assert step("USER") == "kit" and names.index("USER") < names.index("CMD")
    program, *words = json.loads(step("CMD"))
    arguments = command_line.parser().parse_args(words)
    assert program == "dopamine" and arguments.command == "app" and int(step("EXPOSE")) == arguments.port == PORT


def test_an_image_has_nothing_of_a_users_in_it_and_no_solutions():
    rules = [line for line in IGNORED if not line.startswith("#")]
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*" and all((REPOSITORY / name).exists() for name in kept)
    assert not {"data", "results", ".git", "tests"} & set(kept)
    assert rules.index("notebooks/homework/source") > rules.index("!notebooks")
    needed = {"pyproject.toml", "README.md", "LICENSE", ".ci/build_kit.py", "binder", "constraints.txt", "dopamine_lib"}
    assert needed <= set(kept), "for pip install -e ."


def test_an_editor_opens_the_folder_in_it():
    opened = json.loads((FOLDER / "devcontainer.json").read_text(encoding="utf-8"))
    build = opened["build"]
    assert (FOLDER / build["dockerfile"]).is_file() and (FOLDER / build["context"]).resolve() == REPOSITORY
    assert opened["remoteUser"] == step("USER") and PORT in opened["forwardPorts"]
    assert opened["workspaceFolder"] == step("WORKDIR") and f"target={step('WORKDIR')}," in opened["workspaceMount"]


class Answers(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("status, alive", [(200, True), (404, True), (503, False)])
def test_a_server_that_answers_is_healthy(status, alive, monkeypatch):
    monkeypatch.setattr(Answers, "status", status)
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert (health(server.server_port) == 0) is alive
        server.shutdown()
        thread.join()


def test_a_port_where_nobody_listens_is_not():
    with socket.socket() as kept:  # by us, so that nobody else listens there meanwhile
        kept.bind(("127.0.0.1", 0))
        assert health(kept.getsockname()[1]) != 0
