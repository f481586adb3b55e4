"""The joiner's transaction: a batch of events in, the join's state and the log positions moved, all or nothing.

It knows the tables and the order of work; which vote counts, and what an example is, `loop.join` decides. Everything it
touches in one transaction has the keys of the batch's partitions, so joiners of other partitions never meet it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DBAPIError

from loop.join import (
    Batch,
    DeadLetter,
    Joined,
    Response,
    Vote,
    is_earlier_copy,
    is_earlier_response,
    join,
    last_response,
)
from loop.store.bulk import Bulk, open_bulk
from loop.store.engine import write
from loop.store.partitions import ensure_days
from loop.store.schema import dead_letters, examples, positions, response_index, responses, votes

_INDEX = "response_id, key, day, message_id, started_at_ms, event_id"
_VOTE = "key, feedback_id, response_id, message_id, choice_index, rater, value, weight, source, hlc, event_id"


class PositionMovedError(RuntimeError):
    """Somebody else has joined these records already; the batch was rolled back."""


class StoreUnavailableError(ConnectionError):
    """The store cannot be reached now, or ended the transaction; the batch was rolled back, to be tried again."""


@dataclass(frozen=True)
class Applied:
    """What one batch brought that was not known before."""

    responses: int
    votes: list[Vote]


Span = tuple[int, int]
"""The offset a partition stood at, and where it stands behind the batch."""


def apply(engine: Engine, group: str, batch: Batch, spans: Mapping[tuple[str, int], Span]) -> Applied:
    """Join a batch and move the group's positions, in one transaction.

    Raises PositionMovedError, StoreUnavailableError; nothing was changed then.
    """
    with reaching(engine):
        ensure_days(engine, {response.day for response, _ in batch.responses.values()})
        with write(engine) as connection:
            bulk = open_bulk(connection)
            # 1. Bulk data comes near before any lock is taken: a process that is stopped here holds up nobody.
            bulk.stage(responses, [(r.day, r.key, r.response_id, event) for r, event in batch.responses.values()])
            bulk.stage(response_index, [tuple(response) for response, _ in batch.responses.values()])
            # 2. Whoever moves the positions has these partitions to himself until he commits.
            _advance(bulk, group, spans)
            # 3. Facts before what follows from them.
            added, replaced = _add_responses(bulk, batch)
            changed, displaced = _add_votes(bulk, batch.votes)
            _mark_pending(bulk, added, replaced)
            # 4. What the facts mean, for the responses that something new says something about.
            _rejoin(bulk, batch, added, replaced, [*changed, *displaced])
            bulk.insert(dead_letters, [_dead_row(letter) for letter in batch.dead_letters])
    return Applied(len(added), changed)


@contextmanager
def reaching(engine: Engine) -> Iterator[None]:
    """Driver errors that pass by themselves (server away, connection cut, lock not had) as StoreUnavailableError."""
    driver = engine.dialect.loaded_dbapi
    try:
        yield
    except DBAPIError as exc:
        if not (exc.connection_invalidated or isinstance(exc.orig, (driver.OperationalError, driver.InternalError))):
            raise
        raise StoreUnavailableError(f"store: {exc.orig}") from exc
    except (driver.OperationalError, driver.InternalError) as exc:
        raise StoreUnavailableError(f"store: {exc}") from exc


def start_positions(engine: Engine, group: str, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Where the group reads on in each (topic, partition); 0 where it never was. Raises StoreUnavailableError."""
    wanted = sorted(places)
    with reaching(engine), write(engine) as connection:
        bulk = open_bulk(connection)
        bulk.insert(positions, [(group, topic, partition, 0) for topic, partition in wanted])
        rows = bulk.select("SELECT topic, partition, next FROM positions WHERE consumer_group = ?", group)
    found = {(topic, partition): next_ for topic, partition, next_ in rows}
    return {place: found[place] for place in wanted}


def count_pending(engine: Engine) -> int:
    """Votes whose response was not seen yet."""
    with reaching(engine), engine.connect() as connection:
        return int(connection.execute(select(func.count()).where(votes.c.pending)).scalar_one())


