"""Reads the README, its pages, CONTRIBUTING and the notebooks: their commands, links and headings."""

import re
import shlex
import urllib.parse
from pathlib import Path

import nbformat

REPOSITORY = Path(__file__).resolve().parent.parent
README, CONTRIBUTING = REPOSITORY / "README.md", REPOSITORY / ".github" / "CONTRIBUTING.md"
CHANGELOG, SECURITY = (REPOSITORY / ".github" / f"{name}.md" for name in ("CHANGELOG", "SECURITY"))
INTERFACES = REPOSITORY / "dopamine_lib" / "INTERFACES.md"
#: What the README leads to, such as ``notebooks/pages/commands.md``; for instructors, and the notation.
PAGES = sorted([*REPOSITORY.glob("notebooks/*.md"), *REPOSITORY.glob("notebooks/pages/*.md")])
NOTEBOOKS = sorted([*REPOSITORY.glob("notebooks/*.ipynb"), *REPOSITORY.glob("notebooks/homework/*.ipynb")])
#: Programs whose commands a reader may be told to type, and shell words that need no test.
PROGRAMS = (
    "python",
    "dopamine",
    "pip",
    "pytest",
    "ruff",
    "jupyter",
    "nbgrader",
    "mpiexec",
    "bash",
    "git",
    "apt-get",
    "docker",
    "flwr",
    "flower-superlink",
    "flower-supernode",
    "ssh-keygen",
)
SHELL = ("cd", "mkdir", "cp", ".", "source", "export")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:href|src)=\"([^\"]+)\"")


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def shell_lines(text: str) -> list[str]:
    """The lines of code blocks that are typed into a shell: fenced (``bash``, ``sh``, no name) and indented ones.

    A continued line is one; a comment, and whatever follows two spaces, is left out.
    """
    lines = [line for name, block in _FENCE.findall(text) if name in ("", "bash", "sh") for line in block.splitlines()]
    lines += [line for line in without_fences(text).splitlines() if re.match(r" {4}\S| {8,}[\[-]", line)]
    joined = []
    for line in lines:
        if joined and (joined[-1].endswith("\\") or re.match(r"\s+[\[-]", line)):
            joined[-1] = joined[-1].removesuffix("\\").rstrip() + " " + line.strip()
        elif line.strip() and not line.strip().startswith("#"):
            joined.append(line.strip())
    return [re.split(r" {2,}|\s#\s", line)[0].replace("…", "...") for line in joined]


def split_words(command: str) -> list[str]:
    """The words of a command or of a synopsis, without variables set in front of it."""
    synopsis = re.search(r"[\[|]", command) and not command.startswith("pip ")  # whose extras stand in brackets
    words = command.split() if synopsis else shlex.split(command)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def commands(text: str) -> list[list[str]]:
    """Every command that a text tells its reader to type, in code blocks and between backticks, as words.

    Between backticks, a command of the kit without any option is only named: it comes with ``...``.
    """
    inline = [quoted.replace("…", "...") for quoted in re.findall(r"`([^`\n]+)`", without_fences(text))]
    inline = [line for line in inline if line == "pytest" or line.partition(" ")[0] in PROGRAMS and " " in line]
    inline = [
        f"{line} ..." if re.fullmatch(r"(python -m dopamine_lib|dopamine) [a-z]+", line) else line for line in inline
    ]
    parts = [part for line in shell_lines(text) + inline for part in line.split(" && ")]
    return [words for words in map(split_words, parts) if words and words[0] not in SHELL]


def links(text: str) -> list[str]:
    """The targets of all links and images, without those in code."""
    text = re.sub(r"`[^`\n]*`", "", without_fences(text))
    return [urllib.parse.unquote(one or other) for one, other in _LINK.findall(text)]


def outside(text: str) -> set[str]:
    """Every address of another site, in links and in plain text, code too."""
    found = re.findall(r"https?://[^\s<>\"'`\\)\]]+", text)
    return {one.rstrip(".,;:") for one in found if not re.match(r"https?://(127\.0\.0\.1|localhost)\b", one)}


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text's headings: GitHub's (lower case) and Jupyter's (as written)."""
    names = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_fences(text), re.MULTILINE):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
        names.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
        names.add(heading.replace(" ", "-"))
    return names


def words_of(path: Path) -> str:
    """All that a reader reads: a notebook's Markdown cells and the Markdown among its outputs; else the file."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    texts = []
    for cell in nbformat.read(path, 4).cells:
        texts += [cell.source] if cell.cell_type == "markdown" else []
        shown = [output.get("data", {}) for output in cell.get("outputs", [])]
        texts += [data["text/markdown"] for data in shown if "text/markdown" in data]
    return "\n\n".join(texts)
