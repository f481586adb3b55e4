"""The joiner's transaction on SQLite and on real Postgres: exactly once in effect, in whatever order it comes."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import Engine, func, select, text

from loop.content import decode_content
from loop.join import Batch, DeadLetter
from loop.log import LogUnavailableError, NewRecord, RecordTooLargeError
from loop.settings import StoreSettings
from loop.store import open_store, write
from loop.store.bulk import ROWS_PER_STATEMENT, open_bulk
from loop.store.dead_letters import (
    Chosen,
    count_dead_letters,
    count_unsent,
    list_dead_letters,
    replay_dead_letters,
    send_dead_letters,
)
from loop.store.engine import checkpoint
from loop.store.examples import count_labels, find_blocks, has_more_examples, stream_examples
from loop.store.joining import (
    Offsets,
    PositionMovedError,
    pending_votes,
    start_positions,
)
from loop.store.schema import dead_letters, erasures, responses, turn, turn_back, votes
from tests.join.joined import examples_in, read_examples
from tests.join.oracle import examples_of
from tests.join.traffic import (
    FEEDBACK,
    RESPONSES,
    START_MS,
    colliding_events,
    feedback,
    key_of_message_id,
    response,
    response_id,
)
from tests.services_real import RealPostgres
from tests.store.joined import READER, START, apply, batch_of, empty

ID = response_id("a" * 16, 1)
HLC = START_MS << 16


def deliver(store: Engine, events: list[NewRecord], random_: random.Random, sizes: list[int]) -> None:
    """Everything twice, in any order, in batches of any size."""
    order = events * 2
    random_.shuffle(order)
    while order:
        size = random_.choice(sizes)
        apply(store, READER, batch_of(*order[:size]), {})
        order = order[size:]


def check(store: Engine, seed: int, size: int, random_: random.Random) -> None:
    empty(store)
    events = colliding_events(seed, size)
    deliver(store, events, random_, [1, 2, 5, 30, 200])
    assert examples_in(store) == examples_of(events, RESPONSES)
    answered = set(examples_in(store))
    with store.connect() as connection:
        kept = connection.execute(select(func.count()).select_from(responses)).scalar_one()
        rows = connection.execute(select(votes.c.response_id, votes.c.choice_index, votes.c.pending)).all()
    assert kept == len({(r.topic, r.key, _id(r)) for r in events if r.topic == RESPONSES})
    assert not any(row.pending for row in rows if (row.response_id, row.choice_index) in answered)


def _id(record: NewRecord) -> str:
    (response,) = batch_of(record).responses
    return response


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 80), random_=st.randoms(use_true_random=False))
def test_everything_twice_in_any_order_gives_the_oracles_examples(
    sqlite: Engine, seed: int, size: int, random_: random.Random
) -> None:
    check(sqlite, seed, size, random_)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    opened = open_store(StoreSettings(url=SecretStr(f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/store.db")))
    yield opened
    opened.dispose()


@pytest.mark.parametrize("seed", range(6))
def test_the_same_on_both_stores(kept_store: Engine, seed: int) -> None:
    check(kept_store, seed, 80, random.Random(seed))


def test_a_vote_that_comes_first_waits_for_its_response(store: Engine) -> None:
    apply(store, READER, batch_of(feedback("f", "up", HLC, response_id=ID)), {})
    assert (examples_in(store), pending_votes(store)[0]) == ({}, 1)
    apply(store, READER, batch_of(response(ID)), {})
    assert (list(examples_in(store)), pending_votes(store)[0]) == ([(ID, 0)], 0)


@pytest.mark.parametrize("by", [{"response_id": ID}, {"message_id": "m"}], ids=lambda by: next(iter(by)))
def test_votes_on_what_was_not_to_be_stored_count_as_unstored_and_make_no_example(
    store: Engine, by: dict[str, str]
) -> None:
    id = response_id(key_of_message_id("m"), 1) if "message_id" in by else ID
    asked = response(id, n=0, stored=False, message_id="m")
    early, late, again = (feedback(f, "up", HLC + n, comment="so", **by) for n, f in enumerate("fgf"))
    batches = [[early], [asked], [asked, again], [late, late]]
    assert [apply(store, READER, batch_of(*batch), {}).unstored for batch in batches] == [0, 1, 0, 1]
    said = '{"stored": false}'  # is only text
    stored = response_id("b" * 16, 2)
    assert apply(store, READER, batch_of(response(stored, text=said)), {}).unstored == 0
    assert apply(store, READER, batch_of(feedback("h", "up", HLC, response_id=stored)), {}).unstored == 0
    assert [id for id, _ in examples_in(store)] == [stored]


def test_votes_that_name_none_of_several_choices_count_as_unclear_and_make_no_example(store: Engine) -> None:
    message, key = "m", key_of_message_id("m")
    several, single = response_id(key, 1), response_id(key, 2)
    up = feedback("f", "up", HLC, message_id=message, names_choice=False)
    assert apply(store, READER, batch_of(response(several, message_id=message, n=2)), {}).unclear == 0
    assert apply(store, READER, batch_of(up), {}).unclear == 1
    assert apply(store, READER, batch_of(up), {}).unclear == 0
    assert examples_in(store) == {}
    named = feedback("g", "up", HLC, message_id=message, choice_index=1, rater="ann")
    assert apply(store, READER, batch_of(named), {}).unclear == 0
    assert examples_in(store).keys() == {(several, 1)}
    later = response(single, message_id=message, at_ms=START_MS + 1)
    assert apply(store, READER, batch_of(later), {}).unclear == 0
    assert examples_in(store).keys() == {(single, 0)}


def test_a_newer_response_takes_over_the_votes_on_its_message(store: Engine) -> None:
    first, second = (response_id(key_of_message_id("m"), n) for n in (1, 2))
    vote = feedback("f", "down", HLC, message_id="m")
    apply(store, READER, batch_of(vote, response(first, message_id="m")), {})
    assert list(examples_in(store)) == [(first, 0)]
    apply(store, READER, batch_of(response(second, message_id="m", at_ms=START_MS + 1)), {})
    assert list(examples_in(store)) == [(second, 0)]


def test_a_retracted_vote_takes_its_example_away_and_duplicates_change_nothing(store: Engine) -> None:
    up, back = feedback("f", "up", HLC, response_id=ID), feedback("g", "retract", HLC + 1, response_id=ID)
    first = apply(store, READER, batch_of(response(ID), up), {})
    assert (first.responses, len(first.votes)) == (1, 1)
    again = apply(store, READER, batch_of(response(ID), up), {})
    assert (again.responses, again.votes) == (0, [])
    later = apply(store, READER, batch_of(response(ID, at_ms=START_MS + 1)), {})
    assert (later.responses, again.stale, later.stale) == (0, 0, 1)
    apply(store, READER, batch_of(back), {})
    assert examples_in(store) == {}
    apply(store, READER, batch_of(up), {})
    assert examples_in(store) == {}


def test_a_large_batch_tells_what_of_it_is_new(store: Engine) -> None:
    """Larger than one statement's rows, and no multiple of them."""
    many = [response(response_id(f"{n:016x}", n)) for n in range(2 * ROWS_PER_STATEMENT[0] + 7)]
    half, all_but_one = len(many) // 2, len(many) - 1
    assert apply(store, READER, batch_of(*many[:half]), {}).responses == half
    assert apply(store, READER, batch_of(*many[:all_but_one]), {}).responses == all_but_one - half
    assert apply(store, READER, batch_of(*many), {}).responses == 1
    with store.connect() as connection:
        assert connection.execute(select(func.count()).select_from(responses)).scalar_one() == len(many)


