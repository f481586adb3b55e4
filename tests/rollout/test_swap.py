"""Moves of the traffic, on a real store and with engines that can be made to fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select

from loop import registry
from loop.rollout.canary import Thumbs
from loop.rollout.swap import Fleet, go_live, roll_back, start_canary, unload_unneeded
from loop.rollout.vllm import EngineError
from loop.rollout.watch import judge, thumbs, tick
from loop.settings import EngineSettings, RolloutSettings
from loop.store.engine import write
from loop.store.routes import RouteChangedError, acknowledge_route, read_route, write_route
from loop.store.schema import examples
from tests.contents import content_columns

NOW = 1_800_000_000_000


@dataclass
class FaultyReplica:
    """An engine in memory, to inject faults that the real one cannot be asked for."""

    url: str = "http://engine"
    loaded: dict[str, Path] = field(default_factory=dict)
    down: bool = False
    refuses: str | None = None

    def is_healthy(self) -> bool:
        return not self.down

    def models(self) -> set[str]:
        return {"base", *self.loaded}

    def load(self, name: str, path: Path) -> None:
        if self.down or name == self.refuses:
            raise EngineError(f"engine {self.url} refused {name}")
        self.loaded[name] = path

    def unload(self, name: str) -> None:
        self.loaded.pop(name, None)

    def probe(self, name: str) -> None:
        assert name in self.loaded


def fleet_of(store: Engine, *replicas: FaultyReplica, **settings: Any) -> Fleet:
    return Fleet(store, replicas, EngineSettings(alias="support", base_name="base"), RolloutSettings(**settings))  # type: ignore[arg-type]


def approved(store: Engine, run_id: str) -> str:
    adapter = registry.register_candidate(
        store, alias="support", parent=None, run_id=run_id, path=f"adapters/{run_id}", manifest={}, now_ms=NOW
    )
    with write(store) as connection:
        registry.move(connection, adapter.version, "approved", "gate: pass", NOW)
    return adapter.version


def states(store: Engine) -> dict[str, str]:
    return {adapter.version: adapter.state for adapter in registry.list_adapters(store)}


def vote(store: Engine, adapter: str, *, up: int, down: int, at_ms: int) -> None:
    """Conversations with one vote each on an adapter's answers."""
    with write(store) as connection:
        for i in range(up + down):
            connection.execute(
                insert(examples).values(
                    turned_id=f"{adapter}-{at_ms}-{i}",
                    choice_index=0,
                    key="k",
                    day=__import__("datetime").date(2026, 1, 1),
                    adapter=adapter,
                    arm="live",
                    conversation_id=f"{adapter}-{at_ms}-{i}",
                    up=int(i < up),
                    down=int(i >= up),
                    votes=[],
                    voted_at_ms=at_ms,
                    **content_columns(),
                )
            )


def test_versions_count_up_and_a_run_registers_once(store: Engine) -> None:
    assert [approved(store, "a"), approved(store, "b"), approved(store, "a")] == ["v000001", "v000002", "v000001"]


def test_going_live_retires_the_predecessor_and_keeps_it_loaded(store: Engine) -> None:
    replica = FaultyReplica()
    fleet = fleet_of(store, replica)
    first, second = approved(store, "a"), approved(store, "b")
    go_live(fleet, first, "test", NOW)
    route = go_live(fleet, second, "test", NOW + 1)
    assert (route.live, route.generation) == (second, 2)
    assert states(store) == {first: "retired", second: "live"}
    unload_unneeded(fleet, NOW + 2)
    assert set(replica.loaded) == {"support@v000001", "support@v000002"}


def test_nothing_serves_that_has_not_passed_the_gate(store: Engine) -> None:
    version = registry.register_candidate(
        store, alias="support", parent=None, run_id="a", path="a", manifest={}, now_ms=NOW
    ).version
    for move in (go_live, lambda *args: start_canary(args[0], args[1], 0.1, *args[2:])):
        with pytest.raises(registry.RegistryError, match="candidate"):
            move(fleet_of(store, FaultyReplica()), version, "test", NOW)
    assert read_route(store, "support").live is None


def test_a_replica_that_cannot_load_leaves_the_route_as_it_was(store: Engine) -> None:
    version = approved(store, "a")
    fleet = fleet_of(store, FaultyReplica(), FaultyReplica(refuses=f"support@{version}"))
    with pytest.raises(EngineError):
        go_live(fleet, version, "test", NOW)
    assert read_route(store, "support").generation == 0
    assert states(store)[version] == "approved"


