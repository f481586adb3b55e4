"""Everything that a torture run breaks: gateways in front of a stub engine, Kafka, joiners, Postgres."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.log.embedded import EmbeddedLog
from loop.settings import Settings
from services.gateway.journal import left_in
from tests.conftest import ROOT
from tests.ports import free_port, free_ports
from tests.services_real import RealKafka, RealPostgres

END_S = 180.0


@dataclass(eq=False)
class Service:
    """One process of ours; ended by a signal and started again, it keeps its name, ports and files."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    url: str = ""
    metrics_url: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                cwd=ROOT,
                env=os.environ | {f"THUMBWHEEL_{name}": value for name, value in self.environment.items()},
                stdout=log,
                stderr=log,
            )

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by the signal, and wait. Raises AssertionError where it ended in another way."""
        assert self.process is not None
        self.send(number)
        status = self.process.wait(END_S)
        # Of SIGTERM a process may also die that has not come so far as to handle it.
        assert status in (-number, 0), f"{self.name} ended with {status}: {self.log}"
        self.process = None

    def has_crashed(self) -> bool:
        """Whether it ended without being told to."""
        return self.process is not None and self.process.poll() is not None


class Stage:
    """The running parts; `gateways` stay as many as they are, `joiners` come and go."""

    def __init__(self, kafka: RealKafka, postgres: RealPostgres, folder: Path, gateways: int, joiners: int) -> None:
        self.kafka, self.postgres = kafka, postgres
        self.settings = Settings(log=kafka.settings(path=folder / "log.db"), store=postgres.new_store())
        self._folder = folder
        engine_port = free_port()
        self._environment = {
            "ENGINE__URLS": f'["http://127.0.0.1:{engine_port}"]',
            "STORE__URL": self.settings.store.url.get_secret_value(),
            "LOG__KIND": "kafka",
            "LOG__PATH": str(self.settings.log.path),
            "LOG__BOOTSTRAP_SERVERS": f'["{kafka.server}"]',
            "LOG__RESPONSES_TOPIC": self.settings.log.responses_topic,
            "LOG__FEEDBACK_TOPIC": self.settings.log.feedback_topic,
        }
        self._engine = self._service("engine", ["tests.stub_engine", str(engine_port)], {})
        self.gateways = [self._gateway(n) for n in range(gateways)]
        self.joiners: list[Service] = []
        self._joiners_made = 0
        for _ in range(joiners):
            self.add_joiner()

    @property
    def services(self) -> list[Service]:
        return [self._engine, *self.gateways, *self.joiners]

    def parts(self, what: str) -> list[Any]:
        """All that go by `what`: kafka, postgres, gateway or joiner."""
        named = {"kafka": [self.kafka], "postgres": [self.postgres], "gateway": self.gateways, "joiner": self.joiners}
        return list(named[what])

    def add_joiner(self) -> Service:
        """One more member of the group."""
        self._joiners_made += 1
        changes = {"JOINER__METRICS_PORT": str(free_port()), "JOINER__BATCH_EVENTS": "200"}
        self.joiners.append(self._service(f"joiner-{self._joiners_made}", ["services.cli", "joiner"], changes))
        return self.joiners[-1]

    def unsent(self) -> int:
        """Records in the gateways' journals and spools, which Kafka has not got."""
        log = self.settings.log
        # The journals first: what moves from one to the spool meanwhile is counted twice, not missed.
        waiting = 0
        for file in log.path.parent.glob("journal-*"):
            with suppress(FileNotFoundError):  # done with
                waiting += len(left_in(file))
        for gateway in self.gateways:
            spool = EmbeddedLog(log.path.with_name(f"spool-{gateway.name}.db"), log.partitions)
            topics = (log.responses_topic, log.feedback_topic)
            waiting += sum(len(spool.read(topic, n, 0, 10_000)) for topic in topics for n in range(log.partitions))
            spool.close()
        return waiting

    def kill(self) -> None:
        """End whatever is left, at once."""
        for service in self.services:
            if service.process is not None:
                service.process.kill()
                service.process.wait()

    def _gateway(self, number: int) -> Service:
        port, metrics_port = free_ports(2)
        changes = {
            "GATEWAY__GATEWAY_ID": f"gateway-{number}",
            "GATEWAY__PORT": str(port),
            "GATEWAY__METRICS_PORT": str(metrics_port),
            # The longest: on a machine as busy as this one, a slow write is no broken disk.
            "GATEWAY__CAPTURE_TIMEOUT_S": "5",
        }
        service = self._service(f"gateway-{number}", ["services.cli", "gateway"], changes)
        service.url, service.metrics_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
        return service

    def _service(self, name: str, command: list[str], changes: dict[str, str]) -> Service:
        service = Service(name, command, self._environment | changes, self._folder / f"{name}.log")
        service.start()
        return service
