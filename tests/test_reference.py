"""The reference: every public class and function once, on its package's page, with what its docstring says."""

import ast
import html
import re
from collections import Counter

import mistune
import pytest
from test_docstrings import MODULES, name_of, public_definitions

from dopamine_lib.course import reference


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The text of each page, by its package's name."""
    folder = tmp_path_factory.mktemp("site") / "reference"
    names = reference.write_reference(folder)
    assert sorted(names) == sorted(path.stem for path in folder.iterdir())
    return {name: (folder / f"{name}.md").read_text(encoding="utf-8") for name in names}


def test_every_public_class_and_function_is_on_its_packages_page_once(pages):
    missing, there = (
        [],
        Counter(
            (name, label.removesuffix("()"))
            for name, text in pages.items()
            for label in re.findall(r"(?m)^\((.+)\)=$", text)
        ),
    )
    for path in MODULES:
        module = name_of(path)
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        defined = {name for name, _ in public_definitions(ast.parse(path.read_text(encoding="utf-8")).body)}
        wanted = {f"{module}.{name}" for name in defined if not name.endswith("__init__")} | {module}
        missing += [name for name in wanted if there[package, name] != 1]
    assert not missing
    assert len(there) > 1500 and set(there.values()) == {1}


def test_a_function_is_shown_with_its_types_and_its_example(pages):
    page = pages["dopamine_lib.privacy"]
    shown = page.partition("(dopamine_lib.privacy.dpsgd.clip_factors())=")[2].partition("\n(dopamine_lib")[0]
    assert "```python\ndef clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor\n```" in shown
    assert "```pycon\n>>> clip_factors(torch.tensor([0.5, 2.0, math.inf, math.nan]), max_grad_norm=1.0)" in shown
    assert re.search(r"\nclass Task:\n    threads: int \| None = None\n\n    def __init__\(self, net: .*\)\n```", page)


def test_no_word_of_a_docstring_is_lost_or_becomes_markup():
    """As Markdown of another make reads it: stars, dollars, brackets, bars, hashes and tables of parameters stay."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (said := ast.get_docstring(node)):
                page = mistune.html(reference.as_markdown(said))
                assert set(re.findall(r"<(\w+)", page)) <= {"p", "pre", "code", "ul", "ol", "li"}, (
                    f"{path.name}: {said}"
                )
                seen = html.unescape(re.sub(r"<[^>]+>", "", page))
                assert re.findall("[A-Za-z]+", seen) == re.findall("[A-Za-z]+", said), f"{path.name}: {said}"


@pytest.mark.parametrize(
    "said", ["a *b* c", "# a", "[a](b)", "a\n| b | c |\n|---|---|\n| d | e |", "<b>a</b>", "`a`", "a $b$ c"]
)
def test_what_looks_like_markup_is_escaped(said):
    page = mistune.create_markdown(plugins=["table", "math"])(reference.as_markdown(said))
    assert html.unescape(page) == f"<p>{said}</p>\n"
