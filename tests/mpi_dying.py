"""A program for ``mpiexec``: the command, with short rounds, in which hospital 1 dies before its 25th round.

mpiexec -n 3 python mpi_dying.py killed|raises|lives OPTIONS
"""

import os
import signal
import sys
from dataclasses import replace

from dopamine_lib.federation.mpi import __main__ as mpi
from dopamine_lib.federation.settings import SETTINGS

ROUNDS, LAST = 40, 24
end, _rank = sys.argv.pop(1), mpi._rank


def rank(arguments, number: int) -> int:
    """The rank's work, during which one hospital dies."""
    from dopamine_lib.federation.training import Training

    plain = Training._round

    def dying(self, number):
        if ([hospital.number for hospital in self.hospitals], number) == ([1], LAST):
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "raises":
                raise RuntimeError("the disk is full")
        return plain(self, number)

    Training._round = dying
    return _rank(arguments, number)


mpi._rank = rank
SETTINGS["FSCDP"] = replace(SETTINGS["FSCDP"], rounds=ROUNDS)
sys.exit(mpi.main())
