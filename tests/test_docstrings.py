"""Docstrings: their examples run, and every public function, method and class has one, and types in its signature."""

import ast
import doctest
import importlib
import inspect
from operator import attrgetter
from pathlib import Path

import pytest

import dopamine_lib

LIBRARY = Path(dopamine_lib.__file__).parent
MODULES = sorted(LIBRARY.rglob("*.py"))

NO_DOCSTRING = "a docstring"


def name_of(path: Path) -> str:
    """The module's name, such as ``dopamine_lib.data.hospitals``."""
    return ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")


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


def is_compiled(decorator: ast.expr) -> bool:
    """Whether it is ``@njit(void(...))``, which has the types that numba compiles for."""
    return isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "njit" and bool(decorator.args)


def what_is_missing(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> list[str]:
    """What a definition lacks of a docstring and of types."""
    missing = [] if ast.get_docstring(node) or node.name == "__init__" else [NO_DOCSTRING]
    if isinstance(node, ast.ClassDef) or any(is_compiled(decorator) for decorator in node.decorator_list):
        return missing
    given = node.args
    parameters = given.posonlyargs + given.args
    if method and not any(getattr(decorator, "id", "") == "staticmethod" for decorator in node.decorator_list):
        parameters = parameters[1:]  # self or cls
    parameters = [*parameters, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    missing += [f"the type of {parameter.arg}" for parameter in parameters if parameter.annotation is None]
    return missing + ["the type it returns"] * (node.returns is None and node.name != "__init__")


def inherits_docstring(path: Path, name: str) -> bool:
    """Whether a method's docstring is that of the base class whose method it overrides."""
    try:
        return "." in name and bool(inspect.getdoc(attrgetter(name)(importlib.import_module(name_of(path)))))
    except ModuleNotFoundError:  # an optional package
        return False


def lacking(path: Path) -> list[str]:
    """What a module's public definitions lack, one entry per definition."""
    found = []
    for name, node in public_definitions(ast.parse(path.read_text()).body):
        missing = what_is_missing(node, method="." in name)
        if NO_DOCSTRING in missing and inherits_docstring(path, name):
            missing.remove(NO_DOCSTRING)
        found += [f"{name}: {', '.join(missing)}"] * bool(missing)
    return found


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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_definitions_have_a_docstring_and_types(path):
    assert not lacking(path), f"{name_of(path)} lacks: " + "; ".join(lacking(path))
