"""A night's dataset: curated, split, balanced, written once and never changed."""

from loop.snapshot.make import Snapshot, load_snapshot, make_snapshot

__all__ = ["Snapshot", "load_snapshot", "make_snapshot"]
