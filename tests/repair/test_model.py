"""Every strategy beside a plain model: a failure within the promise loses nothing, one beyond it is reported.

A block reported as recovered must hold the data last written. Every other block is either unreadable, or has
the contents documented by the strategy. No block is silently different.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from daxemu.errors import Shutdown
from daxemu.events import RepairFinished
from daxemu.mm.incident import Incident
from daxemu.protocol import Progress
from daxemu.ranges import Range
from daxemu.repair import mirror, parity
from daxemu.uapi import PAGE_SIZE, Ino
from tests.repair.model import RepairModel, offsets, seeds, which

EXAMPLES = int(os.environ.get("DAXEMU_MODEL_EXAMPLES", "12"))
pytestmark = pytest.mark.timeout(200 + 15 * EXAMPLES)


class ZeroModel(RepairModel):
    strategy = "zero"

    def after_failure(
        self, failed: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        assert finished.verdict == "lost"
        assert {(ino, at // PAGE_SIZE) for ino, at, _ in finished.lost} <= failed
        for ino, page in failed:
            self.put(ino, page * PAGE_SIZE, bytes(PAGE_SIZE))


class PunchModel(ZeroModel):
    strategy = "punch"


class QuarantineModel(RepairModel):
    strategy = "quarantine"

    def after_failure(
        self, failed: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        assert finished.verdict == "lost"
        first = offset // PAGE_SIZE * PAGE_SIZE
        for at in range(offset, offset + length, 512):
            for ino, page in self.owners_before[at // PAGE_SIZE - first // PAGE_SIZE]:
                self.put(ino, page * PAGE_SIZE + at % PAGE_SIZE, bytes(512))

    def pages_at(self, offset: int, length: int) -> set[tuple[Ino, int]]:
        found = super().pages_at(offset, length)
        if length > 1:
            blocks = range(offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE))
            self.owners_before = [RepairModel.pages_at(self, block * PAGE_SIZE, 1) for block in blocks]
        return found


class FenceModel(RepairModel):
    strategy = "fence"

    def after_failure(
        self, failed: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        """After a fence every read fails, so no read returns wrong data."""
        assert self.core.fs.shutdown_reason is not None
        for ino in self.files:
            with pytest.raises(Shutdown):
                self.core.fs.read(ino, 0, 1)
        self.core.sound = False
        self.stack.close()
        self.start()


class RereadModel(RepairModel):
    """``pristine``: the contents of files in the backing directory."""

    strategy = "none"

    @initialize()
    def start(self) -> None:
        super().start()
        self.backing = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        for ino, data in self.files.items():
            (self.backing / self.core.fs.names.path_of(ino).strip("/")).write_bytes(data)
        self.pristine = dict(self.files)
        self.touched = {}
        self.made.choose(f"reread:path={self.backing}")
        self.strategy = "reread"

    def is_promised(self, offset: int, length: int) -> bool:
        """True if each block has an owner whose page and file size are as in the backing directory."""
        first, last = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        return all(
            any(self.is_pristine(ino, page) for ino, page in self.pages_at(block * PAGE_SIZE, 1))
            for block in range(first, last)
            if self.pages_at(block * PAGE_SIZE, 1)
        )

    def is_pristine(self, ino: Ino, page: int) -> bool:
        was, now = self.pristine.get(ino), self.files[ino]
        return was is not None and len(was) == len(now) and page not in self.touched.get(ino, ())


class BegunModel(RepairModel):
    """The strategy is chosen again now and then, and begins while files are used.

    A block that the strategy has not processed yet is not promised.
    """

    steps: Iterator[Progress] | None = None

    @initialize()
    def start(self) -> None:
        super().start()
        for module in (mirror, parity):
            self.stack.enter_context(mock.patch.object(module, "PIECE", 8))

    # A new strategy accepts the contents it finds as the data written: older corruption would pass unnoticed.
    @precondition(lambda self: not (self.broken and self.finds_corruption))
    @rule()
    def choose_again(self) -> None:
        self.steps = self.made.host.choose(self.strategy)
        self.step()
        # While what was kept is thrown away there is no strategy.
        while self.steps is not None and not self.made.host.is_active:
            self.step()

    @precondition(lambda self: self.steps is not None)
    @rule()
    def step(self) -> None:
        assert self.steps is not None
        if next(self.steps, None) is None:
            self.steps = None

    @precondition(lambda self: self.steps is not None)
    @rule()
    def finish(self) -> None:
        while self.steps is not None:
            self.step()

    @rule()
    def repair_now(self) -> None:
        """Repair all poison that could not be repaired at the time of the failure."""
        bad = [part.outer(PAGE_SIZE) for part in self.core.pmem.dax.poisoned(0, self.core.pmem.dax.size)]
        for part in bad:
            blocks = Range(part.start // PAGE_SIZE, part.end // PAGE_SIZE)
            assert self.made.repairs.repair_now(blocks, Incident(0, 0, 0, 0), ()) is not None

    @rule(crash=st.booleans())
    def remount(self, crash: bool) -> None:
        self.steps = None  # the strategy starts again at the mount
        super().remount(crash)


class ChecksumModel(BegunModel):
    """Silent corruption is found, and corrected within the promise for failures.

    ``together``: device bytes that may be lost by one corruption beyond the promise.
    """

    finds_corruption = True
    together = PAGE_SIZE

    # A stripe with poison at the time of adding up has no parity, so its other slices are unprotected.
    @precondition(lambda self: any(self.files.values()) and not self.begins)
    @precondition(lambda self: not self.early & self.broken)
    @rule(index=which, at=offsets, length=st.integers(1, 3000), seed=seeds)
    def corrupt(self, index: int, at: int, length: int, seed: int) -> None:
        """Corrupt bytes silently. The next read must find the corruption."""
        ino = self.pick(index)
        if at >= len(self.files[ino]) or not self.core.fs.device_ranges(ino, at, 1):
            return
        offset = self.made.at(ino, at)
        length = min(length, PAGE_SIZE - offset % PAGE_SIZE)
        if not self.is_promised(offset, length):
            self.broken |= self.pages_at(offset // self.together * self.together, self.together)
        self.made.corrupt(offset, length, seed)

    @rule()
    def scrub(self) -> None:
        strategy = self.made.host._strategy
        assert strategy is not None
        for _ in strategy.scrub():
            pass


class MirrorModel(BegunModel):
    strategy = "mirror"

    def is_promised(self, offset: int, length: int) -> bool:
        """True if the blocks were intact, and the failure does not include a copy."""
        first, last = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        owners = {owner.ino for owner in self.core.fs.rmap.owners(first, last)}
        return owners <= self.files.keys() and not self.pages_at(offset, length) & self.broken


class CheckedMirrorModel(ChecksumModel, MirrorModel):
    strategy = "mirror:checksum=yes"


class ParityModel(ChecksumModel):
    strategy = "parity"
    slice_size, data = PAGE_SIZE, 8
    together = 8 * PAGE_SIZE

    def is_promised(self, offset: int, length: int) -> bool:
        """True if no stripe has more than one damaged slice."""
        step, width = self.slice_size, self.slice_size * self.data
        hit = range(offset // step, -(-(offset + length) // step))
        for stripe in range(offset // width, -(-(offset + length) // width)):
            members = range(stripe * self.data, (stripe + 1) * self.data)
            bad = [
                m
                for m in members
                if m in hit or not self.is_good(m * step // PAGE_SIZE, m * step % PAGE_SIZE, step)
            ]
            if len(bad) > 1:
                return False
        return True

    def after_failure(
        self, failed: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        super().after_failure(failed, finished, offset, length)
        if finished.verdict != "recovered":
            area = 8 * PAGE_SIZE  # other silent damage of the stripes is found by the next read
            first, last = offset // area * area, -(-(offset + length) // area) * area
            self.broken |= {
                (ino, page)
                for block in range(first // PAGE_SIZE, last // PAGE_SIZE)
                if not self.is_good(block, 0, PAGE_SIZE)
                for ino, page in self.pages_at(block * PAGE_SIZE, 1)
            }


class NovaFortisModel(ParityModel):
    strategy = "parity:slice=512,data=8"
    slice_size = 512


class AsyncParityModel(ParityModel):
    strategy = "async-parity:window=60"

    def is_promised(self, offset: int, length: int) -> bool:
        """As parity, after the end of the window."""
        strategy = self.made.host._strategy
        assert strategy is not None
        strategy.tick()
        return super().is_promised(offset, length)


def _case(machine: type[RepairModel]) -> type:
    machine.TestCase.settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=25,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if os.environ.get("DAXEMU_SHRINK") else [])],
        suppress_health_check=list(HealthCheck),
    )
    return machine.TestCase


TestNone = _case(RepairModel)
TestZero = _case(ZeroModel)
TestPunch = _case(PunchModel)
TestQuarantine = _case(QuarantineModel)
TestFence = _case(FenceModel)
TestReread = _case(RereadModel)
TestMirror = _case(MirrorModel)
TestCheckedMirror = _case(CheckedMirrorModel)
TestParity = _case(ParityModel)
TestNovaFortis = _case(NovaFortisModel)
TestAsyncParity = _case(AsyncParityModel)
