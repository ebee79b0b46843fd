"""Builds the wheel: setuptools does, and puts what lies beside the library into it as ``dopamine_lib/kit``.

In a wheel there is no "beside", and chapters, homework and pictures must come along: ``dopamine course``, ``homework``
and ``site`` read them there. An editable install (``-e .``) reads them in the checkout, and gets no copies.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.command.build_py import build_py

#: Folders and files of the checkout's top level that the library reads or hands out.
FOLDERS = ("notebooks", "figures")
FILES = (
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "requirements.txt",
    "constraints.txt",
    "data_download.py",
    *(f".github/{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
)


def tracked() -> set[Path] | None:
    """What git tracks of this checkout; None where there is no git, as in an unpacked archive: all is the kit's."""
    if not Path(".git").exists():  # a folder, or a file in a worktree; one further up is another project's
        return None
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {Path(name) for name in listed.decode().split("\0") if name}


class BuildPy(build_py):
    """setuptools' own step that gathers the library, then the rest of the kit."""

    def kit(self) -> dict[str, str]:
        """Where each file goes in the folder that becomes the wheel, and where it comes from."""
        if self.editable_mode:
            return {}
        inside = [path for name in FOLDERS for path in Path(name).rglob("*") if path.is_file()]
        inside = [path for path in inside if ".ipynb_checkpoints" not in path.parts]
        known = tracked()
        inside = [path for path in inside if known is None or path in known]
        home = Path(self.build_lib, "dopamine_lib", "kit")
        return {str(home / path): str(path) for path in (*inside, *map(Path, FILES))}

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        """The library's files beside its modules: as of the kit, what is not tracked stays behind."""
        found, known = super().find_data_files(package, src_dir), tracked()
        return [path for path in found if known is None or Path(path) in known]

    def run(self) -> None:
        """Gather the library's modules and data, then the kit."""
        super().run()
        for target, source in self.kit().items():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Every file written; setuptools asks for them."""
        return [*super().get_outputs(include_bytecode), *self.kit()]
