"""The static site: every page is there, and a browser asks nobody for anything but its files."""

import os
import re
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest
from readme import NOTEBOOKS, PAGES, REPOSITORY, links, words_of

from dopamine_lib.course import material, site
from dopamine_lib.course.exercises import SOURCES
from dopamine_lib.course.homework import find_homework

#: Elements that make a browser fetch what they name; a link to read elsewhere (``a``) is no such element.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


class Fetches(HTMLParser):
    """What a page makes a browser fetch, where it lets a reader go, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.fetched, self.linked, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if named.get(FETCHED.get(tag)) and named.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(named[FETCHED[tag]])
        if tag == "a" and named.get("href"):
            self.linked.append(named["href"])

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def built(tmp_path_factory, installed):
    """The site, built by the installed wheel outside the checkout, homework included, in a process of its own.

    Sphinx changes the process it runs in. What a checkout gathers is looked at below, without Sphinx.
    """
    out = tmp_path_factory.mktemp("site") / "out"
    command = [sys.executable, installed / "bin" / "dopamine", "site", out]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    ran = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    return out, ran


def page_of(notebook: Path) -> str:
    return notebook.relative_to(REPOSITORY).with_suffix("").as_posix()


def pages(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*.html") if "_static" not in path.parts)


def stray(out: Path) -> list[str]:
    """What pages and style sheets fetch from elsewhere, or that is not there."""
    wrong = []
    for path in pages(out):
        fetched = Fetches(path).fetched
        fetched += re.findall(r"url\(([^)]+)\)", path.read_text(encoding="utf-8"))
        wrong += [f"{path.name}: {one}" for one in fetched if not within(path, one)]
    for path in out.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r"url\(([^)]+)\)", text) + re.findall(r"@import\s+[\"']([^\"']+)", text)
        wrong += [f"{path.name}: {one}" for one in fetched if not within(path, one.strip("\"'"))]
    return wrong


def within(page: Path, target: str) -> bool:
    """Whether a target is part of the page, or a file beside it."""
    if target.startswith(("data:", "#")):
        return True
    parts = urllib.parse.urlsplit(target)
    return not parts.scheme and not parts.netloc and (page.parent / urllib.parse.unquote(parts.path)).exists()


@pytest.mark.slow
def test_every_notebook_has_a_page_with_its_title_and_pictures(built):
    out, _ = built
    for notebook in NOTEBOOKS:
        page = Fetches(out / f"{page_of(notebook)}.html")
        title = re.search(r'"# ([^"\\]+)', notebook.read_text(encoding="utf-8")).group(1)
        assert title.strip() in page.text
        shown = notebook.read_text(encoding="utf-8").count('"image/png": "')
        assert sum(name.endswith(".png") for name in page.fetched) >= shown
    assert (out / "index.html").exists() and "Two commands" in Fetches(out / "index.html").text


@pytest.mark.slow
def test_every_picture_has_an_alternative_text(built):
    """The caption after it, in italics in the notebook; images of the text have one of their own."""
    out, _ = built
    for notebook in NOTEBOOKS:
        images = re.findall(r"<img [^>]*>", (out / f"{page_of(notebook)}.html").read_text(encoding="utf-8"))
        described = [re.search(r'alt="([^"]*)"', image) for image in images]
        assert all(found and len(found[1]) > 20 and ".png" not in found[1] for found in described), notebook.name


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(built):
    out, _ = built
    assert not stray(out)


@pytest.mark.parametrize(
    "fault",
    [
        '<script src="https://cdn.example.org/mathjax.js"></script>',
        '<link rel="stylesheet" href="//cdn.example.org/a.css">',
        '<img src="none.png">',
        "<style>body { background: url(https://example.org/a.png) }</style>",
    ],
)
def test_what_is_fetched_from_elsewhere_is_found(tmp_path, fault):
    (tmp_path / "page.html").write_text(f"<html><a href='https://a.org'>read</a>{fault}</html>")
    assert len(stray(tmp_path)) == 1


@pytest.mark.slow
def test_links_between_pages_lead_somewhere(built):
    out, _ = built
    for path in pages(out):
        for target in Fetches(path).linked:
            if not urllib.parse.urlsplit(target).scheme and not target.startswith("#"):
                assert within(path, target.partition("#")[0] or path.name), f"{path.name}: {target}"


@pytest.mark.slow
def test_there_is_search_and_a_dark_mode(built):
    out, _ = built
    index = (out / "searchindex.js").read_text(encoding="utf-8")
    assert "ciphertext" in index and all(f'"{page_of(path)}"' in index for path in [*NOTEBOOKS, *PAGES])
    assert '"clip_factors"' in index  # a heading of the reference
    assert "theme-toggle" in (out / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_formulas_are_set_by_the_mathjax_that_is_copied_along(built):
    out, _ = built
    page = out / "notebooks" / "01_differential_privacy.html"
    text = page.read_text(encoding="utf-8")
    assert 'class="math notranslate nohighlight"' in text
    (script,) = [name for name in Fetches(page).fetched if "MathJax.js" in name]
    folder = (page.parent / script.partition("?")[0]).parent
    (configuration,) = re.findall(r'"config": \["([\w-]+\.js)"\]', text)
    assert (folder / "config" / configuration).is_file()


@pytest.mark.slow
def test_homework_comes_without_answers(built):
    out, _ = built
    for source in find_homework(SOURCES):
        text = Fetches(out / "notebooks" / "homework" / f"{source.stem}.html").text
        assert "YOUR CODE HERE" in text and "BEGIN SOLUTION" not in text and "BEGIN HIDDEN" not in text
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix in (".html", ".js", ".txt", ".ipynb")]
    assert not any("### BEGIN HIDDEN TESTS" in path.read_text(encoding="utf-8", errors="ignore") for path in files)


@pytest.mark.slow
def test_sphinx_has_nothing_to_complain_about(built):
    _, ran = built
    assert not ran.stderr, ran.stderr


def test_every_file_that_a_page_links_to_comes_along(tmp_path):
    """Without Sphinx, so that a quick run finds what it would complain of."""
    site._gather(tmp_path / "source")
    for page in [*(tmp_path / "source").glob("**/*.md"), *(tmp_path / "source").rglob("*.ipynb")]:
        within_the_kit = {link.partition("#")[0] for link in links(words_of(page)) if "://" not in link}
        gone = [link for link in within_the_kit if link and not (page.parent / link).exists()]
        assert not [link for link in gone if not link.startswith(("mailto:", "attachment:", "data:"))], page.name


def test_refusals(tmp_path, refuses, monkeypatch):
    (tmp_path / "file").write_text("")
    with refuses("file is not an empty folder", "name another"):
        site.build_site(tmp_path / "file")
    with refuses("not an empty folder"):
        site.build_site(tmp_path)
    monkeypatch.setattr(material, "REPOSITORY", tmp_path)
    with refuses("no notebooks", "repository"):
        site.build_site(tmp_path / "out")
    monkeypatch.setattr(site, "find_spec", lambda name: None if name == "furo" else name)
    with refuses("furo", 'pip install "dopamine-kit[course]"'):
        site.build_site(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path, refuses, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(site, "_gather", lambda _: None)
    with refuses("out cannot be made", "name another folder"):
        site.build_site(tmp_path / "file" / "out")
