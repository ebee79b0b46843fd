"""README, pages, chapters, students' homework and the reference as a static site, by Sphinx and MyST-NB.

Nothing is executed: the pages show the outputs that are stored in the notebooks. Nothing is fetched either, neither now
nor by a reader's browser: MathJax comes out of a package and is copied along, and sliders, which would need a kernel,
are left out.
"""

import io
import itertools
import re
import shutil
import tempfile
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import nbformat

from dopamine_lib.course.homework import students_copies
from dopamine_lib.course.material import LIBRARY, REPOSITORY, find_chapters
from dopamine_lib.course.reference import write_reference
from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.progress import progress_bar

#: Pages in the order in which the site lists them: for those who teach, then for those who use the kit.
TEACHING = tuple(f"notebooks/{name}" for name in ("INSTRUCTORS", "pages/grading", "NOTATION", "pages/register"))
PAGES = tuple(
    f"notebooks/pages/{name}"
    for name in "install commands reproducing hospitals release threat_model own_data own_network own_settings".split()
)
DEVELOPMENT = ("CHANGELOG", "CONTRIBUTING", "SECURITY")
#: What pages link to, copied unchanged.
_LINKED_FILES = ("LICENSE", "CITATION.cff", "requirements.txt", "constraints.txt", "data_download.py")
_TREE = "\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"
_CONFIGURATION = {
    "project": "Dopamine, the kit",
    "root_doc": "index",
    "extensions": ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.githubpages"],
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # else every page asks a server elsewhere for the sliders' code
    "nb_render_markdown_format": "myst",
    "myst_enable_extensions": ["dollarmath", "amsmath", "html_image"],
    "myst_heading_anchors": 3,
    # headings are named as in Jupyter and in GitHub's viewer of notebooks, so that links hold in all three
    "myst_heading_slug_func": "dopamine_lib.course.site.heading_anchor",
    "smartquotes": False,
    "html_theme": "furo",
    "html_title": "Dopamine, the kit",
    "html_static_path": ["_static"],
    "html_copy_source": False,
    "mathjax_path": "mathjax/MathJax.js",
    "mathjax2_config": {
        "config": ["TeX-AMS-MML_HTMLorMML-full.js"],
        "tex2jax": {"processClass": "math", "displayMath": [[r"\[", r"\]"]]},
        # the only fonts in the package
        "HTML-CSS": {"availableFonts": [], "imageFont": None, "preferredFont": None, "webFont": "STIX-Web"},
        "messageStyle": "none",
    },
}


def build_site(out: str | PathLike) -> list[str]:
    """Write the site into the folder ``out``, which must be empty or not there yet; ``out/index.html`` is its entry.

    Returns Sphinx's warnings, one line each. Raises InputError if ``out`` is in use or cannot be made, a package is not
    installed, or the kit has no notebooks.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name another, or empty it")
    for name in ("sphinx", "myst_nb", "furo", "jupyter_server_mathjax"):
        if find_spec(name) is None:
            raise not_installed(name)
    with tempfile.TemporaryDirectory(prefix="dopamine-site-") as folder:
        source = Path(folder).resolve() / "source"
        _gather(source)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out} cannot be made ({error.strerror}); name another folder") from None
        return _run_sphinx(source, out, Path(folder) / "doctrees")


def heading_anchor(title: str) -> str:
    """The name of a heading in a notebook, as it stands after the # of a link.

    >>> heading_anchor("Where it fails")
    'Where-it-fails'
    """
    return title.strip().replace(" ", "-")


def _gather(source: Path) -> None:
    """Copy everything that becomes a page, or that a page links to, into ``source``; the README is the first page."""
    chapters = find_chapters()
    (source / "notebooks").mkdir(parents=True)
    for chapter in chapters:
        notebook = without_sliders(nbformat.read(chapter, 4))
        _describe_pictures(notebook)
        nbformat.write(notebook, source / "notebooks" / chapter.name)
    (source / "notebooks" / "pages").mkdir()
    for name in (*TEACHING, *PAGES):
        text = (REPOSITORY / f"{name}.md").read_text(encoding="utf-8")
        (source / f"{name}.md").write_text(
            text.replace("../README.md", "../index.md").replace("../.github/", "../"), encoding="utf-8"
        )
    homework = students_copies(source / "notebooks" / "homework")
    for name in _LINKED_FILES:
        shutil.copyfile(REPOSITORY / name, source / name)
    shutil.copytree(REPOSITORY / "figures", source / "figures")
    shutil.copytree(LIBRARY, source / "dopamine_lib", ignore=shutil.ignore_patterns("__pycache__", "kit"))
    shutil.copytree(_mathjax(), source / "_static" / "mathjax")
    for name in DEVELOPMENT:  # these lie a folder higher than in the repository
        text = (REPOSITORY / ".github" / f"{name}.md").read_text(encoding="utf-8")
        (source / f"{name}.md").write_text(text.replace("](../", "]("), encoding="utf-8")
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").replace("(.github/", "(")
    text += _TREE.format(caption="Chapters", pages="\n".join(f"notebooks/{page.stem}" for page in chapters))
    text += _TREE.format(caption="Homework", pages="\n".join(f"notebooks/homework/{page.stem}" for page in homework))
    text += _TREE.format(caption="Teaching", pages="\n".join(TEACHING))
    text += _TREE.format(caption="Using the kit", pages="\n".join((*PAGES, "dopamine_lib/INTERFACES")))
    reference = write_reference(source / "reference")
    text += _TREE.format(caption="Reference", pages="\n".join(f"reference/{name}" for name in reference))
    text += _TREE.format(caption="Data", pages="dopamine_lib/data/heart_disease/README")
    text += _TREE.format(caption="Development", pages="\n".join(DEVELOPMENT))
    (source / "index.md").write_text(text, encoding="utf-8")


def without_sliders(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook, without widgets that would need a kernel; a prediction's text stays, of an explorer its picture."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None) is not None:
                if "text/markdown" not in output["data"]:
                    output["data"].clear()
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    return notebook


def _describe_pictures(notebook: nbformat.NotebookNode) -> None:
    """Give every picture, as alternative text, the text in italics after it, which says what it shows."""
    for cell, after in itertools.pairwise(notebook.cells):
        said = re.match(r"\*([^*\s].*?)\*(?!\*)", after.source, re.DOTALL)
        if cell.cell_type == "code" and said:
            cell.metadata["mystnb"] = {"image": {"alt": said[1]}}


def _mathjax() -> Path:
    """The folder of MathJax in the package that Jupyter's servers use."""
    import jupyter_server_mathjax

    return Path(jupyter_server_mathjax.__file__).parent / "static"


def _run_sphinx(source: Path, out: Path, doctrees: Path) -> list[str]:
    from sphinx.application import Sphinx

    warned = io.StringIO()
    app = Sphinx(source, None, out, doctrees, "html", _CONFIGURATION, status=None, warning=warned)
    with progress_bar(title="site", unit="page", total=len(app.project.discover())) as bar:
        for half_done in ("source-read", "doctree-resolved"):
            app.connect(half_done, lambda *_: bar.update(0.5))
        app.build()
    return [line.replace(str(source), "").strip() for line in warned.getvalue().splitlines() if line.strip()]
