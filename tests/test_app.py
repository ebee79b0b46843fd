"""The command ``app``: the page as Voila serves it, driven over the same socket that a browser uses."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_devcontainer import health

from dopamine_lib.__main__ import main
from dopamine_lib.data.dataset import GRADES
from dopamine_lib.data.images import prepare
from dopamine_lib.models.checkpoints import save_model
from dopamine_lib.models.networks import HALF, build, to_input
from dopamine_lib.page.app import listening, most_kernels, refusal
from dopamine_lib.page.process_memory import children, together
from dopamine_lib.page.widget import samples

pytest.importorskip("voila", reason="the page is served by Voila: pip install voila")
pytest.importorskip("tornado")

SIZE = 28
READY = re.compile(r"the patient's page is at (http://127\.0\.0\.1:(\d+)/); Ctrl-C ends it")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network with large weights as a file, and ``plain``: its logits for a picture."""
    net = build("cnn", 5, None, 0).requires_grad_(False)
    net[-1].weight.mul_(20)
    path = tmp_path_factory.mktemp("app") / "model.safetensors"
    about = {
        "architecture": "cnn",
        "grades": GRADES,
        "preprocessing": {"size": SIZE, "mean": HALF[0], "std": HALF[1]},
        "setting": "FSCDP",
        "statement": "for a test",
    }
    save_model(path, net, about)
    return SimpleNamespace(path=path, plain=lambda image: net(to_input(prepare(image, SIZE)[None], *HALF))[0].numpy())


def users_own(folder) -> dict[str, str]:
    """A user's kernel "python3", which is a Python without the kit, and configuration of Voila, for other pages."""
    kernel, config = folder / "jupyter" / "kernels" / "python3" / "kernel.json", folder / "jupyter" / "voila.json"
    kernel.parent.mkdir(parents=True, exist_ok=True)
    other = [sys.executable, "-I", "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": other, "display_name": "mine", "language": "python"}))
    config.write_text(json.dumps({"VoilaConfiguration": {"template": "gridstack", "theme": "dark"}}))
    paths = dict.fromkeys(("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"), str(folder / "jupyter"))
    return paths | {"JUPYTER_PREFER_ENV_PATH": "0"}  # as without a virtual environment


