"""The joiner's transaction: a batch of events in, the join's state and the log positions moved, all or nothing.

It knows the tables and the order of work; which vote counts, and what an example is, `loop.join` decides. Everything it
touches in one transaction has the keys of the batch's partitions, so joiners of other partitions never meet it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import msgspec
from sqlalchemy import Engine, func, select

from loop.content import encode_content
from loop.erasure import Erased
from loop.events import decode_response
from loop.join import (
    ONLY_CHOICE,
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
from loop.minhash import sketches
from loop.store.bulk import Bulk, Staged, open_bulk, staged_form
from loop.store.engine import end_stopped, reaching, write
from loop.store.partitions import ensure_days
from loop.store.schema import (
    IS_PENDING,
    dead_letters,
    erasures,
    examples,
    positions,
    rated_bodies,
    response_index,
    responses,
    turn,
    turn_back,
    votes,
)

logger = logging.getLogger(__name__)

_VOTE = (
    "key, feedback_id, response_id, message_id, choice_index, rater, value, weight, source, hlc, event_id, correction"
)
_SAYS_UNSTORED = re.compile(rb'"stored"\s*:\s*false')
# A response as it comes near: its row in `response_index`, then what its body's row has beside it.
_STAGED = [*response_index.columns, responses.c.day, responses.c.body]


class PositionMovedError(RuntimeError):
    """Somebody else has joined these records already; the batch was rolled back."""


@dataclass(frozen=True)
class Applied:
    """What one batch brought that was not known before."""

    responses: int
    votes: list[Vote]
    stale: int
    """Later versions of responses that are there already: they change nothing."""
    unstored: int
    """Votes that have met a response which was not to be stored: they make no example."""
    unclear: int
    """Votes that have met a response of several choices and name none of them: they make no example either."""


class Reader(NamedTuple):
    """Whose positions are meant: a consumer group's, in a log. Offsets in one log mean nothing in another."""

    group: str
    log_id: str


class Offsets(NamedTuple):
    """Where a partition number is read on, in each of the two topics."""

    responses: int
    feedback: int


Span = tuple[Offsets, Offsets]
"""Where a partition stood, and where it stands behind the batch."""


class Prepared(NamedTuple):
    """A batch, what of it comes near in the form in which the store takes it, and the days that it is of."""

    batch: Batch
    rows: Staged
    days: set[str]


def prepare(engine: Engine, batch: Batch) -> Prepared:
    """The part of `apply` that needs no connection: its caller may do it while an earlier batch is applied."""
    rows = [(turn(id), *r[1:], r.day, event) for id, (r, event) in batch.responses.items()]
    rows.sort(key=itemgetter(0))  # the order of the indexes
    return Prepared(batch, staged_form(engine, _STAGED, rows), {row[-2] for row in rows})


def apply(engine: Engine, reader: Reader, prepared: Prepared, spans: Mapping[int, Span]) -> Applied:
    """Join a batch and move the reader's positions, in one transaction.

    Raises PositionMovedError, StoreUnavailableError; nothing was changed then.
    """
    with reaching(engine):
        ensure_days(engine, prepared.days)
        with write(engine) as connection:
            bulk = open_bulk(connection)
            # 1. Bulk data comes near before any lock is taken: a process that is stopped here holds up nobody.
            bulk.stage(_STAGED, prepared.rows)
            # 2. Whoever moves the positions has these partitions to himself until he commits.
            _advance(bulk, reader, spans)
            # 3. What is erased stays out; read behind the positions, so that no erasure falls between.
            batch, left_out = _without_erased(bulk, prepared.batch)
            # 4. Facts before what follows from them.
            added, replaced, inserted, stale = _add_responses(bulk, batch, left_out)
            changed, displaced = _add_votes(bulk, batch.votes)
            # 5. What the facts mean, for the responses that something new says something about.
            unstored, unclear = _rejoin(bulk, batch, added, replaced, [*changed, *displaced])
            bulk.insert(dead_letters, _dead_rows(batch.dead_letters, reader.log_id))
    return Applied(inserted, changed, stale, unstored, unclear)


def start_positions(engine: Engine, reader: Reader, partitions: Iterable[int]) -> dict[int, Offsets]:
    """Where the reader goes on in each partition; at 0 where it never was, or was in another log of the same name.

    Raises StoreUnavailableError.
    """
    wanted = sorted(partitions)
    with reaching(engine):
        if ended := end_stopped(engine):
            logger.warning("%d transactions of processes that were stopped in them are ended", ended)
    with reaching(engine), write(engine) as connection:
        bulk = open_bulk(connection)
        bulk.insert(positions, [(reader.group, partition, reader.log_id, 0, 0) for partition in wanted])
        anew = bulk.execute(
            "UPDATE positions SET log_id = ?, responses_next = 0, feedback_next = 0"
            " WHERE consumer_group = ? AND partition IN ?? AND log_id <> ?",
            *(reader.log_id, reader.group, set(wanted), reader.log_id),
        )
        rows = bulk.select(
            "SELECT partition, responses_next, feedback_next FROM positions WHERE consumer_group = ?", reader.group
        )
    if anew:
        logger.warning("%d partitions are of a new log (%s): read from its beginning", anew, reader.log_id)
    found = {partition: Offsets(*next_) for partition, *next_ in rows}
    return {partition: found[partition] for partition in wanted}


