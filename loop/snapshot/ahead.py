"""What comes next is made while its user has what came before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], count: int = 1) -> Iterator[T]:
    """The items, up to `count` of them made by a thread before they are asked for."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = deque([thread.submit(next, items, None) for _ in range(count)])
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, items, None))
            yield item