def test_lists_of_any_texts_are_found(store: Engine) -> None:
    odd = {"", " a ", 'quo"ted', "back\\slash", "\\", "com,ma", "{brace}", "NULL", "don't", "%s", "ü", "new\nline", "?"}
    with write(store) as connection:
        bulk = open_bulk(connection)
        bulk.insert(erasures, [("user", text, None) for text in odd])
        found = bulk.select("SELECT subject FROM erasures WHERE subject IN ??", odd | {"not there"})
    assert {text for (text,) in found} == odd


def test_a_zombie_changes_nothing(store: Engine) -> None:
    assert start_positions(store, READER, [3]) == {3: (0, 0)}
    apply(store, READER, batch_of(response(ID)), {3: (START, Offsets(10, 0))})
    other = response_id("b" * 16, 2)
    late = batch_of(response(other), feedback("f", "up", HLC, response_id=other))
    with pytest.raises(PositionMovedError, match=r"g is no longer at offsets \(0, 0\) of partition 3"):
        apply(store, READER, late, {3: (START, Offsets(12, 1))})
    assert examples_in(store) == {}
    assert start_positions(store, READER, [3]) == {3: (10, 0)}
    with store.connect() as connection:
        assert connection.execute(select(func.count()).select_from(responses)).scalar_one() == 1


