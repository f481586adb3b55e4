"""One torture run: load and faults for a bounded time, then everything must be as if nothing had happened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from loop.events import decode_feedback, decode_response
from loop.log import EventLog, Record
from loop.log.open import open_log
from loop.settings import LogSettings
from loop.store import open_store
from tests.join.joined import examples_in, is_joined, told
from tests.join.oracle import Examples, examples_of
from tests.services_real import RealKafka, RealPostgres
from tests.torture.faults import Faults
from tests.torture.load import Promised, put_load
from tests.torture.stage import Stage

GATEWAYS, JOINERS, USERS = 2, 2, 16
SETTLE_S = 180.0
LEAST_EVENTS = 500  # on a slow machine, the faults may be over before them


async def torture(
    kafka: RealKafka,
    postgres: RealPostgres,
    folder: Path,
    *,
    seed: int,
    faults: int,
    seconds: float,
    show: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
    """`events` in Kafka in the end, `faults` done, and what is wrong: `lost`, `doubled`, `wrong_label`.

    Raises AssertionError where a process crashed, or where all is not joined within SETTLE_S after the last fault.
    """
    stage = Stage(kafka, postgres, folder, GATEWAYS, JOINERS)
    promised, stop = Promised(), asyncio.Event()
    try:
        load = asyncio.create_task(put_load([gateway.url for gateway in stage.gateways], USERS, seed, promised, stop))
        harm = Faults(stage, seed, faults, time.monotonic() + seconds, show)
        await harm.run()
        while len(promised.responses) + len(promised.feedback) < LEAST_EVENTS:
            assert not load.done(), "the load has ended by itself"
            await asyncio.sleep(0.1)
        stop.set()
        await load
        show("waiting until everything is joined")
        found = await asyncio.to_thread(settle_and_judge, stage, promised)
    finally:
        stage.kill()
    return {"events": found.pop("events"), "faults": harm.done, **found}


def settle_and_judge(stage: Stage, promised: Promised) -> dict[str, int]:
    """What `torture` returns, but for the faults, once all is joined. Raises AssertionError as that does."""
    wait_until(lambda: not stage.unsent(), "sent to Kafka")
    for gateway in stage.gateways:
        gateway.end()
    settings = stage.settings
    log, store = told(lambda: open_log(settings.log)), open_store(settings.store)
    wait_until(lambda: is_joined(store, log, settings), "joined")
    for joiner in stage.joiners:
        joiner.end()
    records = read_all(log, settings.log)
    found = judge(examples_in(store), records, promised, settings.log.responses_topic)
    log.close()
    store.dispose()
    return found


def judge(joined: Examples, records: list[Record], promised: Promised, responses_topic: str) -> dict[str, int]:
    """The store against the oracle, which reads the whole log at once, and the log against what was promised."""
    expected = examples_of(records, responses_topic)
    responses = {decode_response(r.value).data.response_id for r in records if r.topic == responses_topic}
    feedback = {decode_feedback(r.value).data.feedback_id for r in records if r.topic != responses_topic}
    unlike = [id for id in joined.keys() & expected.keys() if joined[id] != expected[id]]
    twice = [id for id in unlike if _thumbs(joined, id) > _thumbs(expected, id)]
    missing = len(promised.responses - responses) + len(promised.feedback - feedback)
    return {
        "events": len(records),
        "lost": missing + len(expected.keys() - joined.keys()),
        "doubled": len(joined.keys() - expected.keys()) + len(twice),
        "wrong_label": len(unlike) - len(twice),
    }


def _thumbs(examples: Examples, id: tuple[str, int]) -> int:
    return int(examples[id]["up"] + examples[id]["down"])


def read_all(log: EventLog, settings: LogSettings) -> list[Record]:
    """Everything in both topics, in order within each partition."""
    topics = (settings.responses_topic, settings.feedback_topic)
    size = told(lambda: sum(sum(log.end_offsets(topic).values()) for topic in topics))
    consumer = log.consumer("torture-judge", topics)
    records: list[Record] = []

    def is_read() -> bool:
        records.extend(consumer.poll(5_000, 0.5))
        return len(records) == size

    wait_until(is_read, "read back")
    consumer.close()
    return records


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Raises AssertionError after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    while not is_so():
        assert time.monotonic() < deadline, f"not {what} within {SETTLE_S} s"
        time.sleep(0.2)  # how often we look, within the deadline
