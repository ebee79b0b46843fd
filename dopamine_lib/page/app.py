"""The command ``app``: the patient's page in a browser, served by Voila on this machine.

There are three kinds of process: this one serves the page and starts the provider and the crypto-provider, and every
visitor gets a kernel, which is that visitor's patient. A worker that dies is started again. The page loads nothing
from elsewhere, and its Content-Security-Policy keeps browsers from trying.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.inference.workers.commands import add_answer
from dopamine_lib.machine import memory_size, need_home
from dopamine_lib.pool import Child, Parent

PORT, LOOPBACK = 8866, ("127.0.0.1", "localhost", "::1")
TITLE = "A grade for your retina scan"
PAGE = """from IPython.display import display
from dopamine_lib.page.widget import PatientPage
page = PatientPage(heading=1)
display(page.widget)"""
#: What browsers may load: this server's own files, and pictures embedded in the page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'self'; form-action 'self'"
)
CHECK = 0.5  # seconds between two looks at whether the workers live
#: Bytes of memory for one visitor's kernel, and how many kernels there may be whatever the memory.
KERNEL_MEMORY, FEWEST, MOST = 300_000_000, 2, 50
REMOVING = 5.0  # seconds for removing what a killed server left
IDLE = 600  # seconds until the kernel of a visitor who left without notice is ended


def add_app(commands: Any) -> None:
    """Add ``app`` to the subparsers of the command line."""
    app = commands.add_parser("app", help="serve the patient's page: upload a scan, get a grade; nobody sees the scan")
    app.add_argument("--port", type=int, default=PORT, help=f"0 takes a free one (default: {PORT})")
    app.add_argument("--host", default=LOOPBACK[0], help="where to listen (default: 127.0.0.1, this machine only)")
    app.add_argument("--weights", metavar="FILE", help="a model that reproduce wrote (default: the one shipped)")
    app.add_argument("--backbone", metavar="FILE", help="for a head: its SqueezeNet (default: the embedded one)")
    app.add_argument("--size", type=int, metavar="PIXELS", help="side of an image (default: the model's own)")
    add_answer(app)
    app.set_defaults(call=_app)


def _app(arguments) -> None:
    from tornado.ioloop import IOLoop

    from dopamine_lib.page.consultation import INTRODUCTION, Backend

    need_home()
    if find_spec("voila") is None:
        raise not_installed("voila")
    with (
        listening(arguments.host, arguments.port) as listeners,  # from here on nobody else can take the port
        tempfile.TemporaryDirectory(prefix="dopamine-app-") as folder,  # mode 0700
        contextlib.closing(Child(__name__, folder)),  # takes it away where this process is killed
    ):
        # compiling takes every process about ten seconds and would save a tenth of one
        os.environ.setdefault("DOPAMINE_KERNELS", "numpy")
        backend = Backend(arguments.weights, backbone=arguments.backbone, size=arguments.size, answer=arguments.answer)
        introduction = Path(folder, "introduction.json")
        os.environ[INTRODUCTION] = str(introduction)
        loop = IOLoop.current()  # the one that the server will run in
        keeper = _Keeper(backend, introduction, lambda: loop.add_callback(loop.stop))
        try:
            keeper.start()
            _server(Path(folder), arguments.host, listeners).start()  # while the workers start
        finally:
            keeper.stop()
            backend.close()
    if keeper.failure:
        raise keeper.failure


class _Keeper(threading.Thread):
    """Starts the backend, starts it again when it dies, and tells the kernels how to reach it."""

    def __init__(self, backend, path: Path, on_failure):
        super().__init__(daemon=True)
        self._backend, self._path, self._on_failure = backend, path, on_failure
        self._ended, self.failure = threading.Event(), None

    def run(self) -> None:
        known = None
        while not self._ended.is_set():
            try:
                introduction = self._backend.introduction()
            except Exception as error:  # raised again in the main thread
                if not self._ended.is_set():
                    self.failure = error
                    self._on_failure()
                return
            if introduction is not known:
                introduction.write(self._path)
                known = introduction
            self._ended.wait(CHECK)

    def stop(self) -> None:
        self._ended.set()


def _server(folder: Path, host: str, listeners: list[socket.socket]):
    """Voila, ready to start on sockets that listen; ``folder`` is a private one for what it reads."""
    # Jupyter's validator would spend three seconds on a grammar of web addresses, none of which is checked here
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbformat
    from tornado.httpserver import HTTPServer
    from tornado.web import HTTPError
    from voila.app import Voila
    from voila.shutdown_kernel_handler import VoilaShutdownKernelHandler
    from voila.tornado.handler import TornadoVoilaHandler

    from dopamine_lib.data.uploads import MAX_UPLOAD

    class ShutdownHandler(VoilaShutdownKernelHandler):
        def check_xsrf_cookie(self) -> None:
            """A browser that leaves sends no copy of its cookie; only it knows its kernel's number."""

    class PageHandler(TornadoVoilaHandler):
        starting = 0

        async def get(self, path: str | None = None) -> None:
            """The page, with a kernel for whoever may have one."""
            kernels = len(self.kernel_manager.list_kernel_ids()) + PageHandler.starting
            if refused := refusal(self.request.headers, kernels, most_kernels()):
                raise HTTPError(*refused)
            PageHandler.starting += 1
            try:
                await super().get(path)
            finally:
                PageHandler.starting -= 1

    ours = {TornadoVoilaHandler: PageHandler, VoilaShutdownKernelHandler: ShutdownHandler}

    class PageServer(Voila):
        def init_handlers(self):
            return [(path, ours.get(kind, kind), *rest) for path, kind, *rest in super().init_handlers()]

        def listen(self) -> None:
            # Voila would bind a socket of its own
            self.app.listen = lambda port, host: HTTPServer(self.app).add_sockets(listeners)
            super().listen()

        def launch_browser(self) -> None:  # Voila calls this when it listens
            at = f"[{self.ip}]" if ":" in self.ip else self.ip
            key = f"?token={self.token}" if self.token else ""
            print(f"the patient's page is at http://{at}:{self.port}/{key}; Ctrl-C ends it", flush=True)

    cell = nbformat.v4.new_code_cell(PAGE)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    page = folder / "page.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel, "title": TITLE}), page)
    # a user's kernel of that name may be another Python, which has no kit
    kernel |= {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "metadata": {"supported_encryption": ["curve"]},
    }
    (folder / "kernels" / "python3").mkdir(parents=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    for owner in ("voila", "nbconvert"):
        template = folder / owner / "templates" / "page"
        template.mkdir(parents=True)
        (template / "conf.json").write_text(json.dumps({"base_template": "lab"}), encoding="utf-8")
    source = files("dopamine_lib").joinpath("assets/page.html.j2").read_text(encoding="utf-8")
    source = source.replace("MAX_UPLOAD", str(MAX_UPLOAD))
    (folder / "voila" / "templates" / "page" / "index.html.j2").write_text(source, encoding="utf-8")
    _prepend("JUPYTER_PATH", str(folder))
    _prepend("PYTHONPATH", str(Path(__file__).parents[2]))  # a kernel starts in the private folder
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

    server = PageServer()
    server.initialize([str(page)])
    # set here, after whatever a configuration file of Voila's says
    server.log_level = "ERROR"
    logging.getLogger("tornado").setLevel("ERROR")  # it grumbles at Jupyter's own choice of time-outs
    port = listeners[0].getsockname()[1]
    server.ip, server.port, server.port_retries, server.base_url = host, port, 0, "/"
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
    server.tornado_settings = {"websocket_max_message_size": 2 * MAX_UPLOAD, "headers": headers}
    if host in LOOPBACK:
        # a page from elsewhere must not reach this one by a name that leads here
        server.tornado_settings["allow_remote_access"] = False
    else:
        server.token = secrets.token_urlsafe(24)
        print(
            f"dopamine: {host} is open to the network, and scans reach this server unencrypted; keep to a network you "
            "trust, or put a server with TLS in front of it",
            file=sys.stderr,
        )
    server.config.MappingKernelManager.cull_idle_timeout = IDLE
    # to the kernels: rather no page than a scan in the clear
    server.config.KernelManager.transport_encryption = "required"
    choices = server.voila_configuration
    choices.template, choices.allow_template_override, choices.allow_theme_override = "page", "NO", "NO"
    # other extensions of this JupyterLab have no business here, and some want the network
    choices.extension_allowlist = ["@jupyter-widgets/jupyterlab-manager", "@voila-dashboards/widgets-manager8"]
    choices.theme, choices.strip_sources, choices.file_allowlist = "light", True, ["$^"]  # no file is served
    server.setup_template_dirs()
    return server


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets that listen at the port, or at a free one for 0. Raises InputError where nobody can listen there."""
    from tornado.netutil import bind_sockets

    if not 0 <= port < 2**16:
        raise InputError(f"--port is {port}, but must lie in [0, 65535]")
    try:
        listeners = bind_sockets(port, host)
    except (OSError, UnicodeError) as error:  # the second for what cannot be a name, such as "a..b"
        why = getattr(error, "strerror", error)
        raise InputError(f"cannot listen on {host}:{port} ({why}); choose another --port or --host") from None
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def refusal(headers: Mapping[str, str], kernels: int, most: int) -> tuple[int, str] | None:
    """Status and reason for not giving this visitor a kernel beside the ``kernels`` there are; None to give one.

    A page from elsewhere may ask for ours as a picture, a frame or a script, as often as it likes; browsers say so in
    these headers (W3C, Fetch Metadata Request Headers). An address typed or a link clicked is welcome.

    >>> refusal({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, 0, 10)
    (403, 'asked for by a page from elsewhere')
    """
    clicked = [headers.get(f"Sec-Fetch-{name}") for name in ("Mode", "Dest", "User")] == ["navigate", "document", "?1"]
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not clicked:
        return 403, "asked for by a page from elsewhere"
    if kernels >= most:
        return 503, f"{kernels} visitors are as many as this machine has memory for; try again later"
    return None


def most_kernels() -> int:
    """How many visitors' kernels may take half of this machine's memory."""
    memory = memory_size()
    return MOST if memory is None else min(MOST, max(FEWEST, memory // 2 // KERNEL_MEMORY))


def _prepend(name: str, path: str) -> None:
    os.environ[name] = os.pathsep.join(filter(None, [path, os.environ.get(name)]))


def main(folder: str, descriptor: str) -> None:
    """The server's child: wait until the server has ended, then remove ``folder`` with the patients' key."""
    with contextlib.suppress(EOFError):
        Parent(int(descriptor), grace=REMOVING).hear()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
