"""The clock and the lease: one run at a time, asked for once, and given up when the lease is lost."""

from __future__ import annotations

import itertools
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from loop import metrics
from loop.store.joining import pending_votes
from loop.store.runs import drop_lease, list_runs, next_run, request_run, set_run, take_lease
from services.scheduler import _Heartbeat, ask_for_run, tidy_up
from tests.join.traffic import DAY_MS, feedback, response, response_id
from tests.store.joined import READER, apply, batch_of


def test_the_clock_does_not_ask_twice_while_a_run_is_open(store: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(1_800_000_000)  # two runs of one millisecond would have one name
    monkeypatch.setattr("services.scheduler.time", SimpleNamespace(time=lambda: next(seconds)))
    first = ask_for_run(store)
    assert ask_for_run(store).run_id == first.run_id
    set_run(store, first.run_id, "skipped", "skipped: 0 of 500 labels", 1)
    ask_for_run(store)
    assert {run.state for run in list_runs(store)} == {"requested", "skipped"}


def test_an_interrupted_run_comes_before_a_requested_one(store: Engine) -> None:
    request_run(store, "a", "clock", 1)
    set_run(store, "a", "running", "")
    assert (run := next_run(store)) is not None
    assert (run.run_id, run.state) == ("a", "running")


def test_a_lease_has_one_holder_until_it_expires(store: Engine) -> None:
    assert take_lease(store, "run", "a", now_ms=0, ttl_ms=1000)
    assert not take_lease(store, "run", "b", now_ms=500, ttl_ms=1000)
    assert take_lease(store, "run", "a", now_ms=900, ttl_ms=1000)
    assert not take_lease(store, "run", "b", now_ms=1500, ttl_ms=1000)
    assert take_lease(store, "run", "b", now_ms=2000, ttl_ms=1000)
    drop_lease(store, "run", "a")  # no longer the holder: changes nothing
    assert not take_lease(store, "run", "a", now_ms=2100, ttl_ms=1000)


def test_votes_that_are_given_up_are_counted_though_a_day_cannot_be_dropped_now(
    store: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_ms = int(time.time() * 1000)
    old = [feedback(f"o{n}", "up", now_ms - 3 * DAY_MS << 16, response_id=response_id("a" * 16, n)) for n in range(3)]
    young = feedback("y", "up", now_ms << 16, response_id=response_id("b" * 16, 1))
    rated = response_id("c" * 16, 1)
    apply(store, READER, batch_of(*old, young, response(rated, at_ms=now_ms - 3 * DAY_MS)), {})

    def counted() -> float:
        return metrics.store_orphaned_votes._value.get()  # type: ignore[no-any-return]

    before = counted()
    with monkeypatch.context() as patch:
        patch.setattr("loop.store.retention.drop_day", away)
        patch.setattr("loop.store.retention._forget", lambda *_: True)
        tidy_up(store, 2 * 86_400, threading.Event())
    assert counted() - before == 3
    assert pending_votes(store)[0] == 1
    with caplog.at_level("INFO"):
        tidy_up(store, 2 * 86_400, threading.Event())
    assert counted() - before == 3
    (said,) = [record for record in caplog.records if getattr(record, "action", "") == "tidied"]
    assert said.days == [str(datetime.fromtimestamp(now_ms / 1000 - 3 * 86_400, UTC).date())]  # type: ignore[attr-defined]


def away(*_: object) -> None:
    raise OperationalError("DETACH", None, Exception("lock timeout"))


def test_twenty_threads_taking_one_lease_give_one_holder(store: Engine) -> None:
    won: list[str] = []
    barrier = threading.Barrier(20)

    def attempt(name: str) -> None:
        barrier.wait()
        if take_lease(store, "run", name, now_ms=0, ttl_ms=1000):
            won.append(name)

    threads = [threading.Thread(target=attempt, args=(str(i),)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_lost_lease_ends_the_work_under_it() -> None:
    answers = iter([True, False])
    with _Heartbeat(lambda: next(answers), 0.05, threading.Event()) as over:
        assert over.wait(180)


def test_a_stopping_process_ends_the_work_under_a_lease() -> None:
    stop = threading.Event()
    with _Heartbeat(lambda: True, 0.05, stop) as over:
        assert not over.is_set()
        stop.set()
        assert over.wait(180)
