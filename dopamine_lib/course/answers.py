"""The process in which a student's code runs, and nothing else does: it holds no tests, no solutions and no marks.

    python -m dopamine_lib.course.answers DESCRIPTOR

The judge (``dopamine_lib.course.judge``) sends the cells of a notebook first and then one call after another. Before
the first cell this process gives up what an answer does not need: files, other processes, the network, packages beside
NumPy and SciPy, and all but some memory. Python's audit hooks cannot be taken off again, but they are no wall against
somebody who knows the interpreter's inside: grade strangers in a container.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from dopamine_lib.course.wire import pack, unpack
from dopamine_lib.pool import Parent

#: What code without files, processes and network does in an interpreter's eyes.
_HARMLESS = frozenset(
    "compile exec marshal.loads object.__getattr__ object.__setattr__ object.__delattr__ code.__new__ function.__new__ "
    "sys._getframe sys.excepthook sys.unraisablehook builtins.id array.__new__ time.sleep _thread.start_new_thread "
    "_thread.start_joinable_thread".split()
)
_LONGEST = 300  # characters of a message in feedback


def main(descriptor: str) -> None:
    """Run the judge's cells, then answer its calls until it ends."""
    parent = Parent(int(descriptor))
    first = parent.hear()
    os.environ.clear()  # an answer is shown in feedback: nothing of the instructor's may be in it
    os.chdir("/")
    lock(first["memory"])
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", RuntimeWarning)  # NumPy's: what divides by zero is no answer
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(first["cells"]):
        parent.say(cell=number)
        try:
            exec(compile(source, f"cell {number + 1}", "exec"), names)
        except BaseException as error:  # also SystemExit: the next cell may be an answer
            parent.say(cell=number, error=_said(error))
    parent.say(ready=True)
    while True:
        request = parent.hear()
        arguments = unpack(request["arguments"], lambda number: Remote(parent, number))
        try:
            if request["call"] not in names:
                raise NameError("there is no function of this name")
            value = pack(names[request["call"]](*arguments))
        except BaseException as error:
            parent.say(error=_said(error), refused=isinstance(error, ValueError))
            continue
        after = [_plain(argument) for argument in arguments]
        same = [one is None or one == other for one, other in zip(after, request["arguments"], strict=True)]
        parent.say(value=value, changed=[None if kept else [one] for kept, one in zip(same, after, strict=True)])


class Remote:
    """A function or object that stays with the judge: calling it, or a method of it, asks there."""

    def __init__(self, parent: Parent, number: int, method: str = ""):
        self._parent, self._number, self._method = parent, number, method

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the judge's function gives."""
        self._parent.say(ask=self._number, method=self._method, arguments=pack(list(arguments)), named=pack(named))
        answer = self._parent.hear()
        if "error" in answer:
            raise TypeError(answer["error"])
        return unpack(answer["value"])

    def __getattr__(self, name: str) -> "Remote":
        return Remote(self._parent, self._number, name)


def lock(memory: int) -> None:
    """Give up files, processes, network, other packages, and memory beyond ``memory`` bytes, for good."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows
        pass
    for module, name in (("_posixsubprocess", "fork_exec"), ("subprocess", "_fork_exec")):  # which no hook hears of
        if module in sys.modules:
            setattr(sys.modules[module], name, None)
    sys.addaudithook(_guard())


def _guard() -> Callable[[str, tuple], None]:
    """The hook. It keeps what it needs to itself, and uses no function that another name could be put upon."""
    standard = f"{Path(os.__file__).parent}/"
    packages = tuple(f"{Path(package.__file__).parent}/" for package in (np, scipy))
    packages += tuple(f"{path[:-1]}.libs/" for path in packages)
    allowed = frozenset({*sys.stdlib_module_names, "numpy", "scipy"})
    harmless, writing = _HARMLESS, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    remedy = "write the answer yourself, with NumPy, SciPy and Python's own library"
    wrong_file, wrong_import, wrong = PermissionError, ImportError, RuntimeError

    def may_read(path: object) -> bool:
        if path.__class__ is not str or "/.." in path:
            return False
        inside = path.startswith(standard) and "-packages/" not in path
        return inside or path.startswith(packages) or f"{path}/" in packages or f"{path}/" == standard

    def guard(event: str, arguments: tuple) -> None:
        if event in harmless:
            return
        if event == "import":
            if arguments[0].partition(".")[0] not in allowed:
                raise wrong_import(f"homework is graded without {arguments[0]}: {remedy}")
        elif event == "open":
            if not may_read(arguments[0]) or arguments[2] & writing:
                raise wrong_file(f"homework is graded without files and other packages: {remedy}")
        elif event in ("os.listdir", "os.scandir"):
            if not may_read(arguments[0]):
                raise wrong_file(f"homework is graded without folders: {remedy}")
        else:
            raise wrong(f"homework is graded without {event}: {remedy}")

    return guard


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_LONGEST]
    except BaseException:  # an exception of the student's own, whose text is an error
        return type(error).__name__


def _plain(argument: Any) -> Any:
    try:
        return pack(argument)
    except TypeError:  # one of the judge's objects
        return None


if __name__ == "__main__":
    main(sys.argv[1])
