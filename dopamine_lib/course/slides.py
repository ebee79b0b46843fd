"""Slides of every chapter, from its notebook as it is stored: ``python -m dopamine_lib slides OUT``.

Headings begin slides, and what is longer than a slide goes on below, one press of the down key away. Captions and long
code are folded; set-up cells, self-checks, solutions and references are left out. reveal.js and MathJax come out of
packages and are copied along, so slides need no network.
"""

import html
import re
import shutil
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dopamine_lib.course.material import find_chapters
from dopamine_lib.course.site import without_sliders
from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.progress import progress_bar

#: Lines that fit on a slide, a picture's worth of them, and the most of an output that is shown.
LINES, PICTURE, MOST_OUTPUT = 23, 12, 16
#: Code of more lines is folded.
SHORT_CODE = 10
#: Characters in a line of text.
WIDTH = 85
_TEMPLATE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<script src="mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full"></script>
<script type="text/x-mathjax-config">
MathJax.Hub.Config({tex2jax: {inlineMath: [["$", "$"]], displayMath: [["$$", "$$"]], processEscapes: true},
  "HTML-CSS": {availableFonts: [], imageFont: null, preferredFont: null, webFont: "STIX-Web"}, messageStyle: "none"});
</script>
{%- endblock -%}
{%- block html_head_css -%}
<style>
.reveal .slides section { max-height: 690px; overflow-y: auto; text-align: left; }
.reveal summary { cursor: pointer; font-size: 70%; color: #555; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; }
.reveal pre { width: 100%; box-shadow: none; }
:root { --jp-content-font-size1: 19px; --jp-code-font-size: 15px; --jp-cell-prompt-width: 0px; }
.jp-InputPrompt, .jp-OutputPrompt { display: none; }
</style>
{%- endblock -%}
{%- block footer_js -%}
<script src="reveal/dist/reveal.js"></script>
<script src="reveal/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({history: true, slideNumber: "c", plugins: [RevealNotes], width: 1100, height: 700, center: false});
Reveal.on("slidechanged", event => MathJax.Hub.Queue(["Rerender", MathJax.Hub, event.currentSlide]));
</script>
{%- endblock -%}"""


def build_slides(out: str | PathLike) -> list[Path]:
    """Write a page of slides for each chapter into the folder ``out``, which must be empty or not there yet.

    Returns the pages; ``out/index.html`` leads to them. Raises InputError if ``out`` is in use or cannot be made, a
    package is not installed, or the kit has no notebooks.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name another, or empty it")
    for name in ("nbconvert", "sphinx_revealjs", "jupyter_server_mathjax"):
        if find_spec(name) is None:
            raise not_installed(name)
    chapters = find_chapters()
    try:
        shutil.copytree(_folder_of("sphinx_revealjs", "_static/revealjs"), out / "reveal", ignore=_unused)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}); name another folder") from None
    shutil.copytree(_folder_of("jupyter_server_mathjax", "static"), out / "mathjax")
    pages = [_write(chapter, out) for chapter in progress_bar(chapters, title="slides", unit="chapter")]
    links = "".join(f'<li><a href="{page.name}">{html.escape(_title(page))}</a></li>' for page in pages)
    text = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Slides</title><h1>Slides</h1><ul>{links}</ul>'
    (out / "index.html").write_text(text + "</html>", encoding="utf-8")
    return pages


def _folder_of(package: str, within: str) -> Path:
    return Path(find_spec(package).origin).parent / within


def _unused(folder: str, names: list[str]) -> set[str]:
    """Of reveal.js: other plugins, and other themes, some of which fetch fonts from elsewhere."""
    keep = {"plugin": {"notes"}, "theme": {"white.css", "fonts"}}.get(Path(folder).name, set(names))
    return set(names) - keep


def _title(page: Path) -> str:
    """A chapter's number and name, from its file's."""
    number, _, name = page.stem.partition("_")
    return f"{int(number)}. {name.replace('_', ' ')}"


