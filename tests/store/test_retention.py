"""What leaves the store by age, and what stays."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.exc import OperationalError

from loop.log import NewRecord
from loop.store import joining, retention
from loop.store.engine import StoreUnavailableError
from loop.store.joining import pending_votes
from loop.store.partitions import ensure_days, oldest_day
from loop.store.retention import retire_days, retire_letters, retire_votes
from loop.store.schema import dead_letters, response_index, responses, turn_back, votes
from tests.join.joined import examples_in
from tests.join.traffic import DAY_MS, RESPONSES, START_MS, feedback, response, response_id
from tests.store.joined import READER, apply, batch_of

NOW_MS = START_MS + 10 * DAY_MS
BEFORE_MS = NOW_MS - 2 * DAY_MS
IDS = [response_id(f"{n:016x}", n) for n in range(12)]
GOING = threading.Event()


def hlc(at_ms: int) -> int:
    return at_ms << 16


@pytest.fixture
def aged(store: Engine) -> Engine:
    """One response a day for the last twelve; those of even number are rated."""
    for n, id in enumerate(IDS):
        at_ms = NOW_MS - n * DAY_MS
        events = [response(id, at_ms=at_ms)]
        if n % 2 == 0:
            events.append(feedback(f"f{n}", "up", hlc(at_ms), response_id=id, rater="ann"))
        apply(store, READER, batch_of(*events), {})
    return store


def kept(store: Engine) -> tuple[set[str], set[str]]:
    """Response ids in the index, and with a body."""
    with store.connect() as connection:
        found = [connection.execute(select(t.c.turned_id)).scalars() for t in (response_index, responses)]
        return {turn_back(id) for id in found[0]}, {turn_back(id) for id in found[1]}


def test_old_responses_go_and_rated_ones_stay_as_examples(aged: Engine) -> None:
    before = examples_in(aged)
    assert len(retire_days(aged, BEFORE_MS, GOING)) == 9
    assert kept(aged) == ({*IDS[:3], *IDS[::2]}, set(IDS[:3]))
    assert examples_in(aged) == before
    assert len(before) == 6
    assert retire_days(aged, BEFORE_MS, GOING) == []


def test_an_old_example_can_still_be_voted_on(aged: Engine) -> None:
    retire_days(aged, BEFORE_MS, GOING)
    event = examples_in(aged)[IDS[10], 0]["event"]
    apply(aged, READER, batch_of(feedback("late", "down", hlc(NOW_MS), response_id=IDS[10], rater="bob")), {})
    assert examples_in(aged)[IDS[10], 0] == {
        "votes": {"ann": ("up", 1.0, hlc(NOW_MS - 10 * DAY_MS), None), "bob": ("down", 1.0, hlc(NOW_MS), None)},
        "up": 1,
        "down": 1,
        "event": event,
    }
    for rater in ("ann", "bob"):
        vote = feedback(f"back-{rater}", "retract", hlc(NOW_MS + 1), response_id=IDS[10], rater=rater)
        apply(aged, READER, batch_of(vote), {})
    assert (IDS[10], 0) not in examples_in(aged)


def test_votes_whose_response_never_came_are_orphans_at_last(store: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS", 3)
    old = [feedback(f"o{n}", "up", hlc(NOW_MS - 3 * DAY_MS), response_id=id) for n, id in enumerate(IDS)]
    young = feedback("y", "up", hlc(NOW_MS - DAY_MS), response_id=IDS[0])
    joined = [response(IDS[1], at_ms=NOW_MS), feedback("j", "up", hlc(NOW_MS - 9 * DAY_MS), response_id=IDS[1])]
    apply(store, READER, batch_of(*old, young, *joined), {})
    assert retire_votes(store, BEFORE_MS, GOING) == 11  # the twelfth has met its response
    assert pending_votes(store)[0] == 1
    assert len(examples_in(store)) == 1
    with store.connect() as connection:
        assert set(connection.execute(select(votes.c.feedback_id)).scalars()) == {"y", "j", "o1"}


def test_a_dead_letter_goes_by_its_age(store: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS", 2)
    began_ms = int(time.time() * 1000)
    rubbish = [NewRecord(RESPONSES, "k", b"{%d" % n) for n in range(6)]
    apply(store, READER, batch_of(*rubbish), {})
    with store.begin() as connection:
        connection.execute(update(dead_letters).where(dead_letters.c.offset < 5).values(at_ms=began_ms - 1))

    def left() -> set[int]:
        with store.connect() as connection:
            return set(connection.execute(select(dead_letters.c.offset)).scalars())

    assert retire_letters(store, began_ms - 1, GOING) == 0
    assert left() == set(range(6))
    assert retire_letters(store, began_ms, GOING) == 5
    assert left() == {5}


def test_stopped_in_the_middle_it_goes_on_with_the_next_call(aged: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS", 1)
    stop = threading.Event()
    looks = iter(range(100))
    monkeypatch.setattr(stop, "is_set", lambda: next(looks) > 6)
    assert 0 < len(retire_days(aged, BEFORE_MS, stop)) < 8
    retire_days(aged, BEFORE_MS, GOING)
    assert kept(aged) == ({*IDS[:3], *IDS[::2]}, set(IDS[:3]))


def test_who_reads_for_long_is_not_waited_for_and_blocks_nobody(aged: Engine) -> None:
    count = select(func.count()).select_from(responses)
    with aged.connect() as reader:
        assert reader.execute(count).scalar_one() == 12
        if aged.dialect.name == "sqlite":  # where a reader has a snapshot
            assert len(retire_days(aged, BEFORE_MS, GOING)) == 9
            assert reader.execute(count).scalar_one() == 12
            return
        with pytest.raises(OperationalError, match="lock timeout"):
            retire_days(aged, BEFORE_MS, GOING)
        ensure_days(aged, ["2031-05-05"])  # attached beside the reader
        late = response(response_id("e" * 16, 98), at_ms=NOW_MS - 11 * DAY_MS)  # of the day that is to go
        apply(aged, READER, batch_of(response(response_id("f" * 16, 99), at_ms=NOW_MS), late), {})
    assert len(retire_days(aged, BEFORE_MS, GOING)) == 9
    assert oldest_day(aged) == datetime.fromtimestamp(BEFORE_MS / 1000, UTC).date()


def test_a_day_that_went_just_before_it_was_written_to_is_made_again(
    store: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = batch_of(response(IDS[0], at_ms=NOW_MS - 20 * DAY_MS))
    with monkeypatch.context() as between:
        between.setattr(joining, "ensure_days", lambda *_: None)  # as if it had made the day and retention dropped it
        if store.dialect.name == "postgresql":
            with pytest.raises(StoreUnavailableError, match="no partition"):
                apply(store, READER, late, {})
    assert apply(store, READER, late, {}).responses == 1


def test_the_next_days_are_attached_ahead(store: Engine) -> None:
    if store.dialect.name == "sqlite":
        retire_days(store, BEFORE_MS, GOING)
        assert oldest_day(store) is None
        return
    tomorrow = "responses_" + (datetime.now(UTC).date() + timedelta(1)).strftime("%Y%m%d")
    with store.begin() as connection:
        connection.execute(text(f"DROP TABLE IF EXISTS {tomorrow}"))  # attached when the schema was made
    retire_days(store, BEFORE_MS, GOING)
    with store.connect() as connection:
        assert connection.execute(text(f"SELECT to_regclass('{tomorrow}')")).scalar_one() is not None
