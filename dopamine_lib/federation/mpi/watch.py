"""Says why a distributed run ended when a rank is killed: MPI alone prints a process number and a signal.

Every rank has a watcher, a small child process at the other end of a pipe. When the pipe ends without a word the rank
was killed, and its watcher says so. MPI then kills the other ranks of the host, so the first watcher speaks for all.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ENDED, _EXPLAINED = b".", b"!"


class Watcher:
    """Watches this process.

    who, remedy  what to say, and what to do about it
    """

    def __init__(self, who: str, remedy: str):
        # all ranks of a run on this host have the same parent
        self._spoken = Path(tempfile.gettempdir()) / f"dopamine-run-{os.getppid()}"
        self._child = None
        if os.name != "posix":
            return
        watch, self._pipe = os.pipe()
        message = f"dopamine: {who} was killed, and MPI ends the run. {remedy}"
        # a bare Python of 10 MB, where a fork would come to own 90 MB of the rank's; what kills the rank's group is not
        # to kill its watcher
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(watch), str(self._spoken), message],
            pass_fds=(watch,),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(watch)

    def ended(self) -> None:
        """The rank has done its work."""
        if self._child is not None:
            os.write(self._pipe, _ENDED)
            self._child.wait()

    def explained(self) -> None:
        """The rank has said itself why it ends the run: no watcher has anything to add."""
        _first(self._spoken)
        if self._child is not None:
            os.write(self._pipe, _EXPLAINED)


def _first(spoken: Path) -> bool:
    """Whether nobody on this host has spoken yet."""
    try:
        os.close(os.open(spoken, os.O_CREAT | os.O_EXCL, 0o600))
    except OSError:
        return False
    return True


def _watch(pipe: int, spoken: Path, message: str) -> None:
    """What the child does until its rank is gone."""
    word = os.read(pipe, 1)
    if word == _ENDED:
        return
    os.read(pipe, 1)  # until the rank is gone
    if word != _EXPLAINED:
        if not _first(spoken):
            return
        print(message, file=sys.stderr, flush=True)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (1, 2):  # mpiexec waits for them to close
        os.dup2(nowhere, standard)
    time.sleep(5)  # by then the other ranks are gone as well
    spoken.unlink(missing_ok=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
