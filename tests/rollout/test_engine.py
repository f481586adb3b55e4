"""The moves of the traffic on the real vLLM: load, probe, unload, and what happens to an engine that was restarted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sqlalchemy import Engine

from loop import registry
from loop.kto.artifacts import write_adapter
from loop.kto.model import attach_lora, load_base
from loop.rollout.swap import Fleet, go_live, unload_unneeded
from loop.rollout.vllm import EngineError, Replica
from loop.rollout.watch import tick
from loop.settings import EngineSettings, RolloutSettings, TrainSettings
from loop.store.engine import write
from tests.conftest import RealEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def register_approved(store: Engine, folder: Path, run_id: str) -> str:
    adapter = registry.register_candidate(
        store, alias="support", parent=None, run_id=run_id, path=str(folder), manifest={}, now_ms=1
    )
    with write(store) as connection:
        registry.move(connection, adapter.version, "approved", "gate: pass", 1)
    return adapter.version


@pytest.fixture(scope="module")
def adapter(engine: RealEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the demo's base as training leaves it before the first step."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(attach_lora(load_base(engine.model_dir, "none", "float32"), TrainSettings()), folder, "base")
    return folder


def test_an_engine_that_was_restarted_gets_its_adapters_again(engine: RealEngine, store: Engine, adapter: Path) -> None:
    replica = Replica(engine.url)
    fleet = Fleet(
        store, [replica], EngineSettings(alias="support", base_name=engine.base_name), RolloutSettings(keep_loaded=1)
    )
    first, second = (register_approved(store, adapter, run) for run in ("a", "b"))
    go_live(fleet, first, "test", int(time.time() * 1000))
    go_live(fleet, second, "test", int(time.time() * 1000))
    assert {fleet.name(first), fleet.name(second)} <= replica.models()
    assert unload_unneeded(fleet, int(time.time() * 1000)) == [fleet.name(first)]
    engine.restart()
    assert replica.models() == {engine.base_name}
    tick(fleet, int(time.time() * 1000))
    assert replica.models() == {engine.base_name, fleet.name(second)}
    replica.probe(fleet.name(second))


def test_what_the_engine_refuses_is_said_with_its_reason(engine: RealEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)load_lora_adapter.*nothing-here.*answered \d+: .*support@nothing"):
        Replica(engine.url).load("support@nothing", tmp_path / "nothing-here")
    with pytest.raises(EngineError, match="is vLLM running there"):
        Replica("http://127.0.0.1:9").models()
