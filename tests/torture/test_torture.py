"""The short form of `make torture`, and that its judge sees what is wrong."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from loop.log import Record
from tests.join.oracle import examples_of
from tests.join.traffic import RESPONSES, START_MS, feedback, response, response_id
from tests.services_real import RealKafka, RealPostgres
from tests.torture.faults import KINDS
from tests.torture.load import Promised
from tests.torture.run import judge, torture

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


async def test_one_fault_of_each_kind_loses_nothing_and_doubles_nothing(
    apache_kafka: RealKafka, postgres: RealPostgres, tmp_path: Path
) -> None:
    shown: list[str] = []
    found = await torture(apache_kafka, postgres, tmp_path, seed=1, faults=len(KINDS), seconds=60, show=shown.append)
    gc.collect()  # kafka-python leaves sockets of its attempts to connect
    assert found.pop("events") > 500, shown
    assert found == {"faults": len(KINDS), "lost": 0, "doubled": 0, "wrong_label": 0}, shown


def test_the_judge_sees_what_is_wrong() -> None:
    ids = [response_id(f"{n:016x}", n) for n in range(4)]
    votes = [feedback(f"f{n}", "up", START_MS << 16, response_id=id) for n, id in enumerate(ids)]
    events = [*(response(id) for id in ids), *votes]
    records = [Record(r.topic, 0, n, r.key, r.value, 0) for n, r in enumerate(events)]
    right = examples_of(records, RESPONSES)
    promised = Promised(set(ids), {f"f{n}" for n in range(4)})
    assert judge(right, records, promised, RESPONSES) == {"events": 8, "lost": 0, "doubled": 0, "wrong_label": 0}
    lost, doubled, wrong, _ = ((id, 0) for id in ids)
    joined = {id: dict(example) for id, example in right.items() if id != lost}
    joined[doubled]["up"] = 2
    joined[wrong] |= {"up": 0, "down": 1}
    joined["nobody's", 0] = joined[wrong]
    promised.feedback.add("never seen")
    found = judge(joined, records, promised, RESPONSES)
    assert found == {"events": 8, "lost": 2, "doubled": 2, "wrong_label": 1}
