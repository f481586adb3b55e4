"""The API keys in the store: hashes, never the keys. Revoked ones stay."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, insert, select, update

from loop.keys import ApiKey, Scope, new_key
from loop.store.engine import write
from loop.store.schema import api_keys


def add_key(engine: Engine, name: str, scopes: tuple[Scope, ...], now_ms: int) -> tuple[ApiKey, str]:
    """Make a key; returns it with its text, which cannot be read again."""
    key, text = new_key(name, scopes, now_ms)
    with write(engine) as connection:
        connection.execute(insert(api_keys).values(**vars(key) | {"scopes": list(scopes)}))
    return key, text


def read_keys(engine: Engine) -> list[ApiKey]:
    """Every key that ever was, the oldest first."""
    with engine.connect() as connection:
        return _read(connection)


def revoke_key(engine: Engine, key_id: str, now_ms: int) -> ApiKey:
    """Take a key back: gateways refuse it from their next poll on. Again, it changes nothing.

    Raises ValueError where there is no such key.
    """
    with write(engine) as connection:
        taken_back = update(api_keys).where(api_keys.c.key_id == key_id, api_keys.c.revoked_at_ms.is_(None))
        connection.execute(taken_back.values(revoked_at_ms=now_ms))
        found = [key for key in _read(connection) if key.key_id == key_id]
    if not found:
        raise ValueError(f"API key {key_id!r} is not known; expected an id that `thumbwheel keys list` shows")
    return found[0]


def _read(connection: Connection) -> list[ApiKey]:
    rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at_ms, api_keys.c.key_id))
    return [ApiKey(**row._asdict() | {"scopes": tuple(row.scopes)}) for row in rows]
