"""File server workload: whole files read, rewritten, appended to, deleted and made again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from daxemu.evaluate.workloads.base import Mismatch, Truth, Workload, compare, ino_of, pattern
from daxemu.uapi import PAGE_SIZE


class FileServerRun(Workload):
    """Run of specs.FileServer.

    The version of a file determines its size; an append makes the version longer.

    Content depends on the version, so an append writes the tail of the *same* version. ``truth`` counts
    rewrites; ``tails`` counts pages appended since the last rewrite.
    """

    def prepare(self) -> None:
        self._open_truth()
        for index in range(self.spec.count):
            self._path(index).write_bytes(self._content(index, 0, 0))

    def open(self) -> None:
        self._open_truth()

    def _open_truth(self) -> None:
        self._truth = Truth(self.state / "truth", self.spec.count)
        self._tails = Truth(self.state / "tails", self.spec.count)

    def step(self, rng: random.Random) -> int:
        index = rng.randrange(self.spec.count)
        what = rng.randrange(100)
        if what < 50:
            return len(self._path(index).read_bytes())
        if what < 70:
            return self._rewrite(index, fresh=False)
        if what < 85:
            return self._append(index)
        return self._rewrite(index, fresh=True)

    def _rewrite(self, index: int, *, fresh: bool) -> int:
        version = self._truth.begin(index)
        content = self._content(index, version, 0)
        if fresh:
            self._path(index).unlink(missing_ok=True)
        self._path(index).write_bytes(content)
        self._truth.settle(index)
        return len(content)

    def _append(self, index: int) -> int:
        settled = self._truth.possible(index)
        tails = self._tail(index)
        if (
            len(settled) > 1
            or len(tails) > 1
            or self._length(index, settled[0], tails[0]) >= self.spec.largest
        ):
            return self._rewrite(index, fresh=False)
        old = self._length(index, settled[0], tails[0])
        self._tails.begin(index)
        (self.state / f"tail-{index}").write_text(f"{settled[0]} {tails[0] + 1}")
        tail = self._content(index, settled[0], tails[0] + 1)[old:]
        with open(self._path(index), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), tail, old)
        self._tails.settle(index)
        return len(tail)

    def _tail(self, index: int) -> list[int]:
        """Return the possible numbers of pages appended to the present version."""
        note = self.state / f"tail-{index}"
        if not note.exists() or not note.read_text():
            return [0]
        version, pages = (int(word) for word in note.read_text().split())
        if version != self._truth.possible(index)[0]:
            return [0]
        return [pages] if len(self._tails.possible(index)) == 1 else [pages - 1, pages]

    def check(self) -> Iterator[Mismatch]:
        self._open_truth()
        for index in range(self.spec.count):
            yield from self._check_file(index)

    def _check_file(self, index: int) -> Iterator[Mismatch]:
        path = self._path(index)
        versions, tails = self._truth.possible(index), self._tail(index)
        contents = [self._content(index, versions[0], tail) for tail in tails]
        contents += [self._content(index, version, 0) for version in versions[1:]]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            if len(versions) == 1:
                yield Mismatch(path.name, 0, 0, len(contents[0]), "wrong")
            return
        except OSError:
            yield Mismatch(path.name, 0, 0, len(contents[0]), "unreadable")
            return
        shortest = min(map(len, contents))
        if len(versions) > 1:
            # A rewrite was in progress: the file may be shorter, with bytes of any possible version.
            shortest = min(shortest, size)
        if size < shortest:
            yield Mismatch(path.name, ino_of(path), size, shortest - size, "wrong")
        length = min(size, max(map(len, contents)))
        if length:
            padded = [content.ljust(length, b"\0")[:length] for content in contents]
            yield from compare(path, path.name, [(0, padded)])

    def size(self) -> int:
        self._open_truth()
        return sum(
            self._length(index, self._truth.possible(index)[0], self._tail(index)[0])
            for index in range(self.spec.count)
        )

    def _path(self, index: int) -> Path:
        return self.root / f"file-{index:04d}"

    def _length(self, index: int, version: int, tail: int) -> int:
        rng = np.random.default_rng([self.seed, index, version])
        # Many small files, few large ones: the logarithm of the size is uniform.
        exponent = rng.uniform(np.log2(512), np.log2(self.spec.largest))
        return min(int(2**exponent) + tail * PAGE_SIZE, int(self.spec.largest) + PAGE_SIZE)

    def _content(self, index: int, version: int, tail: int) -> bytes:
        return pattern(self.seed, 1, index, version, self._length(index, version, tail))