def test_a_zombie_with_the_other_topics_records_changes_nothing(store: Engine) -> None:
    """Each would see only its own half of the pair, and nobody would join them."""
    start_positions(store, READER, [3])
    apply(store, READER, batch_of(response(ID)), {3: (START, Offsets(1, 0))})
    with pytest.raises(PositionMovedError):
        apply(store, READER, batch_of(feedback("f", "up", HLC, response_id=ID)), {3: (START, Offsets(0, 1))})


def test_topics_made_anew_are_read_from_their_beginning(store: Engine) -> None:
    start_positions(store, READER, [0, 1])
    apply(store, READER, batch_of(response(ID)), {1: (START, Offsets(10, 20))})
    anew = READER._replace(log_id="another")
    assert start_positions(store, anew, [1]) == {1: (0, 0)}
    with pytest.raises(PositionMovedError):
        apply(store, READER, batch_of(response(ID)), {1: (Offsets(10, 20), Offsets(11, 20))})
    assert start_positions(store, READER._replace(group="h"), [1]) == {1: (0, 0)}
    assert start_positions(store, anew, [0, 1]) == {0: (0, 0), 1: (0, 0)}


def test_a_nul_in_a_comment_is_kept_out_of_the_columns(store: Engine) -> None:
    vote = feedback("f", "up", HLC, response_id=ID, comment="a\0b", reasons=["\\u0000"])
    apply(store, READER, batch_of(vote, response(ID)), {})
    with store.connect() as connection:
        detail: Any = connection.execute(select(votes.c.detail)).scalar_one()
    assert detail["comment"] == "a\ufffdb"


class Outbox:
    """A log that keeps what is appended."""

    def __init__(self, most_bytes: int = 1 << 20) -> None:
        self.records: list[NewRecord] = []
        self.most_bytes = most_bytes

    def append(self, records: Any) -> None:
        if any(len(record.value) > self.most_bytes for record in records):
            raise RecordTooLargeError("too large")
        self.records += records


def test_letters_are_read_some_megabytes_at_a_time(store: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.store.dead_letters.PAGE_BYTES", 250)
    apply(store, READER, batch_of(*(NewRecord(RESPONSES, "k", b"x" * size) for size in (100, 100, 100, 400, 1))), {})
    sizes: list[list[int]] = []

    class Counted(Outbox):
        def append(self, records: Any) -> None:
            sizes.append([len(record.value) for record in records])

    counted: Any = Counted()
    assert send_dead_letters(store, counted, Chosen([RESPONSES])) == 5
    assert sizes == [[100, 100], [100], [400], [1]]


def test_dead_letters_are_sent_once_with_where_they_were(store: Engine) -> None:
    broken = NewRecord(RESPONSES, "k\0", b"\x00{", {})
    apply(store, READER, batch_of(broken, response(ID)), {})
    apply(store, READER, batch_of(broken), {})
    outbox: Any = Outbox()
    assert send_dead_letters(store, outbox, Chosen([RESPONSES], 1)) == 0  # another joiner's
    assert send_dead_letters(store, outbox, Chosen([RESPONSES], 0)) == 1
    assert send_dead_letters(store, outbox, Chosen([RESPONSES], 0)) == 0
    (sent,) = outbox.records
    assert (sent.topic, sent.value) == (f"{RESPONSES}.dlt", b"\x00{")
    assert sent.headers["thumbwheel-topic"] == RESPONSES
    assert (sent.headers["thumbwheel-partition"], sent.headers["thumbwheel-offset"]) == ("0", "0")
    assert "malformed" in sent.headers["thumbwheel-reason"]
    with store.connect() as connection:
        assert connection.execute(select(func.count()).where(dead_letters.c.sent)).scalar_one() == 1


def test_a_dead_letter_that_the_log_does_not_take_stops_no_other_and_stays_in_the_store(
    store: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [NewRecord(RESPONSES, "k", value, {}) for value in (b"{1", b"x" * 500, b"{3")]
    apply(store, READER, batch_of(*broken), {})
    outbox: Any = Outbox(most_bytes=100)
    assert send_dead_letters(store, outbox, Chosen([RESPONSES], 0)) == 2
    assert [record.value for record in outbox.records] == [b"{1", b"{3"]
    (said,) = caplog.records
    place = said.action, getattr(said, "thumbwheel-topic"), getattr(said, "thumbwheel-offset")  # type: ignore[attr-defined]
    assert place == ("dead_letter_too_large", RESPONSES, "1")
    assert (send_dead_letters(store, outbox, ALL), count_unsent(store)) == (0, 1)
    assert replay_dead_letters(store, outbox, ALL) == 2
    assert [letter["offset"] for letter in list_dead_letters(store, ALL, 9)] == [1]
    outbox.most_bytes = 1_000  # after a fix
    assert (send_dead_letters(store, outbox, ALL), replay_dead_letters(store, outbox, ALL)) == (1, 1)
    with store.connect() as connection:
        assert b"x" * 500 in {bytes(value) for value in connection.execute(select(dead_letters.c.value)).scalars()}


ALL = Chosen((RESPONSES, FEEDBACK))
LETTERS = [
    DeadLetter(topic, partition, offset, "broken", f"k{partition}", b"\x00%d" % offset)
    for topic in (FEEDBACK, RESPONSES)
    for partition in (0, 1)
    for offset in range(3)
]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (ALL, LETTERS),
        (Chosen([FEEDBACK]), LETTERS[:6]),
        (Chosen(["another"]), []),
        (Chosen([FEEDBACK, RESPONSES], partition=1), [*LETTERS[3:6], *LETTERS[9:]]),
        (Chosen([RESPONSES], partition=0, offset=2), LETTERS[8:9]),
        (Chosen([RESPONSES], offset=0), [LETTERS[6], LETTERS[9]]),
    ],
)
def test_the_chosen_dead_letters_are_replayed_as_they_were_and_once(
    store: Engine, monkeypatch: pytest.MonkeyPatch, chosen: Chosen, expected: list[DeadLetter]
) -> None:
    monkeypatch.setattr("loop.store.dead_letters.PAGE", 2)
    apply(store, READER, Batch(dead_letters=LETTERS), {})
    outbox: Any = Outbox()
    assert replay_dead_letters(store, outbox, chosen) == len(expected)
    assert replay_dead_letters(store, outbox, chosen) == 0
    assert sorted(outbox.records) == [NewRecord(letter.topic, letter.key, letter.value) for letter in expected]
    assert sum(replayed for _, replayed in count_dead_letters(store).values()) == len(expected)
    left = [letter for letter in LETTERS if letter not in expected]
    listed = [(found["topic"], found["partition"], found["offset"]) for found in list_dead_letters(store, ALL, 99)]
    assert listed == [letter[:3] for letter in left]
    assert send_dead_letters(store, outbox, ALL) == len(LETTERS)  # replayed or not


