"""Keep freed memory in the process, so that no step has to ask the system for it again.

Imports the standard library alone, because commands do this before they load torch.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_NEVER = -1
_LARGEST = (1 << 30, 32 << 20)  # bytes; glibc accepted no more than the second one until 2.34


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for what is allocated next; return whether it does.

    By default it gives large blocks, and the end of its heap, back to the system, which hands
    their pages out again one by one and zeroed: about 2,000 pages in each step of the quickstart
    on a CPU. The process stays as large as its peak.
    Nothing is changed where the environment says something of the allocator, or has another one.
    """
    if sys.platform != "linux" or _chosen_by_user():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in _LARGEST)
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) == 1 and kept)


def _chosen_by_user() -> bool:
    given = os.environ
    return (
        any(name.startswith("MALLOC_") for name in given)
        or "glibc.malloc" in given.get("GLIBC_TUNABLES", "")
        or "malloc" in given.get("LD_PRELOAD", "")
    )
