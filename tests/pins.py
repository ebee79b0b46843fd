"""Reading requirements.txt, constraints.txt and the files beside them."""

from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS, CONSTRAINTS = REPOSITORY / "requirements.txt", REPOSITORY / "constraints.txt"
BINDER = REPOSITORY / "binder" / "requirements.txt"


def lines(path: Path) -> list[str]:
    """The lines that pip reads, without comments."""
    texts = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [text for text in texts if text]


def read_requirements(path: Path) -> dict[str, Requirement]:
    """Requirements by canonical name; options such as ``-e .`` are not requirements."""
    found = [Requirement(line) for line in lines(path) if not line.startswith("-")]
    named = {canonicalize_name(one.name): one for one in found}
    assert len(named) == len(found), f"{path.name} names a package twice"
    return named


def read_constraints(path: Path) -> dict[str, str]:
    """The version of each package, by canonical name; each is pinned exactly."""
    versions = {}
    for name, requirement in read_requirements(path).items():
        (only,) = requirement.specifier
        assert only.operator == "==" and "*" not in only.version, f"{path.name}: {requirement} is not an exact version"
        versions[name] = only.version
    return versions