def _write(chapter: Path, out: Path) -> Path:
    from nbconvert import SlidesExporter

    exporter = SlidesExporter(raw_template=_TEMPLATE, reveal_url_prefix="reveal", reveal_theme="white")
    text, _ = exporter.from_notebook_node(as_slides(nbformat.read(chapter, 4)), {"metadata": {"name": chapter.stem}})
    page = out / f"{chapter.stem}.slides.html"
    page.write_text(text, encoding="utf-8")
    return page


def as_slides(notebook: NotebookNode) -> NotebookNode:
    """A copy of a chapter, cut into what fits on a slide, with nbconvert's marks of where slides begin.

    >>> cells = [nbformat.v4.new_markdown_cell("# Title\\n\\nWhy."), nbformat.v4.new_markdown_cell("So.\\n\\n## Next")]
    >>> [cell.metadata.slideshow.slide_type for cell in as_slides(nbformat.v4.new_notebook(cells=cells)).cells]
    ['slide', '-', '-', 'slide']
    """
    pieces = [piece for cell in without_sliders(notebook).cells for piece in _pieces(cell)]
    filled, kept = 0, []
    for piece in pieces:
        level = len(re.match(r"#{0,6}", piece.source)[0]) if piece.cell_type == "markdown" else 0
        if piece.source.startswith("## References"):
            break
        lines = _lines(piece)
        if level in (1, 2):
            kind, filled = "slide", lines
        elif level == 3 or filled + lines > LINES:
            kind, filled = "subslide", lines
        else:
            kind, filled = "-", filled + lines
        piece.metadata["slideshow"] = {"slide_type": kind}
        kept.append(piece)
    return nbformat.v4.new_notebook(cells=kept, metadata=notebook.metadata)


def _pieces(cell: NotebookNode) -> list[NotebookNode]:
    """A cell's parts: paragraphs of a text, captions folded; code, folded where long; nothing where it is left out."""
    if cell.cell_type == "markdown":
        return [nbformat.v4.new_markdown_cell(_folded(part)) for part in _paragraphs(cell.source)]
    hidden = {"hide-input", "remove-cell"} & set(cell.metadata.get("tags", ()))
    if "### BEGIN SOLUTION" in cell.source or (not cell.outputs and (hidden or "# self-check" in cell.source)):
        return []
    source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
    if not hidden and source.count("\n") < SHORT_CODE:
        return [nbformat.v4.new_code_cell(source, outputs=cell.outputs)]
    fold = f"<details><summary>code</summary>\n\n```python\n{source}\n```\n\n</details>"
    result = nbformat.v4.new_code_cell("", outputs=cell.outputs, metadata={"transient": {"remove_source": True}})
    return [nbformat.v4.new_markdown_cell(fold)] * (not hidden) + [result] * bool(cell.outputs)


def _paragraphs(source: str) -> list[str]:
    """A text cut at empty lines, but not within fences, folds and display formulas."""
    parts, open_ = [], False
    for part in source.split("\n\n"):
        if open_:
            parts[-1] += "\n\n" + part
        else:
            parts.append(part)
        whole = parts[-1]
        folds = whole.count("<details") - whole.count("</details>")
        open_ = bool(folds) or whole.count("```") % 2 == 1 or whole.count("$$") % 2 == 1
    return [part for part in parts if part.strip()]


def _folded(part: str) -> str:
    """A picture's caption, in italics, behind a word to click on."""
    if re.fullmatch(r"\*[^*\s].{20,}?\*", part.strip(), re.DOTALL):
        return f"<details><summary>what it shows</summary>\n\n{part}\n\n</details>"
    return part


def _lines(piece: NotebookNode) -> int:
    """About how many lines a piece takes on a slide."""
    if piece.cell_type == "markdown":
        open_text = re.sub(r"(?s)</summary>.*?</details>", "", piece.source)
        return 1 + sum(1 + len(line) // WIDTH for line in open_text.splitlines() if line.strip())
    shown = piece.source.count("\n") + 2 * bool(piece.source)
    for output in piece.outputs:
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            shown += PICTURE
        else:
            text = output.get("text") or data.get("text/markdown") or data.get("text/plain", "")
            shown += min(MOST_OUTPUT, text.count("\n") + 1)
    return shown
