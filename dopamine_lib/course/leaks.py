"""The project "Find the leak": a copy of the kit in which one line is wrong, and a run that was made with it.

Each leak is a change of the source that a hurried programmer could have made. It leaves every accuracy and every stated
epsilon as they are; what it spends shows in an audit alone. ``auditing/planted_faults.py`` has more, for the chapter.
"""

import os
import shutil
import subprocess
import sys
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from dopamine_lib.data.transfer import new_folder
from dopamine_lib.errors import InputError, check_within

#: This package, which is copied.
PACKAGE = Path(__file__).parents[1]


class Leak(NamedTuple):
    """One change of the source, and what it breaks.

    file           the module, relative to the package;  sound, faulty  the text that stands there once, and its place's
    """

    file: str
    sound: str
    faulty: str
    breaks: str


LEAKS = (
    Leak(
        "privacy/dpsgd.py",
        "return noise_multiplier * max_grad_norm / math.sqrt(hospitals)",
        "return noise_multiplier * max_grad_norm / hospitals",
        "hospitals' shares add up as variances do, not as standard deviations: the total has 1/sqrt(K) of its noise",
    ),
    Leak(
        "federation/hospital.py",
        "        if self.noise is None:\n            return clipped_sum.to(",
        "        if not len(self.sample(step)) and self.noise is not None:\n"
        "            return np.zeros(self.task.d, np.int64)\n"
        "        if self.noise is None:\n            return clipped_sum.to(",
        "an empty batch is sent without noise, which tells that nobody was sampled",
    ),
    Leak(
        "federation/hospital.py",
        "present = stream.uniform(samples * people).view(samples, people) < self.plan.setting.sample_rate",
        "present = stream.uniform(samples * people).view(samples, people) < self.plan.setting.sample_rate**0.5",
        "patients take part at the square root of the declared rate",
    ),
)


def plant_leak(out: str | PathLike, number: int, *, run: bool = True) -> Leak:
    """Write the project's folder: ``out/dopamine_lib`` with leak ``number`` (from 1), and ``out/results`` of a run.

    run  whether to make the run: FSCDP, once, on the heart-disease data, which takes some seconds
    Returns what was planted. Raises InputError for another number, if ``out`` is in use or cannot be made, or
    if the run fails.
    """
    check_within("leak", number, 1, len(LEAKS), "see dopamine_lib/course/leaks.py", low_open=False)
    out, leak = Path(out), LEAKS[number - 1]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name another, or empty it")
    text = (PACKAGE / leak.file).read_text(encoding="utf-8")
    left_out = shutil.ignore_patterns("__pycache__", "kit", Path(__file__).name)  # a wheel has solutions in "kit"
    try:
        with new_folder(out) as folder:
            copied = shutil.copytree(PACKAGE, folder / "dopamine_lib", ignore=left_out)
            (copied / leak.file).write_text(text.replace(leak.sound, leak.faulty), encoding="utf-8")
            shutil.copystat(PACKAGE / leak.file, copied / leak.file)  # the newest file of all would say which it is
            if run:
                _run_in(folder)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another folder, or make room") from None
    return leak


def _run_in(folder: Path) -> None:
    """Train with the copy of the kit in this folder, which shows how far it is. Raises InputError where that fails."""
    asked = ("reproduce", "--data", "heart", "--settings", "FSCDP", "--runs", "1", "--out", "results")
    with_copy = {**os.environ, "PYTHONPATH": str(folder.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "dopamine_lib", *asked]
    if subprocess.run(command, cwd=folder, env=with_copy, stdout=subprocess.DEVNULL).returncode:
        raise InputError("the run with the leak failed; what it said stands above")
