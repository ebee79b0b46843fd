"""Keep freed memory in the process, so that a training step does not ask the system for the same pages again.

glibc gives the top of its heap back after every step of a few hundred megabytes, and the next step pays for each page
anew: 28,000 page faults, a quarter of a private step of SqueezeNet at 64 pixels. What was needed once stays with the
process until it ends. Other C libraries are left as they are.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """From here on return no memory to the system; True where that could be set. For processes that train."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0))