def start(folder, *arguments):
    """``app`` on a free port with its own temporary folder; the process."""
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | users_own(folder.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "dopamine_lib", "app", "--port", "0", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module")
def app(model, tmp_path_factory):
    """A running ``app``: its process, address, and temporary folder."""
    folder = tmp_path_factory.mktemp("served")
    process = start(folder, "--weights", model.path)
    try:
        line = process.stdout.readline()
        assert READY.match(line), line + process.stderr.read()
        yield SimpleNamespace(process=process, address=READY.match(line)[1], folder=folder)
    finally:
        process.kill()
        process.communicate()


def get(address: str, **headers):
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return SimpleNamespace(headers=answer.headers, text=answer.read().decode())


def until(condition, seconds: float = 60) -> None:
    """Wait for other processes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


class Visitor:
    """A browser without a screen: loads the page, and moves its controls by the messages a browser would send."""

    def __init__(self, app):
        self.page = get(app.address)
        self.kernel = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', self.page.text, re.S)[1])
        self.address = (
            app.address.replace("http", "ws") + f"api/kernels/{self.kernel['kernelId']}/channels?session_id=1"
        )
        self.states = {}

    async def connect(self):
        from tornado.websocket import websocket_connect

        self.socket = await websocket_connect(self.address)
        control = uuid.uuid4().hex
        await self.send("comm_open", comm_id=control, target_name="jupyter.widget.control", data={})
        await self.send("comm_msg", comm_id=control, data={"method": "request_states"})
        await self.until(lambda: len(self.states) > 10)
        return self

    async def send(self, kind: str, **content):
        header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "username": "", "session": "s", "version": "5.3"}
        metadata = {"version": "1.0.0"} if kind == "comm_open" else {}
        message = {"header": header | {"date": ""}, "parent_header": {}, "metadata": metadata, "content": content}
        await self.socket.write_message(json.dumps(message | {"channel": "shell", "buffers": []}))

    async def until(self, condition, seconds: float = 90):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain: {self.find('HTMLModel', 'wrong')}"
            message = await asyncio.wait_for(self.socket.read_message(), seconds)
            if isinstance(message, bytes):  # with buffers: the text comes first
                offsets = np.frombuffer(message[:12], ">u4")
                message = message[offsets[1] : offsets[2] if offsets[0] > 1 else None]
            message = json.loads(message)
            data = message.get("content", {}).get("data", {})
            if data.get("method") == "update_states":
                self.states |= {key: value["state"] for key, value in data["states"].items()}
            elif data.get("method") in ("update", "echo_update"):
                self.states.setdefault(message["content"]["comm_id"], {}).update(data["state"])

    def find(self, kind: str, text: str):
        """The id of the widget of a kind with a text somewhere in its state, or None."""
        found = (
            key for key, state in self.states.items() if state.get("_model_name") == kind and text in json.dumps(state)
        )
        return next(found, None)

    async def grade(self, sample: int):
        """Choose a sample, click, and wait for the answer; returns the HTML of the result."""
        choice, button = self.find("DropdownModel", "Sample 1"), self.find("ButtonModel", "Grade this scan")
        await self.send("comm_msg", comm_id=choice, data={"method": "update", "state": {"index": sample + 1}})
        await self.until(lambda: self.find("HTMLModel", f"Preview of Sample {sample + 1}"))
        await self.until(lambda: not self.states[button]["disabled"])
        await self.send("comm_msg", comm_id=button, data={"method": "custom", "content": {"event": "click"}})
        await self.until(lambda: self.states[button]["disabled"])
        await self.until(lambda: self.find("HTMLModel", "Grade: ") and not self.states[button]["disabled"])
        return self.states[self.find("HTMLModel", "Grade: ")]["value"]

    def workers(self) -> list[int]:
        """Process numbers of the three workers, from the panel for the curious."""
        panel = self.states[self.find("HTMLModel", "what each of the three saw")]["value"]
        return [int(pid) for pid in re.findall(r"process (\d+)", panel)]


def test_a_page_from_elsewhere_starts_no_kernel_and_kernels_are_capped(app):
    def kernels():
        return [pid for pid in children(app.process.pid) if b"ipykernel" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    before = kernels()
    for headers in (
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {
            "Sec-Fetch-Site": "same-site",
            "Sec-Fetch-Mode": "navigate",
            "Sec-Fetch-Dest": "iframe",
            "Sec-Fetch-User": "?1",
        },
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get(app.address, **headers)
        assert refusal(headers, 0, 1)
    assert health(urllib.parse.urlsplit(app.address).port) == 0, "the container's own check"
    assert kernels() == before
    for headers in (
        {},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "iframe"},
        {
            "Sec-Fetch-Site": "cross-site",
            "Sec-Fetch-Mode": "navigate",
            "Sec-Fetch-Dest": "document",
            "Sec-Fetch-User": "?1",
        },
    ):
        assert refusal(headers, 1, 2) is None and refusal(headers, 2, 2)[0] == 503
    assert 2 <= most_kernels() <= 50


def test_two_visitors_at_once_are_both_answered_by_the_same_backend(app, model):
    def expected(sample):
        return f"Grade: {GRADES[int(model.plain(samples(SIZE)[sample][0]).argmax())]}"

    async def visit():
        visitors = [await Visitor(app).connect() for _ in range(2)]
        results = await asyncio.gather(*(visitor.grade(i) for i, visitor in enumerate(visitors)))
        for i, result in enumerate(results):
            assert expected(i) in result
        (one, *backend), (other, *same) = (visitor.workers() for visitor in visitors)
        assert backend == same and len({one, other, *backend}) == 4
        family = children(app.process.pid)
        assert set(family) >= {one, other, *backend}
        assert together([app.process.pid, *family]) < 2e9

        os.kill(backend[0], signal.SIGKILL)  # the provider: it is started again, and the page goes on
        assert expected(3) in await visitors[0].grade(3)
        assert visitors[0].workers()[1] != backend[0]
        return visitors, one, other

    visitors, one, other = asyncio.run(visit())

    # a visitor who leaves ends the kernel
    farewell = f"{app.address}voila/api/shutdown/{visitors[1].kernel['kernelId']}"
    with urllib.request.urlopen(urllib.request.Request(farewell, data=b"", method="POST"), timeout=60) as gone:
        assert gone.status == 204
    until(lambda: not Path(f"/proc/{other}").exists())
    assert Path(f"/proc/{one}").exists()


def test_the_page_names_no_place_elsewhere_and_forbids_them_all(app):
    page = get(app.address)
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "*" not in policy and "http" not in policy
    assert page.headers["Referrer-Policy"] == "no-referrer"
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page.text)
    assert any("voila" in place for place in loaded)
    assert not [place for place in loaded if re.match(r"(?:[a-z]+:)?//", place)], loaded
    assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", page.text)
    assert 'lang="en"' in page.text and "<title>A grade for your retina scan</title>" in page.text
    assert 'name="viewport"' in page.text
    assert "PatientPage" not in page.text  # the source is not shown


def test_a_name_that_leads_here_from_elsewhere_is_turned_away(app):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(app.address, Host="evil.example")
    with pytest.raises(urllib.error.HTTPError):
        get(app.address + "voila/files/page.ipynb")


def test_the_introduction_is_private_and_no_secret_is_in_the_environment(app):
    (folder,) = app.folder.glob("dopamine-app-*")
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "introduction.json").stat().st_mode & 0o077 == 0
    for pid in (app.process.pid, *children(app.process.pid)):
        told = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"PRIVATE" not in told and (b"model.safetensors" not in told or pid == app.process.pid)


def test_it_ends_with_its_workers_and_leaves_nothing(app):
    """The last test of this app."""
    family = children(app.process.pid)
    assert len(family) >= 2
    app.process.send_signal(signal.SIGTERM)
    assert app.process.wait(60) == 0
    left = [path.name for path in app.folder.iterdir() if not path.name.startswith("torchinductor")]  # PyTorch's own
    assert not left
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


def test_a_wrong_model_is_one_line_and_status_2(tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"nothing")
    process = start(tmp_path, "--weights", wrong)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "is not a model" in err.splitlines()[-1], err
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]


def test_bad_ports_and_hosts(capsys, monkeypatch):
    import socket

    monkeypatch.delenv("DOPAMINE_KERNELS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "-1"], "--port is -1"),
            (["--port", "70000"], "[0, 65535]"),
            (["--host", "256.1.1.1"], "choose another --port or --host"),
            (["--host", "a..b"], "choose another --port or --host"),
        ):
            assert main(["app", *arguments]) == 2 and "DOPAMINE_KERNELS" not in os.environ
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1


def test_nobody_can_take_the_port_before_the_page_is_served():
    import socket

    with listening("127.0.0.1", 0) as listeners:
        address = listeners[0].getsockname()
        with pytest.raises(OSError), socket.create_server(address):
            pass
        socket.create_connection(address, 60).close()  # a visitor who comes early waits for the page
    socket.create_server(address).close()


@pytest.mark.slow
def test_an_address_open_to_the_network_needs_a_token(tmp_path, model):
    process = start(tmp_path, "--weights", model.path, "--host", "0.0.0.0")
    try:
        line = process.stdout.readline()
        key = re.search(r"http://0\.0\.0\.0:(\d+)/\?token=([\w-]{20,});", line)
        assert key, line
        bare = f"http://127.0.0.1:{key[1]}/"
        assert "cell-index" not in get(bare).text  # a form that asks for the key
        assert "cell-index" in get(f"{bare}?token={key[2]}").text
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert "unencrypted" in err and key[2] not in err


def test_the_command_line_stays_light():
    heavy = {"numpy", "torch", "voila", "ipywidgets"}
    program = f"import sys, dopamine_lib.page.app; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


KILLED = """
import os, signal, threading
from pathlib import Path
from dopamine_lib.__main__ import main
from dopamine_lib.page import app, consultation

class Nobody:
    def __init__(self, *arguments, **more): self.introduction = threading.Event().wait

class Server:
    def __init__(self, folder, host, port): (folder / "introduction.json").write_text("the patients' key")
    def start(self): os.kill(os.getpid(), signal.SIGKILL)

consultation.Backend, app._server = Nobody, Server
main(["app", "--port", "0"])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_server_leaves_no_key_behind(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())
