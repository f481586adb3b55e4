"""The short form of `make torture`, and that its judge sees what is wrong."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from pathlib import Path

from loop.events import decode_feedback
from loop.log import Record
from loop.log.open import open_log
from tests.join.joined import told
from tests.join.oracle import examples_of
from tests.join.traffic import RESPONSES, START_MS, feedback, response, response_id
from tests.services_real import RealKafka, RealPostgres
from tests.torture.faults import KINDS
from tests.torture.load import Promised, put_load
from tests.torture.run import LEAST_EVENTS, judge, read_all, settle_and_judge, torture, wait_until
from tests.torture.stage import Service, Stage

SPOOLED = "thumbwheel_gateway_spool_records"
AWAY_S = 40.0


async def test_one_fault_of_each_kind_loses_nothing_and_doubles_nothing(
    apache_kafka: RealKafka, postgres: RealPostgres, tmp_path: Path
) -> None:
    shown: list[str] = []
    found = await torture(apache_kafka, postgres, tmp_path, seed=1, faults=len(KINDS), seconds=400, show=shown.append)
    assert found.pop("events") >= LEAST_EVENTS, shown
    assert found == {"faults": len(KINDS), "lost": 0, "doubled": 0, "wrong_label": 0}, shown


async def test_with_kafka_away_under_load_all_arrives_afterwards_in_order(
    apache_kafka: RealKafka, postgres: RealPostgres, tmp_path: Path
) -> None:
    kafka = apache_kafka
    stage = Stage(kafka, postgres, tmp_path, gateways=1, joiners=1)
    (gateway,) = stage.gateways
    promised, stop = Promised(), asyncio.Event()
    try:
        load = asyncio.create_task(put_load([gateway.url], 16, 2, promised, stop))
        await asyncio.to_thread(wait_until, lambda: sum_of_ends(stage) > 100, "in Kafka")
        refused = len(promised.refused)
        await asyncio.to_thread(kafka.stop, kill=True)
        await asyncio.to_thread(wait_until, lambda: stage.unsent() > 300, "waiting")
        await asyncio.to_thread(wait_until, lambda: metric(gateway, SPOOLED) > 300, "shown")
        # Longer than the client's `send` may block, and than a batch is waited for before a new producer is made.
        await asyncio.sleep(AWAY_S)
        assert promised.refused[refused:] == []
        assert has_said(gateway, "forward_failed") == 1
        gateway.end(signal.SIGKILL)
        gateway.start()
        await asyncio.to_thread(wait_until, lambda: stage.unsent() > 600, "waiting for longer")
        await asyncio.to_thread(wait_until, lambda: has_said(gateway, "forward_failed") == 2, "said so again")
        await asyncio.to_thread(kafka.start)
        await asyncio.to_thread(wait_until, lambda: has_said(gateway, "forward_resumed") == 1, "said to go on")
        stop.set()
        await load
        await asyncio.to_thread(wait_until, lambda: metric(gateway, SPOOLED) == 0, "shown")
        found = await asyncio.to_thread(settle_and_judge, stage, promised)
    finally:
        stage.kill()
    assert found.pop("events") > 700
    assert found == {"lost": 0, "doubled": 0, "wrong_label": 0}
    log = open_log(stage.settings.log)
    stamps: dict[str, dict[str, int]] = {}
    for record in read_all(log, stage.settings.log):
        if record.topic == stage.settings.log.feedback_topic:
            event = decode_feedback(record.value)
            stamps.setdefault(record.key, {}).setdefault(event.id, event.data.hlc)  # what was sent again counts once
    log.close()
    assert any(len(of_key) > 1 for of_key in stamps.values())
    assert all(list(of_key.values()) == sorted(of_key.values()) for of_key in stamps.values())


def metric(service: Service, name: str) -> float:
    """The one of that name."""
    with urllib.request.urlopen(f"{service.metrics_url}/metrics", timeout=60) as answer:
        (line,) = [line for line in answer.read().decode().splitlines() if line.startswith(name + " ")]
    return float(line.split()[1])


def has_said(service: Service, action: str) -> int:
    """How often."""
    return service.log.read_text().count(f'"action": "{action}"')


def sum_of_ends(stage: Stage) -> int:
    settings = stage.settings.log
    log = told(lambda: open_log(settings))
    topics = (settings.responses_topic, settings.feedback_topic)
    ends = told(lambda: sum(sum(log.end_offsets(topic).values()) for topic in topics))
    log.close()
    return ends


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
