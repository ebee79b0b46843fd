"""This machine: how its cores, memory and terminal are used, and a check of what it has for the kit.

The check covers versions, cores, memory, data and weights, and says what each missing piece means. It only looks:
nothing is imported, downloaded or written, so it takes milliseconds.
"""

import codecs
import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from dopamine_lib.errors import InputError
from dopamine_lib.files import EMBEDDED, IMAGENET_FILE, MARKERS, atomic_path

if TYPE_CHECKING:
    import torch

#: Where training can take place.
DEVICES = ("auto", "cpu", "cuda")
#: Packages that a chapter or command needs, and what is lost without one.
PACKAGES = {
    "numpy": "nothing works; pip install -r requirements.txt",
    "torch": "no training: chapters 4 to 10",
    "torchvision": "no SqueezeNet: chapters 4 to 10",
    "opacus": "no RDP or PRV accountant: chapters 2, 4 and 8 to 10",
    "tenseal": 'no encryption: chapters 3 and 5; pip install "dopamine-kit[encryption]"',
    "syft": 'optional: chapter 6 leaves out its section on syft; pip install "dopamine-kit[inference]"',
    "numba": "optional: training of heads and private inference are several times slower",
    "mpi4py": 'optional: no hospitals as processes over MPI in chapter 5; pip install "dopamine-kit[mpi]"',
    "grpcio": 'optional: no hospitals that dial a server; pip install "dopamine-kit[grpc]"',
    "matplotlib": "no pictures",
    "ipywidgets": 'no sliders; the plain functions below them still draw; pip install "dopamine-kit[inference]"',
    "voila": 'optional: no patient\'s page outside JupyterLab; pip install "dopamine-kit[inference]"',
    "jupyterlab": 'no place to open the notebooks; pip install "dopamine-kit[course]"',
    "nbval": "optional: without it pytest cannot run the notebooks",
    "nbgrader": 'optional: without it no students\' copies of the homework; pip install "dopamine-kit[course]"',
}
GB = 2**30  # what everybody calls a gigabyte of memory
#: Where Linux says what a container may use.
CGROUP = Path("/sys/fs/cgroup")
#: What a terminal that has no such letters shows in their place.
SPELT = {"±": "+-", "…": "...", "×": "x", "–": "-", "—": "-"}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """How many processor cores this process may use; a container may have a share of them (Docker's ``--cpus``)."""
    count = _allowed_cores()
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # Linux, cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            words = " ".join((CGROUP / name).read_text(encoding="utf-8") for name in files).split()
            quota, period = map(int, words)
            if quota > 0:
                count = min(count, -(-quota // period))
    return count


def keep_to_cores() -> None:
    """Have libraries start no more threads than a container has cores; for the beginning of a program.

    They count the machine's, and 64 threads that take turns on two cores wait most of the time.
    """
    if cores() < _allowed_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def memory_size() -> int | None:
    """Bytes of memory for this process: the machine's, or its container's limit if lower; None where unknown."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such call on Windows
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int((CGROUP / limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return memory


def find_device(name: str = "auto") -> "torch.device":
    """The device called "cpu", "cuda" or "cuda:N"; "auto" is CUDA's where torch sees one, else the processor.

    From here on a GPU computes in float32 proper, and tries out which of its libraries' kernels is fastest.

    >>> find_device("cpu")
    device(type='cpu')

    Raises InputError for any other name, and for a device that is not there.
    """
    import torch

    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    if name == "mps":
        raise InputError("device mps has no float64, which norms and noise need; take --device cpu")
    kind, _, number = name.partition(":")
    if kind not in DEVICES or (number and not (kind == "cuda" and number.isdecimal())):
        raise InputError(f"device '{name}' is unknown; choose one of {', '.join(DEVICES)}")
    if kind == "cuda":
        if not there or int(number or 0) >= torch.cuda.device_count():
            raise InputError(f"device {name} is not there, as PyTorch {torch.__version__} sees it; take --device cpu")
        # TensorFloat-32 has 10 bits: other patients' gradients would change by more than the noise has room for
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    return torch.device(name)


def device_name(device: "torch.device") -> str:
    """What stands in results for a device: "cpu", or "cuda" with the GPU's name."""
    import torch

    return device.type if device.type == "cpu" else f"{device.type} ({torch.cuda.get_device_name(device)})"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads of PyTorch: a small model is faster on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_torch() -> None:
    """Raise InputError where PyTorch's defaults were changed: the kit computes in float32, on the processor."""
    import torch

    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32 or device.type != "cpu":
        raise InputError(
            f"PyTorch's default is {dtype} on {device}, but must be float32 on the processor: "
            "torch.set_default_dtype(torch.float32); torch.set_default_device('cpu')"
        )


@contextlib.contextmanager
def ordinary_torch() -> Iterator[None]:
    """Compute as PyTorch does where nobody has changed its defaults; afterwards they are the user's again."""
    import torch

    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # entered only where it is needed: it costs every operation a few microseconds
        with contextlib.nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def keep_freed_memory() -> bool:
    """From here on return no memory to the system; True where that could be set. For processes that train.

    glibc gives the top of its heap back after every step of a few hundred megabytes, and the next step pays for each
    page anew: 28,000 page faults, a quarter of a private step of SqueezeNet at 64 pixels. Other C libraries are left
    as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_MAX, 0))


def need_home() -> None:
    """Raise InputError where this user has no home directory, as on some clusters: Jupyter does not go without."""
    try:
        Path.home()
    except RuntimeError:
        raise InputError(
            "this user has no home directory, and Jupyter needs one; set the environment variable HOME to a folder"
        ) from None


@contextlib.contextmanager
def place_for(path: str | os.PathLike, option: str) -> Iterator[Path]:
    """``atomic_path``, entered before the work: what ``option`` names and cannot be written is an InputError then."""
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(atomic_path(path))
        except OSError as error:
            raise InputError(f"{option} {path} cannot be written ({error.strerror}); name another file") from error
        yield temporary


def safe_output() -> None:
    """From here on nothing fails because of what it prints; for the beginning of a program.

    An ASCII terminal gets "+-" for "±", and "?" for a letter it has no spelling for. A program that was started
    without one of its three streams, as services are, gets one that leads nowhere: else the next file that it opens
    takes the descriptor, and what a library prints lands in there.
    """
    codecs.register_error("spelt", _spell)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the file takes the lowest free descriptor, which is the stream's
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no need
            stream.reconfigure(errors="spelt")


def _spell(error: UnicodeEncodeError) -> tuple[str, int]:
    return "".join(SPELT.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


@dataclass(frozen=True)
class Finding:
    """One line of the check: what was looked for, whether it is there, and what that means."""

    part: str
    found: bool
    means: str

    def __str__(self):
        return f"{'ok' if self.found else 'missing':7}  {self.part:24}  {self.means}".rstrip()


def machine_check() -> list[Finding]:
    """Everything that was looked for, in reading order. The answer names no path of this machine."""
    return [*_machine(), *_packages(), *_data(), *_weights()]


def _machine() -> list[Finding]:
    python = platform.python_version()
    supported = (3, 11) <= tuple(int(part) for part in python.split(".")[:2]) < (3, 13)
    count, memory = cores(), memory_size()
    enough = memory is None or memory >= 2 * GB
    means = "enough for every chapter" if enough else "too little: a chapter may take 2 GB and be killed"
    return [
        Finding(
            f"Python {python}", supported, "as tested" if supported else "take 3.11 or 3.12: others are not tested"
        ),
        Finding(f"{count} cores", count >= 2, "as timed" if count >= 2 else "every time in the map doubles"),
        Finding("memory", True, "cannot be read here; a chapter may take 2 GB")
        if memory is None
        else Finding(f"{memory / GB:.1f} GB of memory", enough, means),
    ]


def _packages() -> list[Finding]:
    findings = []
    for name, lost in PACKAGES.items():
        try:
            findings.append(Finding(f"{name} {version(name)}", True, ""))
        except PackageNotFoundError:
            findings.append(Finding(name, False, lost))
    return findings


def _data() -> list[Finding]:
    """The embedded sets, and every other source, looked for in ``data`` here and beside the library."""
    findings = [Finding("data: synthetic", True, "made on the spot; every chapter runs on it")]
    findings.append(Finding("data: heart", True, "920 patients of four hospitals, in the package"))
    homes = (Path("data"), Path(__file__).parent.parent / "data")
    for name, markers in MARKERS.items():
        places = [place for home in homes for place in (home / name, home)]
        found = any((place / marker).exists() for place in places for marker in markers)
        means = f"--data {name} works" if found else f"optional: python data_download.py {name}"
        findings.append(Finding(f"data: {name}", found, means))
    return findings


def _weights() -> list[Finding]:
    # as torch finds it; nothing is raised for a user without a home
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    hub = Path(os.path.expanduser(os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))))
    embedded, imagenet = EMBEDDED.is_file(), (hub / "hub" / "checkpoints" / IMAGENET_FILE).is_file()
    return [
        Finding(
            "weights: embedded",
            embedded,
            "SqueezeNet, pre-trained on public synthetic patients"
            if embedded
            else f"training needs them: python -m dopamine_lib pretrain --out dopamine_lib/assets/{EMBEDDED.name}",
        ),
        Finding(
            "weights: ImageNet",
            imagenet,
            "--weights imagenet works"
            if imagenet
            else "optional, for real photographs: --weights FILE with a file of yours",
        ),
    ]
