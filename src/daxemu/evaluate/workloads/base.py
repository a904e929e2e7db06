"""Base of all workloads: numbered records with known content, and a log of written versions.

The log of versions lies off the mount, in mapped files, and survives the workload's death by SIGBUS.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import hashlib
import os
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from daxemu.uapi import PAGE_SIZE, page_align_down

NOTHING = -1


class Mismatch(NamedTuple):
    """Bytes of a file with other content than written.

    ``state``: "unreadable" if a read returned an error, "wrong" if no read did. ``offset`` -1: somewhere in
    the file (a row of a database).
    """

    path: str
    ino: int
    offset: int
    length: int
    state: Literal["unreadable", "wrong"]


def pattern(seed: int, stream: int, index: int, version: int, length: int) -> bytes:
    """Return the content of one version of a record, ``length`` bytes.

    Contents of different records and versions differ; none is all zeros.
    """
    digest = hashlib.blake2b(struct.pack("<4Q", seed, stream, index, version), digest_size=8).digest()
    words = np.arange(1, length // 8 + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words ^= np.frombuffer(digest, dtype=np.uint64)[0]
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    return words.tobytes()[:length]


class Truth:
    """Versions of numbered records.

    A version is begun before its write and settled once the write is acknowledged.
    """

    def __init__(self, path: Path, count: int) -> None:
        fresh = not path.exists()
        self._numbers = np.memmap(path, dtype=np.uint32, mode="w+" if fresh else "r+", shape=(2, count))

    def begin(self, index: int) -> int:
        """Return the version to write next, and record the version as begun."""
        version = int(self._numbers[:, index].max()) + 1
        self._numbers[1, index] = version
        return version

    def settle(self, index: int) -> None:
        """Record the begun version as acknowledged."""
        self._numbers[0, index] = self._numbers[1, index]

    def possible(self, index: int) -> list[int]:
        """Return the versions a read may find: the acknowledged one, then all begun later."""
        settled, begun = (int(n) for n in self._numbers[:, index])
        return list(range(settled, begun + 1))

    def versions(self) -> np.ndarray:
        """Return a copy of all acknowledged versions."""
        copy: np.ndarray = self._numbers[0].copy()
        return copy


class Workload(abc.ABC):
    """A run of one workload on one mount.

    ``root``: directory on the mount. ``state``: directory off the mount.
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (OSError,)
    """Exceptions raised by a step when data cannot be read or written."""

    def __init__(self, spec: Any, root: Path, state: Path, seed: int) -> None:
        self.spec = spec
        self.root = root
        self.state = state
        self.seed = seed
        self._doing = np.memmap(
            state / "doing", dtype=np.int64, mode="r+" if (state / "doing").exists() else "w+", shape=(1,)
        )
        self.avoid: set[int] = set()

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make the data. Called once, with an empty ``root``."""

    @abc.abstractmethod
    def open(self) -> None:
        """Open the data for steps. Called at the start and after every death."""

    @abc.abstractmethod
    def step(self, rng: random.Random) -> int:
        """Run one operation; return the number of bytes moved. Raises one of ``failures``."""

    @abc.abstractmethod
    def check(self) -> Iterator[Mismatch]:
        """Read all data back with read(2), never through a mapping. Yield every mismatch."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return the number of bytes of expected data."""

    def begin_again(self) -> None:
        """Skip the record in use at the death, if the record cannot be read any more.

        Called after every death.

        Without skipping, a restarted program would consume the same poison again and again, and the trial
        would measure restarts only.
        """
        skipped = self.state / "avoid"
        if skipped.exists():
            self.avoid = {int(line) for line in skipped.read_text().split()}
        doing = int(self._doing[0])
        if doing != NOTHING and not self.readable(doing):
            self.avoid.add(doing)
            skipped.write_text("\n".join(map(str, sorted(self.avoid))))
        self._doing[0] = NOTHING

    def readable(self, index: int) -> bool:
        """Return True if record ``index`` can be read with read(2)."""
        return True

    @contextlib.contextmanager
    def touching(self, index: int) -> Iterator[None]:
        """Mark record ``index`` as in use during an access through a mapping.

        The access may kill the process.
        """
        self._doing[0] = index
        yield
        self._doing[0] = NOTHING


def can_read(path: Path, offset: int, length: int) -> bool:
    """Return True if read(2) returns the whole range (offset and length in bytes)."""
    try:
        with open(path, "rb", buffering=0) as file:
            return len(os.pread(file.fileno(), length, offset)) == length
    except OSError:
        return False


def compare(path: Path, name: str, records: Iterable[tuple[int, Sequence[bytes]]]) -> Iterator[Mismatch]:
    """Compare records with the file ``path``; yield mismatches, page by page.

    Each record is (offset, candidates).

    Each byte must equal the byte of a candidate. All candidates of a record have the same length. More than
    one candidate: a write was in progress and may be torn. An unreadable file yields every record as
    unreadable.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - only errors of open() are results
    except OSError:
        ino = ino_of(path)
        for offset, candidates in records:
            yield Mismatch(name, ino, offset, len(candidates[0]), "unreadable")
        return
    with file:
        ino = os.fstat(file.fileno()).st_ino
        for offset, candidates in records:
            yield from _compare_open(file.fileno(), ino, name, offset, candidates)


def ino_of(path: Path) -> int:
    """Return the inode number; 0 if stat(2) fails."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _compare_open(
    fd: int, ino: int, name: str, start: int, candidates: Sequence[bytes]
) -> Iterator[Mismatch]:
    arrays = [np.frombuffer(candidate, dtype=np.uint8) for candidate in candidates]
    end = start + len(arrays[0])
    at = start
    while at < end:
        until = min(page_align_down(at) + PAGE_SIZE, end)
        try:
            found = os.pread(fd, until - at, at)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENXIO, errno.ENODEV):
                raise
            yield Mismatch(name, ino, at, until - at, "unreadable")
        else:
            data = np.zeros(until - at, dtype=np.uint8)
            data[: len(found)] = np.frombuffer(found, dtype=np.uint8)
            good = np.zeros(until - at, dtype=bool)
            for array in arrays:
                good |= data == array[at - start : until - start]
            good[len(found) :] = False
            if not good.all():
                wrong = np.flatnonzero(~good)
                yield Mismatch(name, ino, at + int(wrong[0]), int(wrong[-1] - wrong[0]) + 1, "wrong")
        at = until
