"""Where the event loop itself puts a response before its last byte goes out: into a file that is mapped into memory.

It takes a microsecond and no system call, which would hand the interpreter to the spool's thread, and survives kill -9
of the process. The log's commit, and the way to its thread and back, cost a thousand times as much; they follow for
many responses at once. What a killed process has left is taken up at the next start; a record may then be in the log
twice, and counts once, as every event does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loop.log import NewRecord

FILE_BYTES = 4 * 1024 * 1024  # of one file, or of a record that is larger; behind the last record are zeros
_DONE = struct.Struct("<Q")  # a file's first bytes: up to where its records are in the log
_FRAME = struct.Struct("<II")  # before each record: its length and CRC-32

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(NewRecord).decode


@dataclass(slots=True, eq=False)
class _File:
    path: Path
    handle: int
    memory: mmap.mmap
    end: int = _DONE.size


@dataclass(slots=True)
class Place:
    """Behind one record of the journal."""

    file: _File
    end: int


class Journal:
    """The files `<stem>.*`. One thread appends, one (maybe another) says what is done."""

    def __init__(self, stem: Path) -> None:
        """Raises OSError."""
        self._stem = stem
        self._files: deque[_File] = deque()
        self._begin()

    def append(self, record: NewRecord) -> Place:
        """Write the record; it survives kill -9 when this returns. Raises OSError, with nothing written."""
        payload = _encode(record)
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        file = self._files[-1]
        if file.end + len(frame) > len(file.memory):
            file = self._begin(len(frame))
        start, file.end = file.end, file.end + len(frame)
        file.memory[start : file.end] = frame
        return Place(file, file.end)

    def done(self, place: Place) -> None:
        """Everything up to this place is in the log."""
        place.file.memory[: _DONE.size] = _DONE.pack(place.end)  # at once; `pack_into` would write zeros first
        while self._files[0] is not place.file:
            _remove(self._files.popleft())

    def close(self) -> None:
        """Remove the files: all of it is in the log."""
        while self._files:
            _remove(self._files.popleft())

    def _begin(self, frame_bytes: int = 0) -> _File:
        name = f"{self._stem.name}.{secrets.token_hex(8)}"
        # Of that name only when it is locked, or others could take it for one that was left.
        path = self._stem.with_name(f".{name}")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
            size = max(FILE_BYTES, _DONE.size + frame_bytes)
            os.posix_fallocate(handle, 0, size)  # now: where a disk is full, writing to its memory would be a SIGBUS
            memory = mmap.mmap(handle, size)
            path = path.rename(self._stem.with_name(name))
        except OSError:
            path.unlink()
            os.close(handle)
            raise
        _DONE.pack_into(memory, 0, _DONE.size)
        self._files.append(_File(path, handle, memory))
        return self._files[-1]


def is_in_use(stem: Path) -> bool:
    """Whether a process that runs writes the files `<stem>.*`."""
    for path in stem.parent.glob(f"{stem.name}.*"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def recover(stem: Path, write: Callable[[Sequence[NewRecord]], object]) -> int:
    """Hand what killed processes have left to `write`, and remove their files; returns how many records it was."""
    count = 0
    for path in sorted(stem.parent.glob(f"{stem.name}.*")):
        with suppress(FileNotFoundError), path.open("rb") as file:  # one who runs has done with it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process of this name is writing it: one that is about to end
            records = left_in(path)
            if records:
                write(records)
            path.unlink(missing_ok=True)
            count += len(records)
    return count


def erase(path: Path, is_erased: Callable[[bytes], bool]) -> bool:
    """Overwrite with zeros, in a journal's file, the values that are to be erased and that its writer, who may be at
    work, has done with; False where there are some that he has not.
    """
    try:
        file = path.open("r+b")
    except FileNotFoundError:  # done with, all of it
        return True
    with file:
        data = file.read()
        (done,) = _DONE.unpack_from(data) if len(data) >= _DONE.size else (0,)
        place, is_clean = _DONE.size, True
        while place + _FRAME.size <= len(data):
            length, checksum = _FRAME.unpack_from(data, place)
            if not length:
                break
            start, place = place + _FRAME.size, place + _FRAME.size + length
            payload = data[start:place]
            if zlib.crc32(payload) != checksum or not is_erased(_decode(payload).value):
                continue  # overwritten before, or being written
            if place <= done:
                os.pwrite(file.fileno(), bytes(length), start)
            else:
                is_clean = False
        os.fsync(file.fileno())
    return is_clean


def left_in(path: Path) -> list[NewRecord]:
    """The records of a journal's file that its writer had not done with, up to the first that is not whole."""
    data = path.read_bytes()
    if len(data) < _DONE.size:
        return []
    (place,) = _DONE.unpack_from(data)
    records = []
    while place + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, place)
        payload = data[place + _FRAME.size : place + _FRAME.size + length]
        if not length or len(payload) < length or zlib.crc32(payload) != checksum:
            break
        records.append(_decode(payload))
        place += _FRAME.size + length
    return records


def _remove(file: _File) -> None:
    file.path.unlink(missing_ok=True)
    file.memory.close()
    os.close(file.handle)
