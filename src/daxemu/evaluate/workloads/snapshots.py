"""Snapshot workload: a live file written record by record, and reflinked snapshots of the file."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from daxemu.client import Client
from daxemu.errors import DaxemuError
from daxemu.evaluate.workloads.base import Mismatch, Truth, Workload, compare, pattern

LIVE = "live"


class SnapshotsRun(Workload):
    """Run of specs.Snapshots.

    The versions in each snapshot are saved off the mount when the snapshot is taken.
    """

    failures = (OSError, DaxemuError)

    def prepare(self) -> None:
        with open(self.root / LIVE, "wb") as file:
            for index in range(self.spec.count):
                file.write(self._content(index, 0))

    def open(self) -> None:
        self._truth = Truth(self.state / "truth", self.spec.count)
        self._client = Client.at(self.root)
        self._live = os.open(self.root / LIVE, os.O_RDWR | os.O_CLOEXEC)
        self._writes = 0

    def step(self, rng: random.Random) -> int:
        index = rng.randrange(self.spec.count)
        at = index * self.spec.record
        if rng.randrange(4) == 0:
            return len(os.pread(self._live, self.spec.record, at))
        content = self._content(index, self._truth.begin(index))
        os.pwrite(self._live, content, at)
        self._truth.settle(index)
        self._writes += 1
        if self._writes % self.spec.every == 0:
            self._snapshot()
        return len(content)

    def _snapshot(self) -> None:
        taken = sorted(int(path.stem) for path in self.state.glob("*.npy"))
        number = taken[-1] + 1 if taken else 0
        for old in taken[: len(taken) - self.spec.keep + 1]:
            (self.state / f"{old}.npy").unlink()
            self._path(old).unlink()
        with open(self._path(number), "wb") as new:
            self._client.request(
                "reflink", src=os.fstat(self._live).st_ino, dst=os.fstat(new.fileno()).st_ino
            )
        np.save(self.state / f"{number}.npy", self._truth.versions())

    def check(self) -> Iterator[Mismatch]:
        truth = Truth(self.state / "truth", self.spec.count)
        possible = (truth.possible(index) for index in range(self.spec.count))
        yield from compare(self.root / LIVE, LIVE, self._records(possible))
        for path in sorted(self.state.glob("*.npy")):
            snapshot = self._path(int(path.stem))
            yield from compare(snapshot, snapshot.name, self._records([int(v)] for v in np.load(path)))

    def _records(self, versions: Iterable[list[int]]) -> Iterator[tuple[int, list[bytes]]]:
        for index, possible in enumerate(versions):
            yield index * self.spec.record, [self._content(index, version) for version in possible]

    def size(self) -> int:
        snapshots = len(list(self.state.glob("*.npy")))
        return int(self.spec.count * self.spec.record * (1 + snapshots))

    def _path(self, number: int) -> Path:
        return self.root / f"snapshot-{number:06d}"

    def _content(self, index: int, version: int) -> bytes:
        return pattern(self.seed, 4, index, version, self.spec.record)
