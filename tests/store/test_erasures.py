"""An erasure takes out everything of a person or a response, and no replay brings it back, on both stores."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import Engine, delete, select

from loop.erasure import Kind
from loop.events import decode_feedback, decode_response, encode, key_of_message_id
from loop.join import Batch, DeadLetter
from loop.log import NewRecord
from loop.settings import StoreSettings
from loop.store import erasures, open_store, write
from loop.store.bulk import Bulk
from loop.store.erasures import _alone, erase, read_erased
from loop.store.schema import dead_letters, examples, rated_bodies, response_index, responses, votes
from tests.join.joined import examples_in
from tests.join.oracle import examples_of
from tests.join.traffic import FEEDBACK, RESPONSES, START_MS, colliding_events, feedback, response, response_id
from tests.services_real import RealPostgres
from tests.store.joined import READER, apply, batch_of, empty

HLC = START_MS << 16
ANN = "a0" * 16
ID = response_id("a" * 16, 1)


def owner(key: str) -> str:
    return [ANN, "b0" * 16, ""][int(key, 16) % 3]


def world(seed: int, size: int) -> list[NewRecord]:
    """Colliding events, whose responses were asked for by somebody, the same one for all of a key."""

    def told(record: NewRecord) -> NewRecord:
        if record.topic == FEEDBACK:
            given = decode_feedback(record.value)
            rater = ANN if given.data.rater == "ann" else given.data.rater
            # No two people use one feedback_id.
            data = msgspec.structs.replace(given.data, rater=rater, feedback_id=f"{rater}/{given.data.feedback_id}")
            return NewRecord(FEEDBACK, record.key, _encoded(data, given.id, record.key))
        event = decode_response(record.value)
        asked = msgspec.structs.replace(event.data, rater=owner(record.key) or None)
        return NewRecord(RESPONSES, record.key, _encoded(asked, event.id, record.key))

    return [told(record) for record in colliding_events(seed, size)]


def _encoded(data: object, event_id: str, key: str) -> bytes:
    return encode(data, event_id=event_id, key=key, source="test", now_ms=START_MS)  # type: ignore[arg-type]


def without(events: Iterable[NewRecord], kind: Kind, subject: str) -> list[NewRecord]:
    """What is left of the world: the oracle of what an erasure means."""

    def stays(record: NewRecord) -> bool:
        if record.topic == RESPONSES:
            data = decode_response(record.value).data
            return not (kind == "user" and data.rater == subject) and data.response_id != subject
        vote = decode_feedback(record.value).data
        on_own = kind == "user" and owner(record.key) == subject
        return vote.rater != subject and vote.response_id != subject and not on_own

    return [record for record in events if stays(record)]


def deliver(store: Engine, events: list[NewRecord], random_: random.Random) -> None:
    order = random_.sample(events, len(events))
    while order:
        size = random_.choice([1, 5, 30])
        apply(store, READER, batch_of(*order[:size]), {})
        order = order[size:]


class Killed(Exception):
    """The process, in the middle."""


def erase_with_a_kill(store: Engine, kind: Kind, subject: str, survives: int) -> None:
    """Erase; killed before the transaction behind the first `survives` ones, and called again."""
    alone, left = erasures._alone, [survives]

    def mortal(engine: Engine) -> AbstractContextManager[Bulk]:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return alone(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erasures, "_alone", mortal)
        patch.setattr(erasures, "ROWS", 2)
        try:
            erase(store, kind, subject, START_MS)
        except Killed:
            left[0] = 1_000_000
            erase(store, kind, subject, START_MS)


def check(store: Engine, seed: int, size: int, random_: random.Random, kind: Kind) -> None:
    empty(store)
    events = world(seed, size)
    subject = ANN if kind != "response" else _one_response(events, random_)
    deliver(store, random_.sample(events, random_.randrange(len(events) + 1)), random_)
    erase_with_a_kill(store, kind, subject, random_.randrange(6))
    deliver(store, events, random_)
    deliver(store, events, random_)
    assert examples_in(store) == examples_of(without(events, kind, subject), RESPONSES)
    with store.connect() as connection:
        given = connection.execute(select(votes.c.rater, votes.c.response_id)).all()
        bodies = [*connection.execute(select(responses.c.body)), *connection.execute(select(rated_bodies.c.body))]
        indexed = connection.execute(select(response_index)).all()
    asked = [decode_response(bytes(body)).data for (body,) in bodies]
    assert subject not in {row.rater for row in given} | {row.response_id for row in given}
    assert not [data for data in asked if data.response_id == subject or (kind == "user" and data.rater == subject)]
    assert len(indexed) == len({data.response_id for data in asked})


def _one_response(events: list[NewRecord], random_: random.Random) -> str:
    ids = sorted({decode_response(r.value).data.response_id for r in events if r.topic == RESPONSES})
    return random_.choice(ids) if ids else ID


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 60),
    random_=st.randoms(use_true_random=False),
    kind=st.sampled_from(["rater", "user"]),
)
def test_no_replay_brings_an_erased_person_back(
    sqlite: Engine, seed: int, size: int, random_: random.Random, kind: Kind
) -> None:
    check(sqlite, seed, size, random_, kind)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    opened = open_store(StoreSettings(url=SecretStr(f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/store.db")))
    yield opened
    opened.dispose()


@pytest.mark.parametrize("kind", ["rater", "user"])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_on_both_stores(kept_store: Engine, seed: int, kind: Kind) -> None:
    check(kept_store, seed, 80, random.Random(seed), kind)


def test_an_erased_response_goes_with_its_votes_and_stays_out(store: Engine) -> None:
    other = response_id("b" * 16, 2)
    events = [
        *(response(ID), feedback("f", "up", HLC, response_id=ID, rater="bob", comment="about ann")),
        *(response(other), feedback("g", "down", HLC, response_id=other, rater="bob")),
    ]
    apply(store, READER, batch_of(*events), {})
    assert erase(store, "response", ID, START_MS) == {"responses": 1, "votes": 1, "dead_letters": 0}
    assert erase(store, "response", ID, START_MS) == {"responses": 0, "votes": 0, "dead_letters": 0}
    apply(store, READER, batch_of(*events), {})
    assert list(examples_in(store)) == [(other, 0)]
    with store.connect() as connection:
        assert connection.execute(select(votes.c.response_id)).scalars().all() == [other]


def test_votes_by_message_id_on_an_erased_response_do_not_move_to_the_one_before(store: Engine) -> None:
    first, second = (response_id(key_of_message_id("m"), n) for n in (1, 2))
    events = [
        *(response(first, message_id="m"), response(second, message_id="m", at_ms=START_MS + 1)),
        *(feedback("f", "down", HLC, message_id="m"), feedback("g", "up", HLC, response_id=first)),
    ]
    apply(store, READER, batch_of(*events), {})
    erase(store, "response", second, START_MS)
    for _ in range(2):
        assert {id: example["up"] for id, example in examples_in(store).items()} == {(first, 0): 1}
        assert all(example["down"] == 0 for example in examples_in(store).values())
        apply(store, READER, batch_of(*events), {})


def test_a_users_response_that_comes_after_the_erasure_is_left_out_with_the_votes_on_it(store: Engine) -> None:
    erase(store, "user", ANN, START_MS)
    vote = feedback("f", "up", HLC, response_id=ID, rater="bob", comment="about ann")
    apply(store, READER, batch_of(vote), {})
    apply(store, READER, batch_of(response(ID, rater=ANN)), {})
    apply(store, READER, batch_of(vote), {})
    with store.connect() as connection:
        assert [
            len(connection.execute(select(table)).all()) for table in (votes, responses, examples, rated_bodies)
        ] == [0] * 4
    assert ID in read_erased(store).responses


def test_a_rated_response_older_than_the_stores_retention_is_found_in_its_example(store: Engine) -> None:
    apply(store, READER, batch_of(response(ID, rater=ANN), feedback("f", "up", HLC, response_id=ID, rater="bob")), {})
    with write(store) as connection:
        connection.execute(delete(responses))
    assert erase(store, "user", ANN, START_MS)["votes"] == 1
    assert examples_in(store) == {}


def test_dead_letters_that_name_an_erased_person_go_and_stay_out(store: Engine) -> None:
    letters = [
        DeadLetter(FEEDBACK, 0, n, "broken", "k", value) for n, value in enumerate([b"{ " + ANN.encode(), b"{ bob"])
    ]
    apply(store, READER, Batch(dead_letters=letters), {})
    assert erase(store, "rater", ANN, START_MS)["dead_letters"] == 1
    apply(store, READER, Batch(dead_letters=letters), {})
    with store.connect() as connection:
        assert connection.execute(select(dead_letters.c.value)).scalars().all() == [b"{ bob"]


def test_an_erasure_survives_a_crash_of_the_server(postgres: RealPostgres) -> None:
    store = open_store(postgres.new_store())
    with _alone(store) as bulk:  # a joiner's transactions are not on disk at once: the log has them
        assert bulk.select("SHOW synchronous_commit") == [("on",)]
    store.dispose()