def test_a_replay_that_breaks_off_loses_none(store: Engine) -> None:
    class BreaksOff(Outbox):
        def append(self, records: Any) -> None:
            super().append(records)
            raise LogUnavailableError("acknowledgement lost")

    apply(store, READER, Batch(dead_letters=LETTERS), {})
    outbox: Any = BreaksOff()
    with pytest.raises(LogUnavailableError):
        replay_dead_letters(store, outbox, ALL)
    again: Any = Outbox()
    assert replay_dead_letters(store, again, ALL) == len(LETTERS)
    assert outbox.records  # sent twice, and counted once


def test_a_replay_leaves_what_becomes_a_dead_letter_again_meanwhile(store: Engine) -> None:
    class StillBroken(Outbox):
        """Behind it a joiner that refuses everything again."""

        def append(self, records: Any) -> None:
            super().append(records)
            offset = 100 + len(self.records)
            again = [DeadLetter(r.topic, 0, offset + n, "broken still", r.key, r.value) for n, r in enumerate(records)]
            apply(store, READER, Batch(dead_letters=again), {})

    apply(store, READER, Batch(dead_letters=LETTERS), {})
    outbox: Any = StillBroken()
    assert replay_dead_letters(store, outbox, ALL) == len(LETTERS)
    found = list_dead_letters(store, ALL, 99)
    assert {letter["reason"] for letter in found} == {"broken still"}
    assert len(found) == len(LETTERS)
    assert count_dead_letters(store)[FEEDBACK, 0] == (6, 3)


def test_dead_letters_of_a_log_made_anew_stand_beside_the_old_ones(store: Engine) -> None:
    anew = READER._replace(log_id="another log")
    apply(store, READER, Batch(dead_letters=LETTERS), {})
    for _ in range(2):
        apply(store, anew, Batch(dead_letters=[letter._replace(reason="anew") for letter in LETTERS[:2]]), {})
    outbox: Any = Outbox()
    assert send_dead_letters(store, outbox, ALL) == len(LETTERS) + 2
    assert replay_dead_letters(store, outbox, Chosen([FEEDBACK], partition=0, offset=1)) == 2
    found = list_dead_letters(store, Chosen([FEEDBACK], partition=0), 99)
    assert [(letter["offset"], letter["log_id"], letter["reason"]) for letter in found] == [
        (0, "another log", "anew"),
        (0, READER.log_id, "broken"),
        (2, READER.log_id, "broken"),
    ]


