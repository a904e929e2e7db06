"""Key-value store workload: fixed slots in one mapped file, loads and stores through the mapping."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator

from daxemu.evaluate.workloads.base import Mismatch, Truth, Workload, can_read, compare, pattern

NAME = "store"


class KvStoreRun(Workload):
    """Run of specs.KvStore. One slot is one record. A put is acknowledged after the store, as on DAX."""

    def prepare(self) -> None:
        spec = self.spec
        with open(self.root / NAME, "wb") as file:
            for index in range(spec.count):
                file.write(self._content(index, 0))

    def open(self) -> None:
        self._truth = Truth(self.state / "truth", self.spec.count)
        with open(self.root / NAME, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.spec.count * self.spec.record)
        self._puts = 0

    def step(self, rng: random.Random) -> int:
        record: int = self.spec.record
        index = rng.randrange(self.spec.count)
        while index in self.avoid:
            index = rng.randrange(self.spec.count)
        at = index * record
        if rng.randrange(100) < self.spec.reads:
            with self.touching(index):
                return len(self._map[at : at + record])
        content = self._content(index, self._truth.begin(index))
        with self.touching(index):
            self._map[at : at + record] = content
        self._truth.settle(index)
        self._puts += 1
        if self._puts % self.spec.sync_every == 0:
            self._map.flush()
        return record

    def readable(self, index: int) -> bool:
        return can_read(self.root / NAME, index * self.spec.record, self.spec.record)

    def check(self) -> Iterator[Mismatch]:
        truth = Truth(self.state / "truth", self.spec.count)
        records = (
            (index * self.spec.record, [self._content(index, version) for version in truth.possible(index)])
            for index in range(self.spec.count)
        )
        yield from compare(self.root / NAME, NAME, records)

    def size(self) -> int:
        return int(self.spec.count * self.spec.record)

    def _content(self, index: int, version: int) -> bytes:
        return pattern(self.seed, 0, index, version, self.spec.record)