def _advance(bulk: Bulk, group: str, spans: Mapping[tuple[str, int], Span]) -> None:
    for (topic, partition), (start, end) in sorted(spans.items()):  # one order for all: no deadlocks
        moved = bulk.execute(
            "UPDATE positions SET next = ? WHERE consumer_group = ? AND topic = ? AND partition = ? AND next = ?",
            *(end, group, topic, partition, start),
        )
        if moved != 1:
            raise PositionMovedError(f"{group} is no longer at {topic}[{partition}] offset {start}")


def _add_responses(bulk: Bulk, batch: Batch) -> tuple[list[Response], list[Response]]:
    """Insert the staged responses; returns those that are new or earlier, and what stood under their ids before."""
    known = _index(bulk, "response_id", batch.responses)
    added, replaced = [], []
    for response, _ in batch.responses.values():
        other = known.get(response.response_id)
        if other is not None and is_earlier_response(response, other):
            bulk.execute(
                "DELETE FROM responses WHERE day = ? AND key = ? AND response_id = ?",
                *(other.day, other.key, other.response_id),
            )
            bulk.execute("DELETE FROM response_index WHERE response_id = ?", other.response_id)
            replaced.append(other)
        elif other is not None:
            continue
        added.append(response)
    bulk.insert_staged(responses)
    bulk.insert_staged(response_index)
    return added, replaced


def _add_votes(bulk: Bulk, arrived: Mapping[tuple[str, str], Vote]) -> tuple[list[Vote], list[Vote]]:
    """Keep the earliest copy of each; returns the votes that are new or earlier, and what stood in their place."""
    rows = bulk.select(f"SELECT {_VOTE} FROM votes WHERE key IN ??", {key for key, _ in arrived})
    known = {(vote.key, vote.feedback_id): vote for vote in (Vote(*row) for row in rows)}
    changed = [vote for id, vote in arrived.items() if id not in known or is_earlier_copy(vote, known[id])]
    displaced = [known[id] for id in ((vote.key, vote.feedback_id) for vote in changed) if id in known]
    seen = _index(bulk, "response_id", {vote.response_id for vote in changed if vote.response_id})
    under = _index(bulk, "message_id", {vote.message_id for vote in changed if vote.message_id})
    messages = {response.message_id for response in under.values()}
    bulk.upsert(
        votes,
        [
            (*vote[:11], _detail(vote), vote.response_id not in seen and vote.message_id not in messages)
            for vote in changed
        ],
    )
    return changed, displaced


def _mark_pending(bulk: Bulk, added: Iterable[Response], replaced: Iterable[Response]) -> None:
    """Votes that waited for an added response are pending no more; those on a message that lost its only one are."""
    ids = {response.response_id for response in added}
    if ids:
        bulk.execute("UPDATE votes SET pending = false WHERE pending AND response_id IN ??", ids)
    if lost := {response.message_id for response in replaced if response.message_id}:
        bulk.execute("UPDATE votes SET pending = true WHERE message_id IN ??", lost)
    if messages := {response.message_id for response in _index(bulk, "message_id", lost).values()} | {
        response.message_id for response in added if response.message_id
    }:
        bulk.execute("UPDATE votes SET pending = false WHERE pending AND message_id IN ??", messages)


