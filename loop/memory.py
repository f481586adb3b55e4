"""What this process' allocator does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = -1, -3, 32 << 20


def keep_freed_memory() -> None:
    """Let glibc, where it is the process' allocator, hold on to what is freed (mallopt(3)): what comes back from the
    kernel is filled with zeros, page by page, 5 % of the time of training and of reading examples.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
