"""Headless Chromium for the tests of pages: Debian's, driven by Playwright, which downloads nothing here."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
#: Generous, for a machine with other work to do.
PATIENCE = 240_000


def chromium_path() -> str:
    """Where Chromium is; the test skips with the reason where it or Playwright is missing."""
    pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs Chromium: apt-get install chromium")


@contextlib.contextmanager
def browser():
    """A headless browser, ended with the block."""
    path = chromium_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield chromium
        finally:
            chromium.close()


class Watched:
    """A page that remembers what it asked for outside this machine and what it complained of.

    outside  addresses of requests to anything but this machine
    errors   errors in the console and exceptions that nothing caught
    """

    def __init__(self, chromium, **options):
        self.outside, self.errors = [], []
        self.context = chromium.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", self._request)
        self.page.on("websocket", self._request)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # the browser takes hold of file choosers from now on: asked to only when a key is pressed, it may be too late
        self.page.on("filechooser", lambda chooser: None)

    def _request(self, request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob", "about") and address.hostname not in ("127.0.0.1", "localhost"):
            self.outside.append(request.url)

    def _console(self, message) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def private_jupyter(folder: Path) -> dict[str, str]:
    """An environment in which Jupyter reads and writes nothing of the user's, and phones nobody."""
    places = {
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "IPYTHONDIR": folder / "ipython",
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
    }
    for place in places.values():
        place.mkdir(parents=True)
    return os.environ | {name: str(place) for name, place in places.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def running(arguments: list[str], log: Path, *, is_up, cwd: Path, env: dict[str, str]):
    """``python`` with ``arguments`` as a server, once ``is_up()`` is true; with its children ended with the block."""
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + PATIENCE / 1000
        while not is_up():
            assert server.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"the server does not answer:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str):
    """A function that says whether a server answers at ``url``."""
    import requests

    def ask() -> bool:
        try:
            return requests.get(url, timeout=10).status_code < 500
        except requests.ConnectionError:
            return False
        except requests.Timeout:
            return False

    return ask


#: Roles of what a patient operates or has to be told about.
CONTROLS = {"button", "combobox", "textbox", "checkbox", "slider", "link", "progressbar", "image", "DisclosureTriangle"}


def names_of_controls(page) -> list[tuple[str, str]]:
    """Role and name of every control and picture, as the browser tells them to a screen reader."""
    session = page.context.new_cdp_session(page)
    try:
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    finally:
        session.detach()
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in CONTROLS
    ]


def contrasts(page) -> dict[str, float]:
    """Contrast (WCAG 2.1) of each visible text with what lies behind it; disabled controls are exempt."""
    return page.evaluate(
        """() => {
            const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
            const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
            const behind = element => {
                if (!element) return [255, 255, 255];
                const own = parse(getComputedStyle(element).backgroundColor);
                return own[3] === 1 ? own : over(own, behind(element.parentElement));
            };
            const light = colour => {
                const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
                const [r, g, b] = colour.map(c => linear(c / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const found = {};
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
                const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
                if (!text || !seen || element.closest(':disabled, script, style')) continue;
                let opacity = 1;
                for (let e = element; e; e = e.parentElement) opacity *= getComputedStyle(e).opacity;
                const ground = behind(element), ink = parse(getComputedStyle(element).color);
                const [a, b] = [light(over([...ink.slice(0, 3), ink[3] * opacity], ground)), light(ground)];
                const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                found[text.slice(0, 60)] = Math.min(ratio, found[text.slice(0, 60)] ?? 99);
            }
            return found;
        }"""
    )


def focused(page) -> str:
    """The control that has the focus: its label or its text."""
    return page.evaluate(
        """() => {
            const at = document.activeElement;
            return at.matches('body, html') ? '' : at.labels?.[0]?.innerText || at.innerText || '';
        }"""
    )


def tab_to(page, name: str, most: int = 15) -> list[str]:
    """Press Tab until ``name`` has the focus; what had it on the way."""
    passed = []
    for _ in range(most):
        page.keyboard.press("Tab")
        at = focused(page)
        if name in at:
            return passed
        passed.append(at)
    raise AssertionError(f"Tab does not reach '{name}', only {passed}")


def spilling(page) -> list[str]:
    """What sticks out of the patient's page sideways, whether or not its edge hides that."""
    return page.evaluate(
        """() => {
            const page = document.querySelector('.dopamine-page');
            const right = page.getBoundingClientRect().right - parseFloat(getComputedStyle(page).paddingRight);
            return [...page.querySelectorAll('*')].filter(e => {
                const box = e.getBoundingClientRect();
                return box.width && box.height && box.right > right + 1 && e.checkVisibility();
            }).map(e => e.outerHTML.slice(0, 200));
        }"""
    )


def too_wide(page) -> list[str]:
    """What does not fit into the width of the window."""
    return page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            const wide = [...document.querySelectorAll('body *')].filter(e => {
                const box = e.getBoundingClientRect();
                return box.width && box.height && box.right > width + 1 && e.checkVisibility();
            }).map(e => e.outerHTML.slice(0, 200));
            const scroll = [document.documentElement, document.body].filter(e => e.scrollWidth > width);
            return [...wide, ...scroll.map(e => `${e.tagName} scrolls`)];
        }"""
    )
