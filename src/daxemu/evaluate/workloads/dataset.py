"""Data set workload: machine learning samples read in random batches through mmap_ninja. Read-only."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmap_ninja.ragged import RaggedMmap

from daxemu.evaluate.workloads.base import Mismatch, Workload, can_read, compare, pattern

NAME = "samples"


class DatasetRun(Workload):
    """Run of specs.Dataset. Samples have unequal lengths, up to ``record`` bytes."""

    def prepare(self) -> None:
        samples = [np.frombuffer(self._content(i), dtype=np.uint8) for i in range(self.spec.count)]
        RaggedMmap.from_lists(self.root / NAME, samples)

    def open(self) -> None:
        self._data: Any = RaggedMmap(self.root / NAME)

    def step(self, rng: random.Random) -> int:
        total = 0
        for _ in range(self.spec.batch):
            index = rng.randrange(self.spec.count)
            if index in self.avoid:
                continue
            with self.touching(index):
                total += int(np.asarray(self._data[index]).sum() > 0) * self._length(index)
        return total

    def readable(self, index: int) -> bool:
        return can_read(self.root / NAME / "data.ninja", self._start(index), self._length(index))

    def check(self) -> Iterator[Mismatch]:
        starts = itertools.accumulate((self._length(i) for i in range(self.spec.count)), initial=0)
        records = (
            (start, [self._content(i)]) for i, start in zip(range(self.spec.count), starts, strict=False)
        )
        yield from compare(self.root / NAME / "data.ninja", f"{NAME}/data.ninja", records)

    def size(self) -> int:
        return self._start(self.spec.count)

    def _start(self, index: int) -> int:
        return sum(self._length(i) for i in range(index))

    def _length(self, index: int) -> int:
        half = int(self.spec.record) // 2
        return max(half + (index * 2654435761) % (half + 1), 1)

    def _content(self, index: int) -> bytes:
        return pattern(self.seed, 3, index, 0, self._length(index))