def _rejoin(
    bulk: Bulk, batch: Batch, added: Iterable[Response], replaced: Collection[Response], moved: Iterable[Vote]
) -> None:
    """Make the examples anew of every response that a new response or a changed vote bears on."""
    ids = {r.response_id for r in added} | {v.response_id for v in moved if v.response_id}
    messages = {r.message_id for r in (*added, *replaced) if r.message_id}
    messages |= {v.message_id for v in moved if v.message_id}
    # Most responses have no votes: keep those that have, or had one until a copy of it displaced it.
    rated = {id for (id,) in bulk.select("SELECT DISTINCT response_id FROM votes WHERE response_id IN ??", ids)}
    rated |= {vote.response_id for vote in moved if vote.response_id} | {r.response_id for r in replaced}
    touched = _index(bulk, "response_id", rated)
    messages |= {response.message_id for response in touched.values() if response.message_id}
    voted = {id for (id,) in bulk.select("SELECT DISTINCT message_id FROM votes WHERE message_id IN ??", messages)}
    voted |= {vote.message_id for vote in moved if vote.message_id}
    # A new response takes over the votes on its message, so the others under that message are touched too.
    under = _index(bulk, "message_id", voted)
    touched |= under
    standing = _votes_on(bulk, touched, under.values(), voted)
    events = _events(bulk, batch, [response for id, response in touched.items() if standing[id]])
    joined = [example for id, event in events.items() for example in join(touched[id], standing[id], event)]
    keys = {(example.response_id, example.choice_index) for example in joined}
    stood = bulk.select("SELECT response_id, choice_index FROM examples WHERE response_id IN ??", set(touched))
    bulk.execute_many(
        "DELETE FROM examples WHERE response_id = ? AND choice_index = ?", [row for row in stood if row not in keys]
    )
    bulk.upsert(examples, [_example_row(example) for example in joined])


def _votes_on(
    bulk: Bulk, touched: Mapping[str, Response], under: Iterable[Response], voted: Collection[str | None]
) -> dict[str, list[Vote]]:
    """All votes that mean each touched response, by its id or as the last one under its message."""
    found: dict[str, list[Vote]] = {id: [] for id in touched}
    by_message: dict[str | None, list[Response]] = {}
    for response in under:
        by_message.setdefault(response.message_id, []).append(response)
    for row in bulk.select(f"SELECT {_VOTE} FROM votes WHERE response_id IN ??", set(touched)):
        found[row[2]].append(Vote(*row))
    for row in bulk.select(f"SELECT {_VOTE} FROM votes WHERE message_id IN ??", voted):
        if row[3] in by_message:
            found[last_response(by_message[row[3]]).response_id].append(Vote(*row))
    return found


def _events(bulk: Bulk, batch: Batch, wanted: Iterable[Response]) -> dict[str, bytes]:
    """The responses' events: from the batch where it brought the one that counts, else from the store."""
    found, missing = {}, []
    for response in wanted:
        brought = batch.responses.get(response.response_id)
        if brought is not None and brought[0] == response:
            found[response.response_id] = brought[1]
        else:
            missing.append(response)
    rows = bulk.select(
        "SELECT i.response_id, body FROM response_index i JOIN responses r"
        " ON r.day = i.day AND r.key = i.key AND r.response_id = i.response_id WHERE i.response_id IN ??",
        {response.response_id for response in missing},
    )
    return found | {id: bytes(body) for id, body in rows}


def _index(bulk: Bulk, column: str, values: Collection[str | None]) -> dict[str, Response]:
    rows = bulk.select(f"SELECT {_INDEX} FROM response_index WHERE {column} IN ??", set(values))
    # Postgres gives the day as a date.
    return {row[0]: Response(row[0], row[1], str(row[2]), *row[3:]) for row in rows}


def _detail(vote: Vote) -> str:
    text = msgspec.json.encode({"comment": vote.comment, "reasons": vote.reasons}).decode()
    return text.replace("\\u0000", "\\ufffd")  # Postgres' JSON does not hold it


def _example_row(e: Joined) -> tuple[object, ...]:
    standing = msgspec.json.encode(e.votes).decode()
    return (
        *(e.response_id, e.choice_index, e.key, e.day, e.adapter, e.arm, e.conversation_id),
        *(e.up, e.down, standing, e.voted_at_ms, e.event),
    )


def _dead_row(letter: DeadLetter) -> tuple[object, ...]:
    reason, key = letter.reason.replace("\x00", "\ufffd"), letter.key.replace("\x00", "\ufffd")[:256]
    return (letter.topic, letter.partition, letter.offset, reason, key, letter.value, False)
