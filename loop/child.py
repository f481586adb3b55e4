"""Runs a module as a child that ends when its parent does: `python -m loop.child MODULE ARGUMENTS...`.

A parent killed with -9 cannot end its children, and a trainer that goes on alone would write into the files of the one
that resumes its run. The child's standard input is a pipe that only the parent holds open: at its end, the child ends.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