def test_rolling_back_returns_to_the_predecessor_and_then_to_the_base(store: Engine) -> None:
    fleet = fleet_of(store, FaultyReplica())
    first, second = approved(store, "a"), approved(store, "b")
    go_live(fleet, first, "test", NOW)
    go_live(fleet, second, "test", NOW + 1)
    assert roll_back(fleet, "worse", NOW + 2).live == first
    assert states(store) == {first: "live", second: "rolled_back"}
    assert roll_back(fleet, "worse", NOW + 3).live is None
    with pytest.raises(registry.RegistryError, match="nothing to roll back"):
        roll_back(fleet, "worse", NOW + 4)
    assert [change.state for change in registry.adapter_history(store, second)] == [
        "candidate", "approved", "live", "rolled_back",
    ]  # fmt: skip


def test_a_canary_is_taken_back_without_touching_the_live_version(store: Engine) -> None:
    fleet = fleet_of(store, FaultyReplica())
    first, second = approved(store, "a"), approved(store, "b")
    go_live(fleet, first, "test", NOW)
    start_canary(fleet, second, 0.1, "test", NOW + 1)
    assert roll_back(fleet, "worse", NOW + 2) == read_route(store, "support")
    assert (read_route(store, "support").live, read_route(store, "support").canary) == (first, None)


def test_two_moves_at_once_cannot_both_win(store: Engine) -> None:
    route = read_route(store, "support")
    with write(store) as connection:
        write_route(connection, route, NOW)
    with pytest.raises(RouteChangedError), write(store) as connection:
        write_route(connection, route, NOW)


def test_nothing_is_unloaded_while_a_gateway_may_still_route_to_it(store: Engine) -> None:
    replica = FaultyReplica()
    fleet = fleet_of(store, replica, keep_loaded=1)
    first, second = approved(store, "a"), approved(store, "b")
    go_live(fleet, first, "test", NOW)
    go_live(fleet, second, "test", NOW)
    acknowledge_route(store, "slow", 2, 1, NOW)  # routes by 2, but a request of generation 1 is still open
    acknowledge_route(store, "dead", 1, 1, NOW - 3_600_000)
    assert unload_unneeded(fleet, NOW) == []
    acknowledge_route(store, "slow", 2, 2, NOW)
    assert unload_unneeded(fleet, NOW) == [f"support@{first}"]


def test_a_restarted_engine_gets_its_adapters_again(store: Engine) -> None:
    well, restarted = FaultyReplica("http://a"), FaultyReplica("http://b")
    fleet = fleet_of(store, well, restarted, watch_s=1)
    version = approved(store, "a")
    go_live(fleet, version, "test", NOW)
    restarted.loaded.clear()
    tick(fleet, NOW + 5_000)
    assert set(restarted.loaded) == {f"support@{version}"}


def test_worse_thumbs_roll_the_canary_back_and_good_ones_widen_it_until_it_is_live(store: Engine) -> None:
    fleet = fleet_of(store, FaultyReplica(), canary_steps=[0.1, 0.5], canary_step_s=10, canary_min_votes=20)
    bad, good = approved(store, "a"), approved(store, "b")
    start_canary(fleet, bad, 0.1, "test", NOW)
    vote(store, "base", up=80, down=20, at_ms=NOW + 1)
    vote(store, f"support@{bad}", up=8, down=30, at_ms=NOW + 1)
    assert (decision := judge(fleet, NOW + 2)) is not None
    assert decision.action == "roll_back"
    assert states(store)[bad] == "rolled_back"
    start_canary(fleet, good, 0.1, "test", NOW + 100)
    vote(store, f"support@{good}", up=35, down=3, at_ms=NOW + 200)
    for now, share, live in [(5_000, 0.1, None), (11_000, 0.5, None), (22_000, 0.0, good)]:
        judge(fleet, NOW + now)
        route = read_route(store, "support")
        assert (route.canary_share, route.live) == (share, live)


def test_a_new_live_adapter_with_worse_thumbs_gives_way_to_its_predecessor(store: Engine) -> None:
    fleet = fleet_of(store, FaultyReplica(), canary_steps=[])
    first, second = approved(store, "a"), approved(store, "b")
    go_live(fleet, first, "test", NOW)
    vote(store, f"support@{first}", up=90, down=10, at_ms=NOW + 1)
    go_live(fleet, second, "test", NOW + 2)
    vote(store, f"support@{second}", up=10, down=30, at_ms=NOW + 3)
    judge(fleet, NOW + 4)
    assert states(store) == {first: "live", second: "rolled_back"}


def test_what_was_only_concluded_hides_no_thumb(store: Engine) -> None:
    vote(store, "base", up=1, down=0, at_ms=NOW)
    with write(store) as connection:  # a later answer of the conversation, which was copied
        rated = connection.execute(select(examples)).one()._asdict()
        copied = rated | {"turned_id": "later", "up": 0, "voted_at_ms": NOW + 1}
        connection.execute(insert(examples).values(**copied))
    assert thumbs(fleet_of(store, FaultyReplica()), None, 0) == Thumbs(1, 0)
