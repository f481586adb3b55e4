"""Routes and the gateways' acknowledgements of them, in the store."""

from __future__ import annotations

from sqlalchemy import Engine, delete, func, insert, select, update

from loop.rollout.routing import Route
from loop.store.engine import write
from loop.store.schema import route_acks, routes


class RouteChangedError(RuntimeError):
    """Somebody else changed the route in between."""


def read_route(engine: Engine, alias: str) -> Route:
    """The alias's route; generation 0 on the base model where none was set."""
    with engine.connect() as connection:
        row = connection.execute(select(routes).where(routes.c.alias == alias)).one_or_none()
    return Route(alias) if row is None else Route(**row._mapping)


def write_route(engine: Engine, route: Route, *, expected_generation: int) -> Route:
    """Set the route as generation `expected_generation` + 1, by compare and set. Raises RouteChangedError."""
    following = Route(
        route.alias, expected_generation + 1, route.live, route.canary, route.canary_share, route.since_ms
    )
    with write(engine) as connection:
        if expected_generation == 0:
            known = connection.execute(select(routes.c.generation).where(routes.c.alias == route.alias)).scalar()
            if known is not None:
                raise RouteChangedError(f"route {route.alias!r} is at generation {known}, expected none")
            connection.execute(insert(routes).values(**following.__dict__))
        else:
            changed = connection.execute(
                update(routes)
                .where(routes.c.alias == route.alias, routes.c.generation == expected_generation)
                .values(**following.__dict__)
            )
            if changed.rowcount != 1:
                raise RouteChangedError(f"route {route.alias!r} is no longer at generation {expected_generation}")
    return following


def acknowledge_route(engine: Engine, gateway_id: str, generation: int, oldest_open: int, now_ms: int) -> None:
    """A gateway routes by `generation` now; its oldest open request was routed by `oldest_open`."""
    with write(engine) as connection:
        values = {"generation": generation, "oldest_open": oldest_open, "seen_ms": now_ms}
        changed = connection.execute(update(route_acks).where(route_acks.c.gateway_id == gateway_id).values(**values))
        if changed.rowcount == 0:
            connection.execute(insert(route_acks).values(gateway_id=gateway_id, **values))


def forget_gateway(engine: Engine, gateway_id: str) -> None:
    """A gateway has ended in order: nobody needs to wait for it."""
    with write(engine) as connection:
        connection.execute(delete(route_acks).where(route_acks.c.gateway_id == gateway_id))


def oldest_generation_in_use(engine: Engine, alive_since_ms: int) -> int | None:
    """The oldest generation that any gateway heard from since `alive_since_ms` may still route by; None: no gateway."""
    with engine.connect() as connection:
        oldest: int | None = connection.execute(
            select(func.min(route_acks.c.oldest_open)).where(route_acks.c.seen_ms >= alive_since_ms)
        ).scalar()
    return oldest
