"""What a process gives up before it runs a student's code: files, other processes, the network, other packages, memory.

There are two walls. Linux (from 5.13 on) has Landlock: the kernel itself then lets nothing in the process, C code
included, read a file outside the folders of Python and NumPy, start a program or connect to anything. Python's audit
hook says what is refused and why, and is all there is on other systems: it cannot be taken off again, but it does not
see what C code does.
"""

import ctypes
import os
import struct
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # Landlock's system calls, the same on every processor
_NO_NEW_PRIVILEGES = 38
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
#: What code without files, processes and network does in an interpreter's eyes.
_HARMLESS = frozenset(
    "compile exec marshal.loads object.__getattr__ object.__setattr__ object.__delattr__ code.__new__ function.__new__ "
    "sys._getframe sys._getframemodulename sys.excepthook sys.unraisablehook builtins.id array.__new__ time.sleep "
    "_thread.start_new_thread _thread.start_joinable_thread".split()
)
#: What an answer may still import: mathematics, data structures and text, and what NumPy and SciPy load late.
_IMPORTS = frozenset(
    "numpy scipy math cmath random itertools functools collections fractions decimal statistics numbers operator heapq "
    "bisect array copy string re textwrap difflib pprint reprlib json struct base64 binascii hashlib hmac secrets zlib "
    "time datetime calendar enum dataclasses typing types abc contextlib warnings traceback linecache inspect ast dis "
    "gc weakref io os sys pathlib builtins timeit unicodedata encodings graphlib importlib zoneinfo unittest argparse "
    "gettext logging concurrent pydoc pkgutil fileinput __future__ _blake2 _bisect _datetime _decimal _hashlib _heapq "
    "_json _md5 _pydatetime _pydecimal _random _sha1 _sha2 _sha256 _sha3 _sha512 _statistics "
    "_strptime _struct _colorize".split()
)


def confine() -> bool:
    """Let the kernel confine this process to reading Python's and NumPy's own files; whether it can.

    Landlock binds a thread and those that it starts, so call this before there are others.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)

    def call(number: int, *arguments: int | bytes | None) -> int:
        return libc.syscall(number, *(ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments))

    version = call(_CREATE, None, 0, 1)
    if version < 1:
        return False
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # every right that this kernel knows of
    handled = struct.pack("=QQQ", files, 3 * (version >= 4), 3 * (version >= 6))  # TCP; signals and abstract sockets
    ruleset = call(_CREATE, handled, len(handled), 0)
    for path in (*_folders(), f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if os.path.isdir(path):
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call(_ADD, ruleset, 1, struct.pack("=Qi", _READ_FILE | _READ_FOLDER, folder), 0)
            os.close(folder)
    libc.prctl(_NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    confined = call(_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return confined


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


def _folders() -> tuple[str, ...]:
    """Python's own library, and the folders of NumPy and SciPy with their libraries."""
    packages = [str(Path(package.__file__).parent) for package in (np, scipy)]
    return sysconfig.get_path("stdlib"), *packages, *(f"{path}.libs" for path in packages)


def _guard() -> Callable[[str, tuple], None]:
    """The hook: one function without a closure, since an answer that catches its error sees its frame.

    Whatever it needs is in its defaults, which a frame shows as copies, and no method of an argument is called before
    its very type is known.
    """
    standard, *packages = (f"{path}/" for path in _folders())

    def guard(
        event: str,
        arguments: tuple,
        harmless: frozenset = _HARMLESS,
        imports: frozenset = _IMPORTS,
        standard: str = standard,
        packages: tuple = tuple(packages),
        writing: int = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        remedy: str = "write the answer yourself, with NumPy, SciPy and Python's own library",
        kind: type = type,
        text: type = str,
        wrong_file: type = PermissionError,
        wrong_import: type = ImportError,
        wrong: type = RuntimeError,
    ) -> None:
        if event in harmless:
            return
        if event not in ("import", "open", "os.listdir", "os.scandir"):
            raise wrong(f"homework is graded without {event}: {remedy}")
        name = arguments[0]
        if kind(name) is not text:
            raise wrong(f"homework is graded without {event} of what is no plain text: {remedy}")
        if event == "import":
            if name.partition(".")[0] not in imports:
                raise wrong_import(f"homework is graded without {name}: {remedy}")
            return
        own = name.startswith(standard) and "-packages/" not in name
        listed = name + "/"
        if "/.." in name or not (own or name.startswith(packages) or listed == standard or listed in packages):
            raise wrong_file(f"homework is graded without files and other packages: {remedy}")
        if event == "open" and arguments[2] & writing:
            raise wrong_file(f"homework is graded without writing files: {remedy}")

    return guard
