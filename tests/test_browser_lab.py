"""Two chapters in JupyterLab, in a browser: run all cells, move a slider, see the picture change."""

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path

import pytest
import requests
from browsing import PATIENCE, Watched, answers, browser, free_port, private_jupyter, running

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
#: What JupyterLab is told: no news from outside, and every cell in the page, seen or not.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def copy_without_outputs(chapter: str, folder: Path) -> Path:
    """The chapter as if it had never been run, so that what is seen is of this run."""
    notebook = json.loads((NOTEBOOKS / f"{chapter}.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    copy = folder / f"{chapter}.ipynb"
    copy.write_text(json.dumps(notebook))
    return copy


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab of our own, its token and its folder of notebooks."""
    folder, token, port = tmp_path / "notebooks", secrets.token_hex(16), free_port()
    folder.mkdir()
    if (NOTEBOOKS / "figures").is_dir():
        shutil.copytree(NOTEBOOKS / "figures", folder / "figures")
    env = private_jupyter(tmp_path) | {"JUPYTER_TOKEN": token, "OMP_NUM_THREADS": "1"}
    for name, values in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    arguments = ["-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    arguments += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    if os.geteuid() == 0:
        arguments.append("--allow-root")
    address = f"http://127.0.0.1:{port}"
    with running(arguments, tmp_path / "log", is_up=answers(f"{address}/api"), cwd=folder, env=env):
        yield address, token, folder


def wait_for_kernel(address: str, token: str) -> None:
    """Wait until the notebook has a kernel that is ready; what is asked for earlier is lost."""
    end = time.monotonic() + PATIENCE / 1000
    states = []
    while states != ["idle"]:
        assert time.monotonic() < end, f"the kernel is not ready: {states}"
        time.sleep(1)
        sessions = requests.get(f"{address}/api/sessions", headers={"Authorization": f"token {token}"}, timeout=60)
        states = [session["kernel"]["execution_state"] for session in sessions.json()]


def run_all(page) -> None:
    """Choose Run All Cells from the menu, again where the page was not ready to hear it."""
    from playwright.sync_api import TimeoutError as Late

    begun = page.locator(".jp-InputPrompt").filter(has_text=re.compile(r"\[(\*|\d+)\]"))
    for _ in range(3):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        with contextlib.suppress(Late):
            begun.first.wait_for(timeout=60_000)
            return
    raise AssertionError("no cell is run")


def wait_until_all_have_run(page, copy: Path) -> None:
    """Save until every code cell on disk has been run; an error in one of them fails the test."""
    end = time.monotonic() + 3 * PATIENCE / 1000
    while True:
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        cells = [cell for cell in json.loads(copy.read_text())["cells"] if cell["cell_type"] == "code"]
        errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors, errors
        waiting = [number for number, cell in enumerate(cells) if cell["source"] and not cell["execution_count"]]
        if not waiting:
            return
        assert time.monotonic() < end, f"the notebook does not come to its end: code cells {waiting} have not been run"


def pixels(image) -> str:
    """The picture that an <img> shows, as a data URL."""
    return image.evaluate(
        """async picture => {
            for (let tries = 1; ; tries++)
                try {
                    await picture.decode();
                    break;
                } catch (error) {  // a picture that is replaced meanwhile cannot be decoded: take the next
                    if (tries === 50) throw error;
                    await new Promise(later => setTimeout(later, 100));
                }
            const canvas = document.createElement('canvas');
            canvas.width = picture.naturalWidth;
            canvas.height = picture.naturalHeight;
            canvas.getContext('2d').drawImage(picture, 0, 0);
            return canvas.toDataURL();
        }"""
    )


@pytest.mark.parametrize("chapter", ["01_differential_privacy", "02_gaussian_mechanism"])
def test_a_slider_changes_the_picture(lab, chapter):
    address, token, folder = lab
    copy = copy_without_outputs(chapter, folder)
    with browser() as chromium:
        watched = Watched(chromium, viewport={"width": 1280, "height": 900})
        page = watched.page
        page.goto(f"{address}/lab/tree/{copy.name}?token={token}")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        wait_for_kernel(address, token)
        run_all(page)
        wait_until_all_have_run(page, copy)

        handle = page.locator(".widget-slider [role=slider]").first
        image = page.locator(".widget-image").first
        handle.scroll_into_view_if_needed()
        before, value = pixels(image), handle.get_attribute("aria-valuenow")
        picture, source = image.element_handle(), image.get_attribute("src")
        handle.focus()
        for _ in range(8):
            page.keyboard.press("ArrowRight")
        page.wait_for_function("([picture, before]) => picture.src !== before", arg=[picture, source])
        assert float(handle.get_attribute("aria-valuenow")) > float(value)
        assert pixels(image) != before
        assert not watched.outside
