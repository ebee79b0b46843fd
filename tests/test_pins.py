"""requirements.txt names what the kit imports, in ranges; constraints.txt pins all of it; both hold everywhere."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, requires

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from pins import CONSTRAINTS, REPOSITORY, REQUIREMENTS, lines, read_constraints, read_requirements
from readme import NOTEBOOKS, PAGES

REQUIRED, PINNED = read_requirements(REQUIREMENTS), read_constraints(CONSTRAINTS)
#: Imported only where it is installed: for a comparison, and in an environment of its own (the extra "flower").
OPTIONAL = {"crypten", "flwr", "jax", "spu"}


def imported(source: str) -> set[str]:
    """Top-level names of what a Python source imports; a cell's magic lines are not Python."""
    source = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            found.add(node.args[0].value.partition(".")[0])
    return found


def test_everything_imported_is_required():
    files = [*REPOSITORY.glob("dopamine_lib/**/*.py"), *REPOSITORY.glob("tests/*.py"), REPOSITORY / "data_download.py"]
    names = set().union(*(imported(path.read_text(encoding="utf-8")) for path in files))
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        names |= set().union(*(imported(cell.source) for cell in cells if cell.cell_type == "code"))
    own = {path.stem for path in REPOSITORY.glob("tests/*.py")} | {"dopamine_lib", "data_download", "google"}
    distributions = packages_distributions()
    of = {
        name: {canonicalize_name(one) for one in distributions.get(name, [name])}
        for name in names - own - OPTIONAL - set(sys.stdlib_module_names)
    }
    assert not {name: brings for name, brings in of.items() if not brings & REQUIRED.keys()}


def test_an_import_is_seen_where_it_stands():
    assert imported("%matplotlib inline\nimport a.b, c\n\ndef f():\n    from d.e import g\n") == {"a", "c", "d"}
    assert imported("pytest.importorskip('h.i')\nfrom . import j\nif x:\n    !ls\n") == {"h"}


def test_every_requirement_has_both_ends_and_its_pin_lies_between():
    for name, requirement in REQUIRED.items():
        operators = {one.operator for one in requirement.specifier}
        assert operators in ({">=", "<"}, {"=="}), f"{requirement}: give the oldest and the first that is too new"
        assert requirement.specifier.contains(PINNED[name]), f"{requirement} and constraints.txt: {PINNED[name]}"


def test_options_of_requirements():
    assert [line for line in lines(REQUIREMENTS) if line.startswith("-")] == ["-c constraints.txt", "-e ."]
    assert not any("/" in line or "@" in line for line in lines(REQUIREMENTS) + lines(CONSTRAINTS))


def test_everything_that_the_requirements_bring_along_is_pinned():
    """As installed here; another platform installs fewer packages, never others."""
    seen, waiting = set(), [(name, frozenset(one.extras)) for name, one in REQUIRED.items()]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert name in PINNED, f"constraints.txt does not pin {name}"
        try:
            needs = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # not on this platform, or left out by somebody who does without
            continue
        for need in needs:
            wanted = any(need.marker is None or need.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            if wanted:
                assert need.specifier.contains(PINNED.get(canonicalize_name(need.name), "0"), prereleases=True), (
                    f"{name} wants {need}, constraints.txt has {PINNED.get(canonicalize_name(need.name))}"
                )
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))
    assert len(seen) > 100


def test_every_pin_is_for_every_python_that_is_allowed():
    """Debian 12 has Python 3.11.2: a package that asks for 3.11.5 cannot be installed there, nor what needs it."""
    allowed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    pythons = [f"3.{minor}.0" for minor in range(30) if SpecifierSet(allowed).contains(f"3.{minor}.0")]
    assert len(pythons) > 1
    for name, pinned in PINNED.items():
        try:
            installed = metadata(name)
        except PackageNotFoundError:  # not on this platform
            continue
        if Version(installed["Version"]).public == pinned:
            wants = SpecifierSet(installed["Requires-Python"] or "")
            assert all(map(wants.contains, pythons)), f"{name} {pinned} is for Python {wants}: pin an older one"


def test_the_pins_hold_for_pytorch_without_cuda():
    """Its wheels are versions such as 2.14.1+cpu, which an exact pin allows unless it names another local part."""
    for name in ("torch", "torchvision"):
        assert Version(PINNED[name]).local is None
        assert SpecifierSet(f"=={PINNED[name]}").contains(f"{PINNED[name]}+cpu")
        assert REQUIRED[name].specifier.contains(f"{PINNED[name]}+cpu")


def test_versions_named_elsewhere_are_the_pinned_ones():
    files = [
        REQUIREMENTS,
        REPOSITORY / "README.md",
        *PAGES,
        REPOSITORY / "pyproject.toml",
        *REPOSITORY.glob("dopamine_lib/**/*.py"),
        *NOTEBOOKS,
    ]
    # these say how to install what the kit never needs
    files = [path for path in files if path.name not in ("crypten_peer.py", "spu_peer.py")]
    found = 0
    for path in files:
        for name, version in re.findall(r"\b([a-z][\w-]+)==(\d[\w.]*\w)", path.read_text(encoding="utf-8")):
            found += 1
            assert PINNED.get(canonicalize_name(name)) == version, f"{path.name}: {name}=={version}"
    assert found


def test_python_versions_agree():
    promised = SpecifierSet(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"])
    assert "3.11" in promised and "3.12" in promised and "3.10" not in promised and "3.13" not in promised
    assert (REPOSITORY / "binder" / "runtime.txt").read_text() == "python-3.11\n"


@pytest.mark.parametrize("line", ["torch>=2", "torch==2.*", "a==1\na==2", "torch"])
def test_a_loose_constraint_is_found(tmp_path, line):
    (tmp_path / "constraints.txt").write_text(line + "\n")
    with pytest.raises((AssertionError, ValueError)):
        read_constraints(tmp_path / "constraints.txt")
