"""Builds the wheel: setuptools does, and puts what lies beside the library into it as ``dopamine_lib/kit``.

In a wheel there is no "beside", and chapters, homework and pictures must come along: ``dopamine course``, ``homework``
and ``site`` read them there. An editable install (``-e .``) reads them in the checkout, and gets no copies.
"""

import shutil
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


class BuildPy(build_py):
    """setuptools' own step that gathers the library, then the rest of the kit."""

    def kit(self) -> dict[str, str]:
        """Where each file goes in the folder that becomes the wheel, and where it comes from."""
        if self.editable_mode:
            return {}
        inside = [path for name in FOLDERS for path in Path(name).rglob("*") if path.is_file()]
        inside = [path for path in inside if ".ipynb_checkpoints" not in path.parts]
        home = Path(self.build_lib, "dopamine_lib", "kit")
        return {str(home / path): str(path) for path in (*inside, *map(Path, FILES))}

    def run(self) -> None:
        """Gather the library's modules and data, then the kit."""
        super().run()
        for target, source in self.kit().items():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Every file written; setuptools asks for them."""
        return [*super().get_outputs(include_bytecode), *self.kit()]
