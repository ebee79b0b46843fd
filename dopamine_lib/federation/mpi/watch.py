"""Says why a distributed run ended when a rank is killed: MPI alone prints a process number and a signal.

Every rank has a watcher, a small child process at the other end of a pipe. When the pipe ends without a word the rank
was killed, and its watcher says so. MPI then kills the other ranks of the host, so the first watcher speaks for all.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

_ENDED, _EXPLAINED = b".", b"!"


class Watcher:
    """Watches this process; made before anything starts threads or MPI, for it forks.

    who, remedy  what to say, and what to do about it
    """

    def __init__(self, who: str, remedy: str):
        self._pipe = None
        # all ranks of a run on this host have the same parent
        self._spoken = Path(tempfile.gettempdir()) / f"dopamine-run-{os.getppid()}"
        if not hasattr(os, "fork"):
            return
        watch, self._pipe = os.pipe()
        if os.fork() == 0:
            os.close(self._pipe)
            try:
                self._watch(watch, f"dopamine: {who} was killed, and MPI ends the run. {remedy}")
            finally:
                os._exit(0)
        os.close(watch)

    def ended(self) -> None:
        """The rank has done its work."""
        self._say(_ENDED)

    def explained(self) -> None:
        """The rank has said itself why it ends the run: no watcher has anything to add."""
        self._first()
        self._say(_EXPLAINED)

    def _say(self, word: bytes) -> None:
        if self._pipe is not None:
            os.write(self._pipe, word)

    def _first(self) -> bool:
        """Whether nobody on this host has spoken yet."""
        try:
            os.close(os.open(self._spoken, os.O_CREAT | os.O_EXCL, 0o600))
        except OSError:
            return False
        return True

    def _watch(self, pipe: int, message: str) -> None:
        os.setsid()  # what kills the rank's group is not to kill its watcher
        if "PMI_FD" in os.environ:  # MPICH's line to the rank
            os.close(int(os.environ["PMI_FD"]))
        word = os.read(pipe, 1)
        if word == _ENDED:
            return
        os.read(pipe, 1)  # until the rank is gone
        if word != _EXPLAINED:
            if not self._first():
                return
            print(message, file=sys.stderr, flush=True)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (1, 2):  # mpiexec waits for them to close
            os.dup2(nowhere, standard)
        time.sleep(5)  # by then the other ranks are gone as well
        self._spoken.unlink(missing_ok=True)
