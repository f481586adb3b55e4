"""`thumbwheel forget` on a machine with all of it: log, spool, journals, store, snapshots, cache and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource
from pydantic import SecretStr
from sqlalchemy import Engine
from typer.testing import CliRunner

from loop.erasure import Erased
from loop.events import Choice, FeedbackGiven, ResponseLogged, encode, hash_rater
from loop.join import read_batch
from loop.kto.cache import ReferenceCache
from loop.log import NewRecord, Record
from loop.log.embedded import EmbeddedLog
from loop.registry import get_adapter, register_candidate
from loop.settings import GatewaySettings, LogSettings, Settings, SnapshotSettings, StoreSettings, TrainSettings
from loop.snapshot import make_snapshot
from loop.store.joining import Reader, apply, prepare
from loop.store.runs import drop_lease, take_lease
from services import forget as forgetting
from services.cli import app
from services.forget import _has_rows, forget
from services.gateway.journal import Journal, left_in
from services.gateway.recent import RECENT, Recent
from tests.conftest import wait_until
from tests.join.joined import read_examples
from tests.ports import free_port
from tests.services_real import RealKafka

NOW_MS = int(datetime.now(UTC).timestamp() * 1000)
TOPICS = LogSettings().responses_topic, LogSettings().feedback_topic
SECRET = b"who is ann"


def today() -> date:
    """Asked before and after what says which day it is, for midnight may come between."""
    return datetime.now(UTC).date()


def rater(name: str) -> str:
    return hash_rater(b"salt", name)


def records(name: str, number: int) -> list[NewRecord]:
    """A response that somebody asked for, and the vote on it."""
    key = f"{number:016x}"
    id = f"chatcmpl-{key}-00000000-0000-7000-8000-000000000000"
    asked = ResponseLogged(
        response_id=id,
        choices=[
            Choice({"role": "assistant", "content": f"This is {name}."}, token_ids=[number], finish_reason="stop")
        ],
        messages=[{"role": "user", "content": f"who is {name}?"}],
        prompt_token_ids=[1, 2],
        adapter="base",
        rater=rater(name),
        started_at_ms=NOW_MS,
    )
    vote = FeedbackGiven(
        feedback_id=f"f{number}", value="up", hlc=(NOW_MS << 16) + number, response_id=id, rater=rater(name)
    )
    return [
        NewRecord(topic, key, encode(data, event_id=f"{topic}{number}", key=key, source="test", now_ms=NOW_MS))
        for topic, data in zip(TOPICS, (asked, vote), strict=True)
    ]


@dataclass
class Machine:
    """Its files, and what reads them."""

    folder: Path
    settings: Settings
    store: Engine
    journal: Journal

    def join(self, group: str) -> None:
        """Read the whole log from its beginning."""
        with closing(EmbeddedLog(self.settings.log.path)) as log:
            found = [r for topic in TOPICS for n in range(log.partitions) for r in log.read(topic, n, 0, 1000)]
        apply(self.store, Reader(group, "log"), prepare(self.store, read_batch(found, TOPICS[0])), {})

    def raters(self) -> set[str]:
        """Who stands in the store."""
        found = read_examples(self.store)
        return {vote["rater"] for example in found for vote in example.votes} | {
            example.body.rater or "" for example in found
        }

    def files_with(self, content: bytes) -> list[str]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return [str(path.relative_to(self.folder)) for path in files if content in path.read_bytes()]


@pytest.fixture
def machine(tmp_path: Path, store: Engine) -> Iterator[Machine]:
    settings = Settings(
        gateway=GatewaySettings(rater_salt=SecretStr("salt")),
        log=LogSettings(path=tmp_path / "log.db"),
        store=StoreSettings(url=SecretStr(f"sqlite:///{tmp_path}/store.db")),
        snapshot=SnapshotSettings(dir=tmp_path / "snapshots", held_out_share=0.3),
        train=TrainSettings(cache=tmp_path / "cache"),
    )
    people = [("ann", 1), ("ann", 2), ("bob", 3), ("cai", 4), ("dan", 5)]
    everything = [record for name, number in people for record in records(name, number)]
    for path in (settings.log.path, tmp_path / "spool-gateway-2.db"):
        with closing(EmbeddedLog(path)) as log:
            log.append(everything)
    killed = Journal(tmp_path / "journal-gateway-2")
    for record in everything:
        killed.append(record)
    (left,) = tmp_path.glob("journal-gateway-2.*")
    content = left.read_bytes()
    killed.close()
    left.write_bytes(content)  # as a killed process leaves it: nobody has it locked
    journal = Journal(tmp_path / "journal-gateway-1")
    journal.done([journal.append(record) for record in everything][-1])
    machine = Machine(tmp_path, settings, store, journal)
    machine.join("joiner")
    for run in ("run-1", "run-2"):
        snapshot = make_snapshot(store, settings.snapshot, out=settings.snapshot.dir / run, now_ms=NOW_MS)
        manifest = {"snapshot": snapshot.snapshot_id}
        register_candidate(store, alias="a", parent=None, run_id=run, path="p", manifest=manifest, now_ms=NOW_MS)
    with ReferenceCache(settings.train.cache, {}) as cache:
        cache.put({cache.key([1, 2], [1]): -1.0})
    cache._connection.close()
    yield machine
    journal.close()


def test_a_person_is_erased_everywhere_and_no_replay_brings_them_back(machine: Machine) -> None:
    assert len(machine.files_with(SECRET)) >= 4
    before = today()
    recent = Recent(machine.settings.log.path.with_name(RECENT))
    recent.put("score", "id", SECRET.decode())
    found = forget(machine.settings, machine.store, "user", rater("ann"))
    assert (found["gateways_memory"], recent.get("score", "id")) == (True, None)
    recent.close()
    assert (found["responses"], found["votes"]) == (2, 2)
    assert found["snapshots"] == ["run-1", "run-2"]
    assert found["adapters"] == ["v000001", "v000002"]
    assert found["reference_cache"]
    assert found["later"] == []
    assert machine.files_with(SECRET) == []
    assert machine.files_with(rater("ann").encode()) == ["store.db"]  # the tombstone
    assert get_adapter(machine.store, "v000001").manifest["learned_from_erased"] in {str(before), str(today())}
    with closing(EmbeddedLog(machine.settings.log.path)) as log:
        log.append(records("ann", 1) + records("ann", 9))  # as from a broker, which still has them, or a late gateway
    for group in ("again", "and again"):
        machine.join(group)
        assert machine.raters() == {rater(name) for name in ("bob", "cai", "dan")}
    again = make_snapshot(machine.store, machine.settings.snapshot, out=machine.folder / "again", now_ms=NOW_MS)
    assert again.read == 3


def test_the_rest_of_the_log_and_of_the_journals_is_as_it_was(machine: Machine) -> None:
    forget(machine.settings, machine.store, "user", rater("ann"))
    others = {r.value for name, number in (("bob", 3), ("cai", 4), ("dan", 5)) for r in records(name, number)}
    for path in (machine.settings.log.path, machine.folder / "spool-gateway-2.db"):
        with closing(EmbeddedLog(path)) as log:
            kept = {r.value for topic in TOPICS for n in range(log.partitions) for r in log.read(topic, n, 0, 100)}
            ends = {topic: log.end_offsets(topic) for topic in TOPICS}
            log.append(records("eve", 6))
            for topic in TOPICS:  # what was given away is not given again
                assert sum(log.end_offsets(topic).values()) == sum(ends[topic].values()) + 1
        assert kept == others
    (journal,) = machine.folder.glob("journal-*")
    place = machine.journal.append(records("eve", 7)[0])
    assert left_in(journal) == records("eve", 7)[:1]
    machine.journal.done(place)


def test_a_rater_who_only_voted_leaves_the_answers_to_those_who_asked(machine: Machine) -> None:
    found = forget(machine.settings, machine.store, "rater", rater("ann"))
    assert (found["responses"], found["votes"]) == (0, 2)
    assert found["adapters"] == ["v000001", "v000002"]
    machine.join("again")
    assert machine.raters() == {rater(name) for name in ("bob", "cai", "dan")}
    assert machine.files_with(SECRET)  # the answers are nobody's vote


def test_who_is_in_no_snapshot_marks_no_adapter(machine: Machine) -> None:
    found = forget(machine.settings, machine.store, "user", rater("zoe"))
    assert (found["responses"], found["votes"], found["snapshots"], found["adapters"]) == (0, 0, [], [])
    assert machine.raters() == {rater(name) for name in ("ann", "bob", "cai", "dan")}


@pytest.mark.parametrize(
    "point", ["read_erased", "mark_erased", "_erase_cache", "_erase_files", "_take_up", "_is_clean"]
)
@pytest.mark.parametrize("is_after", [False, True])
def test_killed_anywhere_and_called_again_it_ends_the_same(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, point: str, is_after: bool
) -> None:
    step: Callable[..., Any] = getattr(forgetting, point)

    def killed(*arguments: Any) -> Any:
        if is_after:
            step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, point, killed)
    with pytest.raises(KeyboardInterrupt):
        forget(machine.settings, machine.store, "user", rater("ann"))
    monkeypatch.undo()
    forget(machine.settings, machine.store, "user", rater("ann"))
    assert machine.files_with(SECRET) == []
    assert "learned_from_erased" in get_adapter(machine.store, "v000002").manifest
    assert machine.raters() == {rater(name) for name in ("bob", "cai", "dan")}


def test_a_journal_that_is_not_done_with_it_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "JOURNAL_PATIENCE_S", 0.0)
    place = machine.journal.append(records("ann", 8)[0])
    (said,) = forget(machine.settings, machine.store, "user", rater("ann"))["later"]
    assert "journal-gateway-1" in said
    machine.journal.done(place)
    assert forget(machine.settings, machine.store, "user", rater("ann"))["later"] == []
    assert machine.files_with(SECRET) == []


def test_what_a_killed_run_has_left_goes_and_what_one_is_making_is_named(machine: Machine) -> None:
    unfinished = machine.settings.snapshot.dir / ".run-3-abcd"
    unfinished.mkdir()
    (unfinished / "spool").write_bytes(SECRET)
    assert take_lease(machine.store, "run", "scheduler", NOW_MS, 3_600_000)
    (said,) = forget(machine.settings, machine.store, "user", rater("ann"))["later"]
    assert "a run is at work" in said
    assert unfinished.exists()
    drop_lease(machine.store, "run", "scheduler")
    assert forget(machine.settings, machine.store, "user", rater("ann"))["later"] == []
    assert machine.files_with(SECRET) == []


def test_what_kafka_has_goes_by_retention_and_the_date_is_said(machine: Machine, apache_kafka: RealKafka) -> None:
    folder = machine.settings.log.path
    log = apache_kafka.settings(path=folder, retention_s=14 * 86_400)
    settings = machine.settings.model_copy(update={"log": log})

    def said() -> str:
        (of_kafka,) = forget(settings, machine.store, "user", rater("ann"))["later"]
        return of_kafka

    def keep(days: int) -> None:
        admin = KafkaAdminClient(bootstrap_servers=[apache_kafka.server])
        limit_ms = days * 86_400_000 if days > 0 else -1
        admin.alter_configs([ConfigResource("TOPIC", f"{log.feedback_topic}.dlt", {"retention.ms": limit_ms})])
        admin.close()

    def is_said(days: int) -> bool:
        """A day more to the segment's end, and one to that day's."""
        before = today()
        found = said()
        return any(f"by {day + timedelta(days + 2)}" in found for day in (before, today()))

    assert is_said(14)
    keep(30)
    wait_until(lambda: is_said(30), "said by the one that keeps it longest")
    keep(-1)
    wait_until(lambda: "without a limit" in said(), "said to have no limit")
    log = log.model_copy(update={"bootstrap_servers": [f"127.0.0.1:{free_port()}"]})
    settings = machine.settings.model_copy(update={"log": log})
    assert "did not say how long" in said()


def test_a_dead_letter_that_names_nobody_goes_by_retention_and_the_date_is_said(machine: Machine) -> None:
    rubbish = Record(TOPICS[1], 0, 0, "k", b"{", NOW_MS)
    apply(machine.store, Reader("g", "log"), prepare(machine.store, read_batch([rubbish], TOPICS[0])), {})
    before = today()
    (said,) = forget(machine.settings, machine.store, "user", rater("ann"))["later"]
    assert "1 dead letters" in said
    assert any(str(day + timedelta(31)) in said for day in (before, today()))


def test_the_command_names_who_by_the_apps_own_id(machine: Machine) -> None:
    path = machine.folder / "thumbwheel.toml"
    settings = machine.settings
    path.write_text(
        f'[gateway]\nrater_salt = "salt"\n[log]\npath = "{settings.log.path}"\n[store]\nurl = '
        f'"sqlite:///{machine.folder}/store.db"\n[snapshot]\ndir = "{settings.snapshot.dir}"\n'
    )

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["forget", *arguments, "--settings", str(path)])

    done = json.loads(run("--user", "ann").stdout)
    assert (done["erased"], done["subject"], done["responses"]) == ("user", rater("ann"), 2)
    for arguments, said in (
        ((), "one of --rater, --user and --response, got 0"),
        (("--user", "a", "--rater", "b"), "got 2"),
        (("--response", "nonsense"), "'nonsense' was not minted"),
    ):
        assert said in str(run(*arguments).exception)


def test_a_snapshot_that_does_not_tell_its_raters_is_taken_for_theirs(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"example_id": ["chatcmpl-x/0"]}), file)
    assert _has_rows(file, Erased.of([("user", "somebody")]))