def read_positions(engine: Engine, reader: Reader) -> dict[int, Offsets]:
    """Where the reader stands in each partition that it ever had; changes nothing, unlike `start_positions`.

    Raises StoreUnavailableError.
    """
    columns = positions.c.partition, positions.c.responses_next, positions.c.feedback_next
    query = select(*columns).where(positions.c.consumer_group == reader.group, positions.c.log_id == reader.log_id)
    with reaching(engine), engine.connect() as connection:
        return {partition: Offsets(*next_) for partition, *next_ in connection.execute(query)}


def pending_votes(engine: Engine) -> tuple[int, int | None]:
    """How many votes' response was not seen yet, and when the first of them was given (Unix ms)."""
    query = select(func.count(), func.min(votes.c.hlc)).select_from(votes).where(IS_PENDING)
    with reaching(engine), engine.connect() as connection:
        count, oldest = connection.execute(query).one()
    return int(count), None if oldest is None else int(oldest) >> 16


def _advance(bulk: Bulk, reader: Reader, spans: Mapping[int, Span]) -> None:
    for partition, (start, end) in sorted(spans.items()):  # one order for all: no deadlocks
        moved = bulk.execute(
            "UPDATE positions SET responses_next = ?, feedback_next = ? WHERE consumer_group = ? AND partition = ?"
            " AND log_id = ? AND responses_next = ? AND feedback_next = ?",
            *(*end, reader.group, partition, reader.log_id, *start),
        )
        if moved != 1:
            raise PositionMovedError(f"{reader.group} is no longer at offsets {tuple(start)} of partition {partition}")


def take_out_responses(bulk: Bulk, ids: Collection[str]) -> tuple[int, int]:
    """Erase responses, their examples and the votes on them, for good; returns how many responses and votes it was.

    Needs the partitions to itself, as `take_out_votes` does.
    """
    known = _known(bulk, ids)
    messages = {response.message_id for response in known.values() if response.message_id is not None}
    last = {id: last_response(response for response in _under(bulk, {id}).values()) for id in messages}
    keys = {response.key for response in last.values() if response.response_id in known}
    days, turned = {response.day for response in known.values()}, {turn(id) for id in ids}
    rows = bulk.execute("DELETE FROM response_index WHERE turned_id IN ??", turned)
    if known:
        bulk.execute("DELETE FROM responses WHERE day IN ?? AND turned_id IN ??", days, turned)
        bulk.execute("DELETE FROM examples WHERE day IN ?? AND turned_id IN ??", days, turned)
        bulk.execute("DELETE FROM rated_bodies WHERE turned_id IN ??", turned)
    return rows, _block(bulk, ids, keys)


def take_out_votes(bulk: Bulk, rater: str, limit: int) -> int:
    """Delete up to `limit` of a rater's votes and make the examples anew that they stood on; returns how many."""
    taken = [Vote(*row) for row in bulk.select(f"SELECT {_VOTE} FROM votes WHERE rater = ? LIMIT ?", rater, limit)]
    bulk.execute_many(
        "DELETE FROM votes WHERE key = ? AND feedback_id = ?", [(vote.key, vote.feedback_id) for vote in taken]
    )
    _rejoin(bulk, Batch(), [], [], taken)
    return len(taken)


def _block(bulk: Bulk, ids: Collection[str], keys: Collection[str]) -> int:
    """Tombstones for responses, and for the votes by message id under these keys; the votes go, returns how many."""
    bulk.insert(erasures, [("response", id, None) for id in ids] + [("message", key, None) for key in keys])
    votes = bulk.execute("DELETE FROM votes WHERE response_id IN ??", set(ids))
    return votes + bulk.execute("DELETE FROM votes WHERE key IN ?? AND message_id IS NOT NULL", set(keys))


