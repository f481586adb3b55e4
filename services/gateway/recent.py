"""What the gateways of one machine remember of late: a file of slots, which all of them map and a restart keeps.

A value is in the slot that its key's hash names, over what was there. Nobody locks: who reads a slot that others write
finds a checksum that is not right, which is as if nothing were there.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Literal, get_args

SLOTS = 1 << 14  # of each kind
SLOT_BYTES = 256
RECENT = "recent.bin"  # beside the log's file
_STAMP = struct.Struct("<q")
_HEAD = struct.Struct("<8sH")  # the checksum of key and value; the value's size
Kind = Literal["score", "prompt", "choices"]
KINDS = get_args(Kind)

_log = logging.getLogger(__name__)


class Recent:
    """Texts of up to 246 bytes under keys, some 16,000 of each kind."""

    def __init__(self, path: Path) -> None:
        """Without room on the disk, what is remembered is this process's alone."""
        self._end = _slots_bytes()
        size = self._end + _STAMP.size
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, size)  # now: where a disk is full, writing to its memory would be a SIGBUS
                self._memory = mmap.mmap(file, size)
            except OSError:
                path.unlink()
                raise
            finally:
                os.close(file)
        except OSError as exc:
            _log.warning("other gateways do not share %s: %s", path, exc, extra={"action": "recent_not_shared"})
            self._memory = mmap.mmap(-1, size)

    def put(self, kind: Kind, key: str, value: str = "") -> None:
        """Remember the value; one that is too long is not."""
        text = value.encode()
        if len(text) <= SLOT_BYTES - _HEAD.size:
            digest, start = _place(kind, key)
            written = _HEAD.pack(_checksum(digest, text), len(text)) + text
            self._memory[start : start + len(written)] = written

    def get(self, kind: Kind, key: str) -> str | None:
        """The value; None where it was never put, or others were since."""
        digest, start = _place(kind, key)
        slot = self._memory[start : start + SLOT_BYTES]
        checksum, size = _HEAD.unpack_from(slot)
        text = slot[_HEAD.size : _HEAD.size + size]
        return text.decode() if checksum == _checksum(digest, text) else None

    @property
    def stamp(self) -> int:
        """The last stamp that any of them has given: after the clock was set back, no one's vote may seem older than an
        earlier one that another has taken.
        """
        return int(_STAMP.unpack_from(self._memory, self._end)[0])

    @stamp.setter
    def stamp(self, stamp: int) -> None:
        _STAMP.pack_into(self._memory, self._end, stamp)

    def close(self) -> None:
        """Let go of the file."""
        self._memory.close()


def forget_recent(path: Path) -> bool:
    """Overwrite everything in the file but the stamp, whoever has it mapped; False where there is none."""
    if not path.exists():
        return False
    with path.open("r+b") as file:
        file.write(bytes(_slots_bytes()))
    return True


def _slots_bytes() -> int:
    return len(KINDS) * SLOTS * SLOT_BYTES


def _place(kind: Kind, key: str) -> tuple[bytes, int]:
    digest = blake2b(f"{kind}\0{key}".encode(errors="surrogatepass"), digest_size=16).digest()
    return digest, (KINDS.index(kind) * SLOTS + int.from_bytes(digest[:4]) % SLOTS) * SLOT_BYTES


def _checksum(digest: bytes, text: bytes) -> bytes:
    return blake2b(text, digest_size=8, key=digest).digest()
