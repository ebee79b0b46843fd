"""The structure of the library, read from its own imports: they run downward only, with no circles and few floors.

A room is a package of the library or a module of its root. A room's floor is one more than the highest floor among
the rooms that it imports; the rooms on the lowest floor import none.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dopamine_lib

LIBRARY = Path(dopamine_lib.__file__).parent
FLOORS, MODULES_IN_THE_ROOT = 8, 8


def name_of(path: Path) -> str:
    """A module's name below the library, such as ``data.hospitals``; a package's is its folder's."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): path for path in LIBRARY.rglob("*.py") if path.parent != LIBRARY or path.stem != "__init__"}


def without_type_checking(node: ast.AST):
    """All nodes below one, except what only a type checker runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from without_type_checking(child)


def imports(path: Path) -> set[str]:
    """Modules of the library that a file imports, also inside its functions."""
    found = set()
    for node in without_type_checking(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: the library's imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    # ``from dopamine_lib.data import load`` names a function of the package, ``… import hospitals`` a module
    ours = {name.removeprefix("dopamine_lib.") for name in found if name.startswith("dopamine_lib.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours} & set(MODULES)


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {name.partition(".")[0]: set() for name in graph}
    for name, imported in graph.items():
        room = name.partition(".")[0]
        found[room] |= {other.partition(".")[0] for other in imported} - {room}
    return found


def order(graph: dict[str, set[str]]) -> list[str]:
    """What imports nothing first; fails with the circle where there is one."""
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("a circle of imports: " + " imports ".join(reversed(error.args[1])))


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room; fails with the circle where there is one."""
    floor: dict[str, int] = {}
    for room in order(graph):
        floor[room] = 1 + max((floor[lower] for lower in graph[room]), default=0)
    return floor


IMPORTS = {name: imports(path) - {name} for name, path in MODULES.items()}


def test_no_file_imports_itself_through_others():
    order(IMPORTS)


def test_rooms_import_downward_only_and_on_few_floors():
    floor = floors(rooms(IMPORTS))
    assert max(floor.values()) <= FLOORS, floor


def test_nothing_imports_the_command_line():
    assert not [name for name, imported in IMPORTS.items() if "__main__" in imported]


def test_few_modules_in_the_root():
    # beside __init__
    assert (
        len([name for name in MODULES if "." not in name and MODULES[name].stem != "__init__"]) <= MODULES_IN_THE_ROOT
    )


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not(tmp_path):
    (tmp_path / "new.py").write_text(
        "from typing import TYPE_CHECKING\n\n"
        "if TYPE_CHECKING:\n    from dopamine_lib.report.text import plain\n\n\n"
        "def f():\n    from dopamine_lib.data import hospitals, load\n"
    )
    assert imports(tmp_path / "new.py") == {"data", "data.hospitals"}


def test_a_circle_is_found():
    with pytest.raises(pytest.fail.Exception, match="imports"):
        floors({"federation": {"reproduction"}, "reproduction": {"federation"}})
