"""Reading examples: by day, and within a day by turned_id, which is the order that they are stored in.

Several processes may share the work. A page is a transaction of its own, so that a long read holds back neither the
checkpoints of SQLite's journal nor Postgres' vacuum. What happens to examples while others are read is seen, or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from itertools import pairwise, starmap
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, func, select

from loop.store.engine import reaching
from loop.store.schema import examples, turn_back


class Example(msgspec.Struct, frozen=True, gc=False):
    """One example, as it is stored: see `loop.store.schema` and `loop.content`."""

    turned_id: str
    choice_index: int
    adapter: str
    conversation_id: str | None
    votes_json: str
    """One entry for each rater whose last vote stands, sorted by rater:
    {"rater", "value": "up" | "down", "weight", "source", "hlc", "correction" (where there is one)}."""
    sketch: bytes
    content: bytes

    @property
    def votes(self) -> list[dict[str, Any]]:
        """`votes_json`, decoded."""
        votes: list[dict[str, Any]] = json.loads(self.votes_json)
        return votes

    @property
    def response_id(self) -> str:
        """As everybody else knows it."""
        return turn_back(self.turned_id)


class Block(NamedTuple):
    """The examples of a day with a turned_id in [low, high)."""

    day: date
    low: str
    high: str


PAGE_ROWS = 500
_DAY_SHARES = 8
_PAGE = (
    "SELECT turned_id, choice_index, adapter, conversation_id, {votes}, sketch, content FROM examples"
    " WHERE day = {p} AND (turned_id, choice_index) > ({p}, {p}) AND turned_id < {p}"
    " ORDER BY turned_id, choice_index LIMIT {p}"
)


def find_blocks(engine: Engine, since_day: date) -> list[Block]:
    """What there is from `since_day` on, in order and without a gap, in blocks to be shared out.

    Raises StoreUnavailableError.
    """
    days: list[date] = []
    with reaching(engine), engine.connect() as connection:
        later = examples.c.day >= since_day
        while day := connection.execute(select(func.min(examples.c.day)).where(later)).scalar_one():
            days.append(day)
            later = examples.c.day > day
    return [Block(day, low, high) for day in days for low, high in pairwise(["", *_cuts(day), "~"])]


def _cuts(day: date) -> list[str]:
    """Where the day's ids are cut: at some times, which most begin with, and at some hashes, which imported ones do."""
    begin_ms = (day.toordinal() - date(1970, 1, 1).toordinal()) * 86_400_000
    times = [begin_ms + n * 86_400_000 // _DAY_SHARES for n in range(_DAY_SHARES)]
    return sorted([f"{ms >> 16:08x}-{ms & 0xFFFF:04x}" for ms in times] + [f"{n:x}" for n in range(1, 16)])


def stream_examples(engine: Engine, blocks: Iterable[Block], *, page_rows: int = PAGE_ROWS) -> Iterator[Example]:
    """The examples of the blocks, in order; in memory for one page at most. Raises StoreUnavailableError."""
    with reaching(engine), engine.connect() as connection:
        read_page = _sqlite_pages(connection) if connection.dialect.name == "sqlite" else _postgres_pages(connection)
        for block in blocks:
            after, is_more = (block.low, -1), True
            while is_more:
                rows = read_page(block, after, page_rows)
                yield from starmap(Example, rows)
                is_more = len(rows) == page_rows
                after = rows[-1][:2] if rows else after


_Page = Callable[[Block, tuple[str, int], int], list[tuple[Any, ...]]]
"""Reads so many rows of a block, after a (turned_id, choice_index)."""


def _sqlite_pages(connection: Connection) -> _Page:
    connection.detach()  # a connection of its own, closed at the end: what it read once it need not keep
    connection.exec_driver_sql("PRAGMA cache_size = -2048")
    connection.commit()
    cursor: Any = connection.connection.cursor()
    query = _PAGE.format(p="?", votes="votes")

    def read(block: Block, after: tuple[str, int], rows: int) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = cursor.execute(query, (str(block.day), *after, block.high, rows)).fetchall()
        return found

    return read


def _postgres_pages(connection: Connection) -> _Page:
    driver: Any = connection.connection.driver_connection
    # Binary: half of the time. Never prepared: a plan for whatever values might not go by the index.
    execute = partial(driver.cursor(binary=True).execute, _PAGE.format(p="%s", votes="votes::text"), prepare=False)

    def read(block: Block, after: tuple[str, int], rows: int) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = execute((block.day, *after, block.high, rows)).fetchall()
        connection.commit()
        return found

    return read


def has_more_examples(engine: Engine, since_day: date, than: int) -> bool:
    """Whether there are more examples from `since_day` on than these."""
    query = select(examples.c.day).where(examples.c.day >= since_day).offset(than).limit(1)
    with engine.connect() as connection:
        return connection.execute(query).first() is not None


def count_labels(engine: Engine, since_day: date) -> int:
    """How many examples from `since_day` on have a label: more thumbs of one value than of the other."""
    query = select(func.count()).where(examples.c.day >= since_day, examples.c.up != examples.c.down)
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())
