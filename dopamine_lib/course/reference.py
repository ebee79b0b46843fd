"""The reference: every public class and function of the library with its docstring, as pages in MyST Markdown.

Sources are parsed and never imported, so no optional package has to be there. Sphinx's autodoc and sphinx-autoapi take
over a minute for this library, mostly to look up each annotation among all names; these pages take seconds.
"""

import ast
import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

from dopamine_lib.course.material import LIBRARY

#: A line of a docstring that says what a parameter is: its name, two spaces or more, and words.
_PARAMETER = re.compile(r"(\S.*?) {2,}(\S.*)")
#: A name that is words and not code, as of a step in a package's overview.
_WORDS = re.compile(r"[a-z]+(-[a-z]+)?( \w+)+|\w+-\w+")
_MARKUP = re.compile(r"([\\`*_<>$~\[\]{}#|])")
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def write_reference(folder: Path) -> list[str]:
    """Write a page for each package of the library into ``folder``, which is made; returns their names, in order."""
    folder.mkdir(parents=True)
    written = []
    for package in sorted(path.parent for path in LIBRARY.rglob("__init__.py")):
        name = _module_name(package)
        modules = [package / "__init__.py", *(path for path in sorted(package.glob("*.py")) if path.stem != "__init__")]
        text = f"({name})=\n# {name}\n" + "".join(_module(path) for path in modules)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        written.append(name)
    return written


def as_markdown(docstring: str) -> str:
    """A docstring of the kit's as Markdown: parameters become a list, examples and indented lines code.

    >>> print(as_markdown("Half of x_i.\\n\\nx  (d,), any *size*\\nthe rest  words\\n\\n    x_i / 2"))
    Half of x\\_i.
    <BLANKLINE>
    - `x`: (d,), any \\*size\\*
    - the rest: words
    <BLANKLINE>
        x_i / 2
    """
    lines, kind = [], ""
    for line in [*cleandoc(docstring).splitlines(), ""]:
        before, parameter = kind, _PARAMETER.fullmatch(line)
        if not line:
            kind = ""
        elif line.startswith(">>> ") or kind == "example":
            kind = "example"
        elif line.startswith("    ") and kind != "parameter":
            kind = "code"
        elif parameter or (line.startswith(" ") and kind == "parameter"):
            kind = "parameter"
        else:
            kind = "text"
        if kind != before:
            lines += ["```"] * (before == "example") + [""] * bool(before) + ["```pycon"] * (kind == "example")
        if kind == "parameter" and not line.startswith(" "):
            mark = "" if "``" in parameter[1] or _WORDS.fullmatch(parameter[1]) else "`"
            lines.append(f"- {mark}{parameter[1]}{mark}: {_escaped(parameter[2])}")
        elif kind == "parameter":
            lines.append(f"  {_escaped(line.strip())}")
        elif line:
            lines.append(_escaped(line) if kind == "text" else line)
    return "\n".join(lines).strip("\n")


def _escaped(line: str) -> str:
    """A line in which nothing but what stands between double backticks is markup."""
    parts = line.split("``")
    return "``".join(part if at % 2 else _MARKUP.sub(r"\\\1", part) for at, part in enumerate(parts))


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts)


def _module(path: Path) -> str:
    """A module's part of its package's page; a package's own docstring opens the page."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name, opens = _module_name(path).removesuffix(".__init__"), path.stem == "__init__"
    text = f"\n({name})=\n## {name}\n" * (not opens) + f"\n{as_markdown(ast.get_docstring(tree) or '')}\n"
    for named, node in _public(tree.body):
        label = f"{name}.{named}" + "()" * (not isinstance(node, ast.ClassDef))
        level = "#" * (3 - opens + named.count("."))
        text += f"\n({label})=\n{level} {named}\n\n```python\n{_signature(node)}\n```\n\n"
        text += as_markdown(ast.get_docstring(node) or "") + "\n"
    return text


def _public(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, _Definition]]:
    """Public classes and functions in the order in which they stand, a class' methods after it."""
    for node in body:
        if isinstance(node, _Definition) and not node.name.startswith("_") and not _sets(node):
            yield within + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{within}{node.name}.")


def _signature(node: _Definition) -> str:
    """How it is called: a function's parameters; a class' bases, fields and constructor.

    >>> _signature(ast.parse("class A(B):\\n    x: int = 1\\n    def f(self): pass").body[0])
    'class A(B):\\n    x: int = 1'
    """
    if isinstance(node, ast.ClassDef):
        shown = [part for part in node.body if isinstance(part, ast.AnnAssign) and not _is_private(part)]
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                shown.append(_without_body(part))
        body = shown or [ast.Expr(ast.Constant(...))]
        kept = ast.ClassDef(node.name, node.bases, node.keywords, body, node.decorator_list)
    else:
        kept = _without_body(node)
    return ast.unparse(ast.fix_missing_locations(kept)).replace(":\n        ...", "").removesuffix(":\n    ...")


def _sets(node: _Definition) -> bool:
    """Whether it is a property's setter, which stands under the property's name."""
    return any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in node.decorator_list)


def _is_private(field: ast.AnnAssign) -> bool:
    return getattr(field.target, "id", "_").startswith("_")


def _without_body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    terms = {field: getattr(node, field) for field in node._fields}
    return type(node)(**terms | {"body": [ast.Expr(ast.Constant(...))]})
