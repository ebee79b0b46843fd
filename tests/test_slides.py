"""Slides: every chapter's, none fuller than it can be, nothing given away, and nothing fetched from elsewhere."""

import subprocess
import sys

import nbformat
import pytest
from readme import NOTEBOOKS, REPOSITORY
from test_site import pages, stray

from dopamine_lib.course import material, slides

CHAPTERS = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]
V4 = nbformat.v4


def cut(*cells) -> list[tuple[str, str]]:
    """Kind and source of each piece of a chapter's slides."""
    made = slides.as_slides(V4.new_notebook(cells=list(cells)))
    return [(cell.metadata.slideshow.slide_type, cell.source) for cell in made.cells]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapters_slides(path):
    chapter = nbformat.read(path, 4)
    headings = sum(
        line.startswith(("# ", "## ")) and line != "## References"
        for cell in chapter.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
    )
    made = slides.as_slides(chapter)
    nbformat.validate(made)
    kinds = [cell.metadata.slideshow.slide_type for cell in made.cells]
    assert kinds[0] == "slide" and kinds.count("slide") == headings
    on_slide: list[list] = []
    for kind, cell in zip(kinds, made.cells, strict=True):
        if kind == "-":
            on_slide[-1].append(cell)
        else:
            on_slide.append([cell])
    for cells in on_slide:
        assert len(cells) == 1 or sum(map(slides._lines, cells)) <= slides.LINES
    text = "".join(cell.source for cell in made.cells)
    assert "\n### BEGIN SOLUTION\n" not in text and "google.colab" not in text and "## References" not in text
    unsolved = [cell for cell in chapter.cells if "### BEGIN SOLUTION\n" not in cell.source]
    assert pictures(made.cells) == pictures(unsolved)


def pictures(cells) -> list[str]:
    shown = [output.get("data", {}).get("image/png") for cell in cells for output in cell.get("outputs", ())]
    return [picture for picture in shown if picture]


def test_what_is_folded_and_what_is_left_out():
    long_code = "\n".join(f"x = {i}" for i in range(12))
    printed = [V4.new_output("stream", name="stdout", text="1\n")]
    got = cut(
        V4.new_markdown_cell("# Title\n\n```\na\n\nb\n```\n\n<details>\n\nc\n\n</details>"),
        V4.new_code_cell("import math", metadata={"tags": ["hide-input"]}),
        V4.new_code_cell("# self-check\nassert 1"),
        V4.new_code_cell("### BEGIN SOLUTION\nx = 1\n### END SOLUTION", outputs=printed),
        V4.new_code_cell(long_code, outputs=printed),
        V4.new_markdown_cell("*A curve that falls from left to right.*\n\n### Below\n\nMore."),
        V4.new_markdown_cell("## References\n\n- A book."),
    )
    assert [kind for kind, _ in got] == ["slide", "-", "-", "-", "-", "-", "subslide", "-"]
    assert got[1][1] == "```\na\n\nb\n```" and got[2][1].startswith("<details>")
    assert "<summary>code</summary>" in got[3][1] and got[4][1] == ""
    assert "<summary>what it shows</summary>" in got[5][1] and got[6][1] == "### Below"


def test_widgets_are_left_out_and_a_predictions_text_stays():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"}
    outputs = [V4.new_output("display_data", data=dict(view)) for _ in range(2)]
    outputs[1].data["text/markdown"] = "**Predict.** How much?"
    made = slides.as_slides(V4.new_notebook(cells=[V4.new_code_cell("show()", outputs=outputs)]))
    (left,) = made.cells[0].outputs
    assert set(left.data) == {"text/plain", "text/markdown"}


@pytest.mark.slow
def test_slides_need_no_network(tmp_path):
    out = tmp_path / "slides"
    ran = subprocess.run([sys.executable, "-m", "dopamine_lib", "slides", out], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    made = sorted(path.name for path in out.glob("*.slides.html"))
    assert made == [f"{path.stem}.slides.html" for path in CHAPTERS]
    for page in made:
        text = (out / page).read_text(encoding="utf-8")
        assert "reveal/dist/reveal.js" in text and text.count("<section") > 10 and "unpkg" not in text
        assert page in (out / "index.html").read_text(encoding="utf-8")
    assert len(pages(out)) > len(made) and not stray(out)


def test_refusals(tmp_path, refuses, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with refuses("file is not an empty folder", "name another"):
        slides.build_slides(tmp_path / "file")
    with refuses("out cannot be made", "name another folder"):
        slides.build_slides(tmp_path / "file" / "out")
    monkeypatch.setattr(slides, "find_spec", lambda name: None if name == "sphinx_revealjs" else name)
    with refuses("sphinx_revealjs", 'pip install "dopamine-kit[course]"'):
        slides.build_slides(tmp_path / "out")
    monkeypatch.setattr(slides, "find_spec", lambda name: name)
    monkeypatch.setattr(material, "REPOSITORY", tmp_path)
    with refuses("no notebooks", "repository"):
        slides.build_slides(tmp_path / "out")
    assert not (tmp_path / "out").exists() and REPOSITORY.exists()
