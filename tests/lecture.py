"""What a chapter asks of a reader: cells, words, lines of code and minutes, each by a stated rule.

Counted is what the page shows: folded cells (set-up, plots, Colab's) are not, nor are References and folded answers.
``python tests/lecture.py`` writes the minutes to read and to study into the chapters' heads and the README's table.
"""

import ast
import re
import sys
from pathlib import Path

import nbformat

REPOSITORY = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
#: A minute reads this many words of text, or lines of code; an exercise and a question take these minutes.
WORDS, LINES, EXERCISE, QUESTION = 120, 12, 15, 2
_TIMES = re.compile(r"To read: (\d+) minutes; to study, with exercises and questions: (\d+) minutes\.")


def folded(cell) -> bool:
    """Whether a reader sees a cell's input only after asking for it."""
    return bool({"hide-input", "hide-cell", "remove-cell"} & set(cell.metadata.get("tags", [])))


def shown(notebook) -> list:
    return [cell for cell in notebook.cells if not folded(cell)]


def words(notebook) -> int:
    """Words of running text: a formula, a link or a number is one; fenced code, answers and References are none."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"^```.*?^```|<details>.*?</details>", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.split(r"^## References", text, flags=re.MULTILINE)[0]
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", " formula ", text, flags=re.DOTALL)
    return len(re.findall(r"\w[\w'’.,-]*", re.sub(r"\]\([^)]*\)|<[^>]*>", " ", text)))


def lines(cell) -> int:
    return len(cell.source.splitlines())


def first_imports(notebook) -> int:
    """Import statements in the cells before the first code that is shown."""
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and "google.colab" not in cell.source:
            if not folded(cell):
                return count
            source = re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE)
            count += sum(isinstance(line, (ast.Import, ast.ImportFrom)) for line in ast.parse(source).body)
    return count


def minutes(notebook) -> tuple[int, int]:
    """Minutes to read, and to study: with the exercises and questions; both in steps of five."""
    code = sum(lines(cell) for cell in shown(notebook) if cell.cell_type == "code")
    reading = words(notebook) / WORDS + code / LINES
    exercises = sum("### BEGIN SOLUTION" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    questions = sum(len(re.findall(r"^\*\*Question \d", cell.source, re.MULTILINE)) for cell in notebook.cells)
    return tuple(5 * round(time / 5) for time in (reading, reading + EXERCISE * exercises + QUESTION * questions))


def stated(text: str) -> tuple[int, ...]:
    """The minutes that a head states, () where it states none."""
    return tuple(map(int, found.groups())) if (found := _TIMES.search(text)) else ()


def main() -> int:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for path in CHAPTERS:
        notebook = nbformat.read(path, 4)
        read, study = minutes(notebook)
        said = f"To read: {read} minutes; to study, with exercises and questions: {study} minutes."
        source = path.read_text(encoding="utf-8")
        path.write_text(_TIMES.sub(said, source, count=1), encoding="utf-8")
        row = rf"(\| \[`{path.stem}`\][^\n|]*\| [^\n|]* \|) \d+ \| \d+ \|"
        readme = re.sub(row, rf"\1 {read} | {study} |", readme)
        print(f"{path.stem:28} {len(shown(notebook)):3} cells {words(notebook):5} words {read:4} {study:4} minutes")
    (REPOSITORY / "README.md").write_text(readme, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
