"""Docstrings: their examples run, and every public function, method and class has one, and types in its signature."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import dopamine_lib

LIBRARY = Path(dopamine_lib.__file__).parent
MODULES = sorted(LIBRARY.rglob("*.py"))
#: Rooms and root modules that are not clean yet. This only shrinks.
UNFINISHED = (
    "federation",
    "inference",
)


def name_of(path: Path) -> str:
    """The module's name, such as ``dopamine_lib.data.hospitals``."""
    return ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")


def room_of(path: Path) -> str:
    """A package of the library, or a module of its root."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def public_definitions(body: list[ast.stmt], within: str = ""):
    """(name, node) of every public class, function and method; a constructor counts as public."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") and node.name != "__init__":
            continue
        yield within + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, f"{within}{node.name}.")


def what_is_missing(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> list[str]:
    """What a definition lacks of a docstring and of types."""
    missing = [] if ast.get_docstring(node) or node.name == "__init__" else ["a docstring"]
    if isinstance(node, ast.ClassDef):
        return missing
    given = node.args
    parameters = given.posonlyargs + given.args
    if method and not any(getattr(decorator, "id", "") == "staticmethod" for decorator in node.decorator_list):
        parameters = parameters[1:]  # self or cls
    parameters = [*parameters, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    missing += [f"the type of {parameter.arg}" for parameter in parameters if parameter.annotation is None]
    return missing + ["the type it returns"] * (node.returns is None and node.name != "__init__")


@pytest.mark.parametrize("path", [path for path in MODULES if ">>> " in path.read_text()], ids=name_of)
def test_examples_in_docstrings_hold(path):
    try:
        module = importlib.import_module(name_of(path))
    except ModuleNotFoundError as error:
        if error.name.startswith("dopamine_lib"):
            raise
        pytest.skip(f"needs the optional package {error.name}")
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) not in UNFINISHED], ids=name_of)
def test_public_definitions_have_a_docstring_and_types(path):
    lacking = [
        f"{name}: {', '.join(missing)}"
        for name, node in public_definitions(ast.parse(path.read_text()).body)
        if (missing := what_is_missing(node, method="." in name))
    ]
    assert not lacking, f"{name_of(path)} lacks: " + "; ".join(lacking)
