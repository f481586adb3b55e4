"""What the command line shows of the event log: how far it is joined, and what of it broke the contract."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from sqlalchemy import Engine

from loop.log import EventLog
from loop.settings import LogSettings, Settings
from loop.store.dead_letters import SUFFIX, Chosen, count_dead_letters, list_dead_letters
from loop.store.joining import Offsets, Reader, read_positions

LISTED = 50


def choose(settings: LogSettings, topic: str | None, partition: int | None, offset: int | None) -> Chosen:
    """Dead letters of our topics, or of one of them. Raises ValueError for another topic, that nobody would read."""
    topics = (settings.responses_topic, settings.feedback_topic)
    if topic is not None and topic not in topics:
        raise ValueError(f"--topic {topic}: expected {' or '.join(topics)}")
    return Chosen(topics if topic is None else (topic,), partition, offset)


def describe_log(store: Engine, log: EventLog, settings: Settings, chosen: Chosen) -> dict[str, Any]:
    """{"partitions": [{topic, partition, end, position, lag, dead_letters, replayed}], "dead_letters": [{topic,
    partition, offset, log_id, reason, sent}]}: every partition's next offset, the joiner's, the records between them
    and how many dead letters are to be replayed or were; the first LISTED of the chosen ones to be replayed. Of a
    partition whose broker is away, end and lag are None.

    Raises LogUnavailableError, and what the store raises.
    """
    counts = count_dead_letters(store)
    # Before the ends: so no lag is below 0.
    positions = read_positions(store, Reader(settings.joiner.group, log.identity()))
    partitions = []
    for n, topic in enumerate((settings.log.responses_topic, settings.log.feedback_topic)):
        ends = log.end_offsets(topic)
        for partition in sorted(ends.keys() | positions.keys()):
            end, position = ends.get(partition), positions.get(partition, Offsets(0, 0))[n]
            waiting, replayed = counts.get((topic, partition), (0, 0))
            offsets = {"end": end, "position": position, "lag": None if end is None else end - position}
            letters = {"dead_letters": waiting, "replayed": replayed}
            partitions.append({"topic": topic, "partition": partition, **offsets, **letters})
    return {"partitions": partitions, "dead_letters": list_dead_letters(store, chosen, LISTED)}


def show_log(described: dict[str, Any], console: Console) -> None:
    """What `describe_log` gave, as tables."""
    figures = ("partition", "end", "joined", "lag", "dead letters", "replayed")
    partitions = Table("topic", *map(_number, figures))
    for state in described["partitions"]:
        partitions.add_row(*("?" if value is None else str(value) for value in state.values()))
    console.print(partitions)
    letters = Table("topic", _number("partition"), _number("offset"), f"in {SUFFIX}", "why it is a dead letter")
    for found in described["dead_letters"]:
        place = (found["topic"], str(found["partition"]), str(found["offset"]))
        letters.add_row(*place, "yes" if found["sent"] else "not yet", escape(found["reason"]))
    if letters.row_count:
        console.print(letters)
    if letters.row_count == LISTED:
        console.print(f"Those are the first {LISTED}; --topic, --partition and --offset choose others.")


def _number(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)
