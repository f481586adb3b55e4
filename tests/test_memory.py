"""What the allocator keeps: counted in the pages that the kernel had to give, in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, threading
from loop.memory import keep_freed_memory

def faults(size):
    allocate = lambda: bytes(size - 64) + b"x"
    for _ in range(3):
        allocate()  # what the heap grows by, and is written to
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

counted = []
if {kept}:
    keep_freed_memory()
for size in (1 << 20, 100 << 20):
    faults(size)
    thread = threading.Thread(target=faults, args=[size])
    thread.start()
    thread.join()
print(*counted)
"""


def page_faults(*, kept: bool) -> list[int]:
    """Of an allocation like the one before: of 1 MiB in the main thread and in another, of 100 MiB in both."""
    command = [sys.executable, "-c", FAULTS.format(kept=kept)]
    return [int(n) for n in subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator is not glibc's")
def test_freed_memory_is_kept_for_the_next_request_whatever_its_size_and_thread() -> None:
    assert max(page_faults(kept=True)) < 100
    assert min(page_faults(kept=False)[2:]) > 20_000, "glibc keeps large blocks by itself: keep_freed_memory can go"
