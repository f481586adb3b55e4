"""`python -m tests.torture --faults 100 --minutes 20`: does anything get lost, or count twice, whatever breaks?

Prints one JSON line; status 1 where something is wrong, or where there was no time for all the
faults, and then everybody's log files stay where the line says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.services_real import RealKafka, kafka_home, postgres_binaries, running_postgres
from tests.torture.run import torture

COLUMNS = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def main() -> int:
    """Break things for a bounded time; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="begin no fault after this time")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    home, binaries = kafka_home(), postgres_binaries()
    if home is None or binaries is None:
        parser.error("needs Apache Kafka (KAFKA_HOME), Java 17 and Postgres' server programs")
    console = Console(stderr=True)
    console.print(f"seed {options.seed}")
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    began = time.monotonic()
    with running_postgres(binaries) as postgres, Progress(*COLUMNS, TimeRemainingColumn(), console=console) as progress:
        kafka = RealKafka(home, folder / "kafka")
        kafka.folder.mkdir()
        kafka.start()
        task = progress.add_task("starting", total=options.faults)
        begun = 0

        def show(what: str) -> None:
            nonlocal begun
            progress.update(task, description=what, completed=begun)
            begun += 1

        bounds = {"seed": options.seed, "faults": options.faults, "seconds": options.minutes * 60}
        try:
            found = asyncio.run(torture(kafka, postgres, folder, show=show, **bounds))
        finally:
            kafka.stop(kill=True)
    is_right = found["faults"] == options.faults and not (found["lost"] or found["doubled"] or found["wrong_label"])
    line = {**found, "seed": options.seed, "seconds": round(time.monotonic() - began)}
    print(json.dumps(line if is_right else line | {"logs": str(folder)}), flush=True)
    if is_right:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
