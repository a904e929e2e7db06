"""What every workload has: records whose content is known by number, and a memory of which were written.

The memory is kept off the mount, in mapped files, so that it outlives the workload's death by SIGBUS.
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

from daxemu.uapi import PAGE_SIZE

NOTHING = -1


class Bad(NamedTuple):
    """Bytes of a file that are not what was written. ``unreadable``: an error says so; ``wrong``: nothing
    does.

    ``offset`` -1: somewhere in the file (a row of a database).
    """

    path: str
    ino: int
    offset: int
    length: int
    state: Literal["unreadable", "wrong"]


def pattern(seed: int, stream: int, index: int, version: int, length: int) -> bytes:
    """The content of a version of a record; no two are alike, and none is zeros."""
    digest = hashlib.blake2b(struct.pack("<4Q", seed, stream, index, version), digest_size=8).digest()
    words = np.arange(1, length // 8 + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words ^= np.frombuffer(digest, dtype=np.uint64)[0]
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    return words.tobytes()[:length]


class Truth:
    """Versions of numbered records: begun before a write, settled when it was acknowledged."""

    def __init__(self, path: Path, count: int) -> None:
        fresh = not path.exists()
        self._numbers = np.memmap(path, dtype=np.uint32, mode="w+" if fresh else "r+", shape=(2, count))

    def begin(self, index: int) -> int:
        """The version to write next."""
        version = int(self._numbers[:, index].max()) + 1
        self._numbers[1, index] = version
        return version

    def settle(self, index: int) -> None:
        """The write was acknowledged."""
        self._numbers[0, index] = self._numbers[1, index]

    def possible(self, index: int) -> list[int]:
        """What may be found: the acknowledged version, then those that were begun and failed."""
        settled, begun = (int(n) for n in self._numbers[:, index])
        return list(range(settled, begun + 1))

    def versions(self) -> np.ndarray:
        """The acknowledged versions now, as a copy."""
        copy: np.ndarray = self._numbers[0].copy()
        return copy


class Workload(abc.ABC):
    """One run of one workload on one mount. ``root``: its directory there; ``state``: one elsewhere."""

    failures: ClassVar[tuple[type[Exception], ...]] = (OSError,)
    """What a step raises when its data cannot be had."""

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
        """Make the data. Called once, on an empty directory."""

    @abc.abstractmethod
    def open(self) -> None:
        """Get ready for steps: at the start, and again after every death."""

    @abc.abstractmethod
    def step(self, rng: random.Random) -> int:
        """One operation; the bytes it moved. Raises one of ``failures``."""

    @abc.abstractmethod
    def check(self) -> Iterator[Bad]:
        """Read everything back, with read(2), never through a mapping."""

    @abc.abstractmethod
    def size(self) -> int:
        """How many bytes of data should be there."""

    def begin_again(self) -> None:
        """After a death: stay away from the record that was being touched, if it cannot be read any more.

        A restarted program that walks into the same page for ever would measure the restarts alone.
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
        """Whether record ``index`` can be read with read(2)."""
        return True

    @contextlib.contextmanager
    def touching(self, index: int) -> Iterator[None]:
        """Around an access through a mapping, which may be the last thing this process does."""
        self._doing[0] = index
        yield
        self._doing[0] = NOTHING


def can_read(path: Path, offset: int, length: int) -> bool:
    """Whether all of a range can be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return len(os.pread(file.fileno(), length, offset)) == length
    except OSError:
        return False


def compare(path: Path, name: str, records: Iterable[tuple[int, Sequence[bytes]]]) -> Iterator[Bad]:
    """Look for records, each (offset, candidates): its bytes must be those of one of them, all of one length.

    More than one candidate: a write was under way, and may be torn.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - an error here is an answer, one below is not
    except OSError:
        ino = ino_of(path)
        for offset, candidates in records:
            yield Bad(name, ino, offset, len(candidates[0]), "unreadable")
        return
    with file:
        ino = os.fstat(file.fileno()).st_ino
        for offset, candidates in records:
            yield from _compare_open(file.fileno(), ino, name, offset, candidates)


def ino_of(path: Path) -> int:
    """Its inode number; 0 if it is not there or cannot be asked for."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _compare_open(fd: int, ino: int, name: str, start: int, candidates: Sequence[bytes]) -> Iterator[Bad]:
    arrays = [np.frombuffer(candidate, dtype=np.uint8) for candidate in candidates]
    end = start + len(arrays[0])
    at = start
    while at < end:
        until = min(at // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE, end)
        try:
            found = os.pread(fd, until - at, at)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENXIO, errno.ENODEV):
                raise
            yield Bad(name, ino, at, until - at, "unreadable")
        else:
            data = np.zeros(until - at, dtype=np.uint8)
            data[: len(found)] = np.frombuffer(found, dtype=np.uint8)
            good = np.zeros(until - at, dtype=bool)
            for array in arrays:
                good |= data == array[at - start : until - start]
            good[len(found) :] = False
            if not good.all():
                wrong = np.flatnonzero(~good)
                yield Bad(name, ino, at + int(wrong[0]), int(wrong[-1] - wrong[0]) + 1, "wrong")
        at = until
