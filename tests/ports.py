"""Ports for processes that tests start a moment later: nobody else is given one of them meanwhile."""

from __future__ import annotations

import random
import socket

# Below those that a kernel gives to connections going out and to whoever binds to port 0: one that was free a moment
# ago may be such a connection's now, and a client that tries again and again to reach it may even reach itself.
PORTS = range(11_000, 16_000)
_kept: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody listens on now, and that no other process of tests is given while this one lives."""
    for port in random.Random().sample(PORTS, len(PORTS)):
        # What is served there is TCP; to its UDP namesake we hold on, as a sign to the others.
        ours = socket.socket(type=socket.SOCK_DGRAM)
        try:
            ours.bind(("127.0.0.1", port))
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", port))
        except OSError:
            ours.close()
            continue
        _kept.append(ours)
        return port
    raise AssertionError(f"none of the ports {PORTS.start} to {PORTS.stop - 1} is free")


def free_ports(number: int) -> tuple[int, ...]:
    """Several of them."""
    return tuple(free_port() for _ in range(number))
