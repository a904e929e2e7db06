"""Append log workload: records appended, fsync(2) at intervals, old records read back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np

from daxemu.evaluate.workloads.base import Mismatch, Workload, compare, pattern

NAME = "log"
GENERATION, SETTLED, BEGUN = range(3)


class AppendLogRun(Workload):
    """Run of specs.AppendLog. A full log is replaced by an empty one, as log rotation does."""

    def prepare(self) -> None:
        half = self.spec.count // 2
        with open(self.root / NAME, "wb") as file:
            for index in range(half):
                file.write(self._content(0, index))
        marks = self._marks()
        marks[SETTLED] = marks[BEGUN] = half

    def open(self) -> None:
        self._state = self._marks()
        self._file = os.open(self.root / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _marks(self) -> np.memmap:
        path = self.state / "marks"
        return np.memmap(path, dtype=np.int64, mode="r+" if path.exists() else "w+", shape=(3,))

    def step(self, rng: random.Random) -> int:
        marks, record = self._state, int(self.spec.record)
        if marks[SETTLED] and rng.randrange(8) == 0:
            return len(os.pread(self._file, record, rng.randrange(int(marks[SETTLED])) * record))
        if marks[SETTLED] >= self.spec.count:
            self._rotate()
        index = int(marks[SETTLED])
        marks[BEGUN] = index + 1
        content = self._content(int(marks[GENERATION]), index)
        os.pwrite(self._file, content, index * record)
        marks[SETTLED] = index + 1
        if (index + 1) % self.spec.sync_every == 0:
            os.fsync(self._file)
        return record

    def _rotate(self) -> None:
        fresh = self.root / (NAME + ".new")
        made = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        # Marks first: a death before the rename leaves marks of an empty log, so check() expects nothing of
        # the old file.
        self._state[SETTLED] = self._state[BEGUN] = 0
        self._state[GENERATION] += 1
        fresh.rename(self.root / NAME)
        os.close(self._file)
        self._file = made

    def check(self) -> Iterator[Mismatch]:
        marks = self._marks()
        records = (
            (index * self.spec.record, [self._content(int(marks[GENERATION]), index)])
            for index in range(int(marks[SETTLED]))
        )
        yield from compare(self.root / NAME, NAME, records)

    def size(self) -> int:
        return int(self._marks()[SETTLED]) * int(self.spec.record)

    def _content(self, generation: int, index: int) -> bytes:
        return pattern(self.seed, 5, index, generation, self.spec.record)
