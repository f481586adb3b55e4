"""`thumbwheel log` and its replay of dead letters: on the embedded log and SQLite, on Kafka and Postgres."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from loop.events import EventError
from loop.log import EventLog, NewRecord
from loop.log.open import open_log
from loop.settings import LogSettings, Settings, StoreSettings
from loop.store import open_store
from services.joiner import Joiner
from tests.join.joined import read_examples
from tests.join.traffic import START_MS, feedback, response, response_id

# kafka-python leaves sockets of its connection attempts to the garbage collector.
ID = response_id("a" * 16, 1)


@pytest.fixture(params=["embedded", "apache_kafka"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "embedded":
        url = SecretStr(f"sqlite:///{tmp_path}/store.db")
        return Settings(log=LogSettings(path=tmp_path / "log.db"), store=StoreSettings(url=url))
    kafka, postgres = (request.getfixturevalue(name) for name in (request.param, "postgres"))
    return Settings(log=kafka.settings(), store=postgres.new_store())


@pytest.fixture
def opened(settings: Settings) -> Iterator[tuple[Engine, EventLog]]:
    store, log = open_store(settings.store), open_log(settings.log)
    yield store, log
    log.close()
    store.dispose()


def join_all(settings: Settings, store: Engine, log: EventLog) -> None:
    """Join what is in the log, and send dead letters."""
    joiner = Joiner(settings, store, log)
    topics = (settings.log.responses_topic, settings.log.feedback_topic)
    ends = {(topic, n): end for topic in topics for n, end in log.end_offsets(topic).items()}

    class UntilRead(threading.Event):
        def is_set(self) -> bool:
            return joiner.positions == ends

    joiner.run(UntilRead())


def thumbwheel_log(settings: Settings, *arguments: str) -> str:
    """What the command prints."""
    values = {f"LOG__{name.upper()}": value for name, value in settings.log.model_dump(exclude_none=True).items()}
    values["LOG__BOOTSTRAP_SERVERS"] = json.dumps(settings.log.bootstrap_servers)
    values["STORE__URL"] = settings.store.url.get_secret_value()
    environment = os.environ | {f"THUMBWHEEL_{name}": str(value) for name, value in values.items()}
    command = [sys.executable, "-m", "services.cli", "log", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def described(settings: Settings) -> tuple[dict[str, int], list[Any]]:
    """Sums over the partitions, and the dead letters to be replayed."""
    found = json.loads(thumbwheel_log(settings, "--json"))
    names = ("end", "position", "lag", "dead_letters", "replayed")
    return {name: sum(state[name] for state in found["partitions"]) for name in names}, found["dead_letters"]


def test_dead_letters_are_shown_and_after_a_fix_joined(
    settings: Settings, opened: tuple[Engine, EventLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, log = opened
    topic = settings.log.feedback_topic
    vote = feedback("f", "up", START_MS << 16, response_id=ID)._replace(topic=topic)
    log.append([response(ID)._replace(topic=settings.log.responses_topic), vote, NewRecord(topic, "b" * 16, b"\xff{")])
    assert described(settings) == ({"end": 3, "position": 0, "lag": 3, "dead_letters": 0, "replayed": 0}, [])

    def refuse(_: bytes) -> None:
        raise EventError("a bug of [ours]")

    with monkeypatch.context() as broken:
        broken.setattr("loop.join.decode_feedback", refuse)
        join_all(settings, store, log)
    sums, letters = described(settings)
    assert sums == {"end": 3, "position": 3, "lag": 0, "dead_letters": 2, "replayed": 0}
    assert [(x["topic"], x["reason"], x["sent"]) for x in letters] == [(topic, "a bug of [ours]", True)] * 2
    shown = thumbwheel_log(settings)
    assert all(text in shown for text in ("lag", "in .dlt", "a bug of [ours]", "yes"))

    (other,) = (x for x in letters if x["partition"] != letters[0]["partition"])
    chosen = ("--topic", topic, "--partition", str(other["partition"]), "--offset", str(other["offset"]))
    assert json.loads(thumbwheel_log(settings, "--replay", *chosen)) == {"replayed": 1}
    assert json.loads(thumbwheel_log(settings, "--replay")) == {"replayed": 1}
    assert json.loads(thumbwheel_log(settings, "--replay")) == {"replayed": 0}
    assert described(settings)[0] == {"end": 5, "position": 3, "lag": 2, "dead_letters": 0, "replayed": 2}

    join_all(settings, store, log)
    (joined,) = read_examples(store)
    assert (joined.response_id, joined.up) == (ID, 1)
    sums, (letter,) = described(settings)
    assert sums == {"end": 5, "position": 5, "lag": 0, "dead_letters": 1, "replayed": 2}
    assert (letter["topic"], letter["offset"], letter["sent"]) == (topic, 1, True)  # of one key: in the same partition
    assert "malformed" in letter["reason"]