def _without_erased(bulk: Bulk, batch: Batch) -> tuple[Batch, set[str]]:
    """The batch without what is erased, and the turned ids of the responses that it lacks now."""
    if not bulk.select("SELECT 1 FROM erasures LIMIT 1"):
        return batch, set()
    subjects = {*batch.responses, *batch.raters.values()}
    subjects.update(name for vote in batch.votes.values() for name in (vote.rater, vote.key, vote.response_id) if name)
    named = bulk.select("SELECT kind, subject FROM erasures WHERE subject IN ??", subjects)
    erased = Erased.of(named)
    gone = {id for id in batch.responses if erased.has_response(id, batch.raters.get(id))}
    if new := gone - erased.responses:  # of a user: from now on they are known by their ids too
        keys = {response.key for id in new if (response := batch.responses[id][0]).message_id is not None}
        _block(bulk, new, keys)
        erased = Erased.of([*named, *(("response", id) for id in new), *(("message", key) for key in keys)])
    letters = batch.dead_letters
    if letters:
        anywhere = Erased.of(bulk.select("SELECT kind, subject FROM erasures WHERE kind <> 'message'"))
        letters = [letter for letter in letters if not anywhere.is_in(letter.value)]
    kept = Batch(
        {id: brought for id, brought in batch.responses.items() if id not in gone},
        {id: vote for id, vote in batch.votes.items() if not erased.has_vote(vote)},
        letters,
    )
    return kept, {turn(id) for id in gone}


def _add_responses(
    bulk: Bulk, batch: Batch, left_out: Collection[str]
) -> tuple[list[Response], list[Response], int, int]:
    """Insert the staged responses but those `left_out`; returns those that count now, what stood under their ids, and
    how many are new and how many stale.
    """
    added = [response for response, _ in batch.responses.values()]
    replaced: list[Response] = []
    later: set[str] = set()
    inserted = bulk.insert_staged(response_index, without=left_out)
    if inserted < len(added):  # else all are new, as nearly always: no need to look
        for other in _known(bulk, batch.responses).values():
            id, (response, _) = turn(other.response_id), batch.responses[other.response_id]
            if is_earlier_response(response, other):
                bulk.execute("DELETE FROM responses WHERE day = ? AND turned_id = ?", other.day, id)
                bulk.upsert(response_index, [(id, *response[1:])])
                replaced.append(other)
            elif other != response:
                later.add(id)
        added = [response for response in added if turn(response.response_id) not in later]
    bulk.insert_staged(responses, without=later.union(left_out))
    return added, replaced, inserted, len(later)


def _add_votes(bulk: Bulk, arrived: Mapping[tuple[str, str], Vote]) -> tuple[list[Vote], list[Vote]]:
    """Keep the earliest copy of each; returns the votes that are new or earlier, and what stood in their place."""
    rows = bulk.select(f"SELECT {_VOTE} FROM votes WHERE key IN ??", {key for key, _ in arrived})
    known = {(vote.key, vote.feedback_id): vote for vote in (Vote(*row) for row in rows)}
    changed = [vote for id, vote in arrived.items() if id not in known or is_earlier_copy(vote, known[id])]
    displaced = [known[id] for id in ((vote.key, vote.feedback_id) for vote in changed) if id in known]
    # All are pending until what they mean has been looked for.
    bulk.upsert(votes, [(*vote[:11], _detail(vote), True, vote.correction) for vote in changed])
    return changed, displaced


def _rejoin(
    bulk: Bulk, batch: Batch, added: Iterable[Response], replaced: Collection[Response], moved: Iterable[Vote]
) -> tuple[int, int]:
    """Make the examples anew of every response that a new response or a changed vote bears on; returns how many votes
    have met one that was not to be stored, and how many one of whose several choices they name none.
    """
    ids = {r.response_id for r in added} | {v.response_id for v in moved if v.response_id}
    messages = {r.message_id for r in (*added, *replaced) if r.message_id}
    messages |= {v.message_id for v in moved if v.message_id}
    # Most responses have no votes: keep those that have, or had one until a copy of it displaced it.
    rated = {id for (id,) in bulk.select("SELECT DISTINCT response_id FROM votes WHERE response_id IN ??", ids)}
    rated |= {vote.response_id for vote in moved if vote.response_id} | {r.response_id for r in replaced}
    touched = _known(bulk, rated)
    messages |= {response.message_id for response in touched.values() if response.message_id}
    voted = {id for (id,) in bulk.select("SELECT DISTINCT message_id FROM votes WHERE message_id IN ??", messages)}
    voted |= {vote.message_id for vote in moved if vote.message_id}
    # A new response takes over the votes on its message, so the others under that message are touched too.
    under = _under(bulk, voted)
    touched |= under
    standing = _votes_on(bulk, touched, under.values(), voted)
    events = _events(bulk, batch, [response for id, response in touched.items() if standing[id]])
    unstored = _new_votes(bulk, [vote for id, event in events.items() if _is_unstored(event) for vote in standing[id]])
    nameless = ((vote, events[id]) for id in events for vote in standing[id] if vote.choice_index == ONLY_CHOICE)
    unclear = _new_votes(bulk, [vote for vote, event in nameless if len(decode_response(event).data.choices) > 1])
    _mark_pending(bulk, set(touched), voted, {response.message_id for response in under.values()})
    joined = [example for id, event in events.items() for example in join(touched[id], standing[id], event)]
    _write_examples(bulk, joined, events, {response.day for response in (*touched.values(), *replaced)}, touched)
    return unstored, unclear


