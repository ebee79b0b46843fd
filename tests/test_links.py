"""Every link of the README and the notebooks leads somewhere: a file, a heading, or an address that is in links.txt.

Nothing is asked for over the network here: links.txt is for the weekly workflow, which runs check_links.py.
"""

import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import check_links
import pytest
from readme import (
    CHANGELOG,
    CONTRIBUTING,
    INTERFACES,
    NOTEBOOKS,
    PAGES,
    README,
    REPOSITORY,
    SECURITY,
    anchors,
    links,
    outside,
    without_fences,
    words_of,
)

TEXTS = [README, CONTRIBUTING, INTERFACES, CHANGELOG, SECURITY, *PAGES, *NOTEBOOKS]
CODE = [REPOSITORY / "CITATION.cff", REPOSITORY / "data_download.py", *REPOSITORY.glob("dopamine_lib/**/*.py")]


def broken(path: Path, text: str) -> list[str]:
    """The links of a text that lead nowhere, read as standing in ``path``."""
    wrong = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        if "://" in target or target.startswith(("mailto:", "attachment:", "data:")):
            continue
        file = path.parent / name if name else path
        if not file.exists() or not file.resolve().is_relative_to(REPOSITORY):
            wrong.append(target)
        elif anchor and anchor not in anchors(text if file == path else words_of(file)):
            wrong.append(target)
    return wrong


def needed() -> set[str]:
    """All addresses that readers are sent to, and those that the code downloads from, without parts of addresses."""
    said = set().union(*(outside(words_of(path)) for path in TEXTS))
    coded = set().union(*(outside(path.read_text(encoding="utf-8")) for path in CODE))
    return said | {url for url in coded if "{" not in url and not url.endswith("/")}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_within_the_kit(path):
    assert not broken(path, words_of(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_row_of_the_register_that_is_cited_is_a_link(path):
    """In one form: [register, row 7](00_start_here.ipynb#The-register); homework's references link the word alone."""
    cited = re.findall(r"(.?)(?:register|flaws?),? (?:rows?|flaws?|numbers?) \d", without_fences(words_of(path)))
    assert set(cited) <= {"["} or path.stem == "00_start_here"


def test_a_broken_link_is_found():
    text = "## A heading\n[a](README.md) [b](#a-heading) [c](notebooks/00_start_here.ipynb) [d](https://a.org)"
    assert not broken(README, text)
    for target in ("readme.txt", "#no-heading", "notebooks/00_start_here.ipynb#no-heading", "../elsewhere.md"):
        assert broken(README, f"{text} [x]({target})") == [target]
    assert broken(README, '<img src="figures/none.png">') == ["figures/none.png"]


def test_every_outside_address_is_listed_and_none_else():
    listed = check_links.listed()
    assert len(set(listed)) == len(listed) and listed == sorted(listed)
    assert set(listed) == needed(), f"differences: {sorted(set(listed) ^ needed())}"


def test_an_address_is_found_in_text_and_code():
    text = "See <https://a.org/x>, [b](https://b.org/y?z=1#w) and `https://c.org/d`; not http://127.0.0.1:8888/lab."
    assert outside(text) == {"https://a.org/x", "https://b.org/y?z=1#w", "https://c.org/d"}


class Answers(BaseHTTPRequestHandler):
    """``/404`` answers with 404, and so on; ``/later`` fails once."""

    asked: list = []

    def do_GET(self):
        self.asked.append(self.path)
        late = self.path == "/later" and self.asked.count(self.path) == 1
        self.send_response(503 if late else int(self.path[1:]) if self.path[1:].isdigit() else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        Answers.asked.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_weekly_check_knows_dead_from_alive(site, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for path, alive in (("200", True), ("page", True), ("403", True), ("later", True), ("404", False), ("500", False)):
        (tmp_path / "links.txt").write_text(f"# a comment\n\n{site}/{path}  # another\n")
        assert check_links.main(tmp_path / "links.txt", 0) == int(not alive), path
        said = capsys.readouterr().out
        assert said.startswith("ok " if alive else f"status {path}") and f"{site}/{path}" in said
    assert Answers.asked.count("/404") == check_links.TRIES and Answers.asked.count("/200") == 1


def test_a_server_that_is_not_there_is_dead(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert "Error" in check_links.check("http://127.0.0.1:9/", 0)
