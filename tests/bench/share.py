"""Holding a process to a share of a core, so that several find enough of them on a machine with few: what two bring
more than one is then what a second core would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PERIOD_US = 10_000  # short: who has used his share up waits for as long as this at most


@contextmanager
def held(pid: int, share: float) -> Iterator[None]:
    """Let the process have no more than `share` of a core, by a cgroup. Raises OSError where we may not, as by root."""
    quota_us = int(share * PERIOD_US)
    root, limits = Path("/sys/fs/cgroup"), {"cpu.max": f"{quota_us} {PERIOD_US}"}
    if not (root / "cgroup.controllers").exists():  # version 1
        root, limits = root / "cpu", {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(quota_us)}
    group = root / f"thumbwheel-bench-{pid}"
    group.mkdir()
    try:
        for name, limit in limits.items():
            (group / name).write_text(limit)
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(left)
        group.rmdir()
