"""Routes and the gateways' acknowledgements of them, in the store."""

from __future__ import annotations

from dataclasses import asdict, replace

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

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


def write_route(connection: Connection, route: Route, now_ms: int) -> Route:
    """Set the route, by compare and set on the generation that `route` was read at; returns it as the next generation.

    Takes a connection, so that the states of the adapters move in the same transaction. Raises RouteChangedError.
    """
    following = replace(route, generation=route.generation + 1, since_ms=now_ms)
    if route.generation == 0:
        known = connection.execute(select(routes.c.generation).where(routes.c.alias == route.alias)).scalar()
        if known is not None:
            raise RouteChangedError(f"route {route.alias!r} is at generation {known}, expected none")
        connection.execute(insert(routes).values(**asdict(following)))
        return following
    changed = connection.execute(
        update(routes)
        .where(routes.c.alias == route.alias, routes.c.generation == route.generation)
        .values(**asdict(following))
    )
    if changed.rowcount != 1:
        raise RouteChangedError(f"route {route.alias!r} is no longer at generation {route.generation}")
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