def _write_examples(
    bulk: Bulk, joined: Sequence[Joined], events: Mapping[str, bytes], days: Collection[str], touched: Collection[str]
) -> None:
    """Make the examples of the touched responses these; `days` are those on which they have or had any."""
    ids = {id: turn(id) for id in touched}
    keys = {(example.day, ids[example.response_id], example.choice_index) for example in joined}
    rows = bulk.select(
        "SELECT day, turned_id, choice_index FROM examples WHERE day IN ?? AND turned_id IN ??", days, {*ids.values()}
    )
    stood = [(str(day), *rest) for day, *rest in rows]
    bulk.execute_many(
        "DELETE FROM examples WHERE day = ? AND turned_id = ? AND choice_index = ?",
        [row for row in stood if row not in keys],
    )
    sketched = sketches([example.content.asked for example in joined])
    bulk.upsert(examples, [_example_row(example, sketch) for example, sketch in zip(joined, sketched, strict=True)])
    rated = {ids[example.response_id]: events[example.response_id] for example in joined}
    bulk.upsert(rated_bodies, sorted(rated.items()))
    bulk.execute("DELETE FROM rated_bodies WHERE turned_id IN ??", {id for _, id, _ in stood} - rated.keys())


def _new_votes(bulk: Bulk, votes: Sequence[Vote]) -> int:
    """How many of the votes have waited for their response until now."""
    rows = bulk.select("SELECT key, feedback_id FROM votes WHERE pending AND key IN ??", {vote.key for vote in votes})
    waited = set(map(tuple, rows))
    return sum((vote.key, vote.feedback_id) in waited for vote in votes)


def _is_unstored(event: bytes) -> bool:
    return _SAYS_UNSTORED.search(event) is not None and not decode_response(event).data.stored


def _mark_pending(bulk: Bulk, ids: set[str], voted: set[str], answered: set[str | None]) -> None:
    """Votes on known responses, or on messages with one, wait no more; votes on a message that lost its only one do."""
    for column, found in (("response_id", ids), ("message_id", voted & answered)):
        if found:
            bulk.execute(f"UPDATE votes SET pending = false WHERE pending AND {column} IN ??", found)
    if lost := voted - answered:
        bulk.execute("UPDATE votes SET pending = true WHERE NOT pending AND message_id IN ??", lost)


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
        "SELECT turned_id, body FROM responses WHERE day IN ?? AND turned_id IN ??",
        *({response.day for response in missing}, {turn(response.response_id) for response in missing}),
    )
    found |= {turn_back(id): bytes(body) for id, body in rows}
    # Of a rated response that is older than the store's retention, this is all that is left.
    left = {turn(response.response_id) for response in missing if response.response_id not in found}
    old = bulk.select("SELECT turned_id, body FROM rated_bodies WHERE turned_id IN ??", left)
    return found | {turn_back(id): bytes(body) for id, body in old}


def _known(bulk: Bulk, ids: Iterable[str]) -> dict[str, Response]:
    """Those of the responses that the store has."""
    return _indexed(bulk, "turned_id", {turn(id) for id in ids})


def _under(bulk: Bulk, message_ids: Collection[str]) -> dict[str, Response]:
    """All responses under these message ids."""
    return _indexed(bulk, "message_id", set(message_ids))


def _indexed(bulk: Bulk, column: str, values: set[str]) -> dict[str, Response]:
    query = f"SELECT turned_id, message_id, started_at_ms, event_id FROM response_index WHERE {column} IN ??"
    found = (Response(turn_back(row[0]), *row[1:]) for row in bulk.select(query, values))
    return {response.response_id: response for response in found}


def _detail(vote: Vote) -> str:
    text = msgspec.json.encode({"comment": vote.comment, "reasons": vote.reasons}).decode()
    return text.replace("\\u0000", "\\ufffd")  # Postgres' JSON does not hold it


def _example_row(e: Joined, sketch: bytes) -> tuple[object, ...]:
    standing = msgspec.json.encode(e.votes).decode()
    return (
        *(e.day, turn(e.response_id), e.choice_index, e.key, e.adapter, e.arm, e.conversation_id),
        *(e.up, e.down, standing, e.voted_at_ms, sketch, encode_content(e.content)),
    )


def _dead_rows(letters: Iterable[DeadLetter], log_id: str) -> list[tuple[object, ...]]:
    now_ms = int(time.time() * 1000)

    def text(what: str) -> str:
        return what.replace("\x00", "\ufffd")

    return [
        (*letter[:3], log_id, text(letter.reason), text(letter.key)[:256], letter.value, False, False, now_ms)
        for letter in letters
    ]