def test_a_replay_into_a_log_made_anew_leaves_what_becomes_a_dead_letter_there(store: Engine) -> None:
    class StillBroken(Outbox):
        """Behind it a joiner that refuses everything again, at the new log's low offsets."""

        def append(self, records: Any) -> None:
            super().append(records)
            again = [DeadLetter(r.topic, 0, n, "broken still", r.key, r.value) for n, r in enumerate(records)]
            apply(store, READER._replace(log_id="another log"), Batch(dead_letters=again), {})

    apply(store, READER, Batch(dead_letters=LETTERS[:3]), {})
    outbox: Any = StillBroken()
    assert replay_dead_letters(store, outbox, ALL) == 3
    assert count_dead_letters(store)[FEEDBACK, 0] == (3, 3)


def test_examples_stream_in_pages_and_are_counted(store: Engine) -> None:
    day_ms = 86_400_000
    ids = [response_id(f"{n:x}" * 16, n) for n in range(15)] + [f"cmpl-{n:016x}-{'0' * 36}" for n in range(5)]
    served = [response(id, at_ms=START_MS + n % 3 * day_ms, adapter="a@v000001") for n, id in enumerate(ids)]
    thumbs = [feedback(f"f{n}", "up" if n % 5 else "down", HLC, response_id=id) for n, id in enumerate(ids)]
    tie = [feedback(f"t{n}", v, HLC, response_id=ids[1], rater=v) for n, v in enumerate(("down",))]
    apply(store, READER, batch_of(*served, *thumbs, *tie), {})
    stored = read_examples(store)
    blocks = find_blocks(store, date.min)
    for rows in (100, 3, 1):
        found = list(stream_examples(store, blocks, page_rows=rows))
        assert [(e.response_id, e.votes) for e in found] == [(e.response_id, e.votes) for e in stored]
    assert decode_content(found[0].content).messages == (("user", "Is it?"),)
    assert found[0].votes[0].keys() == {"rater", "value", "weight", "source", "hlc"}
    since = date(2025, 10, 10)
    later = [e for e in stored if e.day >= since]
    found = list(stream_examples(store, find_blocks(store, since)))
    assert [e.response_id for e in found] == [e.response_id for e in later]
    assert 0 < len(later) < 20
    assert has_more_examples(store, date.min, 19)
    assert not has_more_examples(store, date.min, 20)
    assert count_labels(store, date.min) == 19  # a tie is no label
    assert count_labels(store, since) == sum(e.up != e.down for e in later)


@pytest.mark.parametrize("id", [ID, f"cmpl-{'0f' * 8}-{'0' * 36}"])
def test_ids_are_turned_and_back(id: str) -> None:
    assert turn_back(turn(id)) == id
    assert len(turn(id)) == len(id)


def test_a_checkpoint_beside_a_writer_moves_what_was_joined_into_the_file(tmp_path: Path) -> None:
    store = open_store(StoreSettings(url=SecretStr(f"sqlite:///{tmp_path}/store.db")))
    apply(store, READER, batch_of(response(ID)), {})
    with write(store):
        checkpoint(store)
        shutil.copy(tmp_path / "store.db", tmp_path / "without_journal.db")
    store.dispose()
    alone = open_store(StoreSettings(url=SecretStr(f"sqlite:///{tmp_path}/without_journal.db")))
    with alone.connect() as connection:
        assert connection.execute(select(func.count()).select_from(responses)).scalar_one() == 1
    alone.dispose()


def test_connections_are_bounded_and_waited_for(postgres: RealPostgres) -> None:
    opened = open_store(postgres.new_store().model_copy(update={"pool_size": 2}))
    query = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    )
    both = threading.Barrier(2)  # of more at once, one would be left alone

    def use(_: int) -> int:
        with opened.connect() as connection:
            both.wait(60)
            return int(connection.execute(query).scalar_one())

    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(use, range(8))) == 2
    opened.dispose()


def test_a_store_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected sqlite:///FILE or postgresql"):
        open_store(StoreSettings(url=SecretStr("mysql://u:secret@h/d")))
    with pytest.raises(ValueError, match="names no file"):
        open_store(StoreSettings(url=SecretStr("sqlite://")))
