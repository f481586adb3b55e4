"""Which partition a key belongs to: Kafka's default partitioner, so that both logs place a key alike.

Whoever else writes to the topics must place keys by it too, or a vote does not meet its response: the Java clients and
kafka-python do by themselves; librdkafka (confluent-kafka for Python, Go, .NET, Node) with
`partitioner=murmur2_random`. The record's key is the event's `partitionkey` in UTF-8.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995
_SEED = 0x9747B28C


def partition_of(key: str, partitions: int) -> int:
    """Kafka's `toPositive(murmur2(key)) % partitions` over the key's UTF-8 bytes."""
    return (murmur2(key.encode()) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """MurmurHash2 in 32 bits with Kafka's seed (org.apache.kafka.common.utils.Utils.murmur2), as an unsigned int."""
    length = len(data)
    whole = length & ~3
    h = _SEED ^ length
    for start in range(0, whole, 4):
        k = int.from_bytes(data[start : start + 4], "little") * _M & _MASK
        k = (k ^ k >> 24) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    if length > whole:
        h = (h ^ int.from_bytes(data[whole:], "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15
