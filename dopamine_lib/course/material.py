"""Chapters, homework and pictures: where they lie, and a folder of them to work in, ``dopamine course DIR``."""

import re
import shutil
from os import PathLike
from pathlib import Path

from dopamine_lib.data.transfer import new_folder
from dopamine_lib.errors import InputError

LIBRARY = Path(__file__).parents[1]
_IN_THE_WHEEL = LIBRARY / "kit"
#: Where README, notebooks and figures lie: beside the library in a checkout, inside it where a wheel was installed.
REPOSITORY = _IN_THE_WHEEL if _IN_THE_WHEEL.is_dir() else LIBRARY.parent
#: Notebooks with solutions and hidden tests, and the exam's answers.
SOLVED = "notebooks/homework/source"
#: What is no page, and belongs to a course all the same: the licence, and the program that its chapters tell to run.
_BESIDE = ("LICENSE", "CITATION.cff", "data_download.py")
_TARGET = re.compile(r"""(?:\]\(|(?:src|href)=\\?["'])([^)\s"'#\\]+)""")


def find_text(name: str) -> Path:
    """A file of the repository by its name there, such as ``figures/figure1.png``, wherever the kit is installed."""
    return LIBRARY / name.removeprefix("dopamine_lib/") if name.startswith("dopamine_lib/") else REPOSITORY / name


def write_course(out: str | PathLike, *, solutions: bool = False) -> list[Path]:
    """Copy chapters, students' homework, their pictures and every file that they link to into the folder ``out``.

    solutions  whether ``notebooks/homework/source`` comes along, which has the answers
    Returns the files written. Raises InputError if ``out`` is in use or cannot be made, or there are no notebooks.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name another, or empty it")
    texts = [*find_chapters(), *sorted((REPOSITORY / "notebooks").glob("*.md"))]
    for folder in ("notebooks/pages", "notebooks/homework", *([SOLVED] if solutions else [])):
        texts += sorted(path for path in (REPOSITORY / folder).iterdir() if path.is_file())
    names = [*_BESIDE, *(path.relative_to(REPOSITORY).as_posix() for path in texts)]
    for name in names:  # which grows: a page that is linked to has links of its own
        names += [link for link in _links(name) if link not in names and (solutions or not link.startswith(SOLVED))]
    try:
        with new_folder(out) as folder:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(find_text(name), folder / name)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another folder, or make room") from None
    return [out / name for name in names]


def find_chapters() -> list[Path]:
    """The chapters' notebooks, in order. Raises InputError where there are none."""
    found = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    if not found:
        raise InputError("no notebooks beside or in dopamine_lib; install the kit from its repository or its wheel")
    return found


def _links(name: str) -> list[str]:
    """The kit's own files that a page links to, by their names in the repository."""
    if not name.endswith((".md", ".ipynb")):
        return []
    home = Path(name).parent
    targets = [home / target for target in _TARGET.findall(find_text(name).read_text(encoding="utf-8"))]
    named = dict.fromkeys(_without_dots(target) for target in targets)
    return [name for name in named if find_text(name).is_file()]


def _without_dots(path: Path) -> str:
    """A relative path without ``..`` in it.

    >>> _without_dots(Path("notebooks/../figures/figure1.png"))
    'figures/figure1.png'
    """
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)
