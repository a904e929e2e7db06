"""Every strategy beside a plain model: faults within its promise lose nothing, those beyond are reported.

What a strategy says it recovered must be there; what it does not is either unreadable or of a form that its
own description names. Nothing is ever silently something else.
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


class ZeroModel(RepairModel):
    strategy = "zero"

    def after_failure(
        self, hurt: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        assert finished.verdict == "lost"
        assert {(ino, at // PAGE_SIZE) for ino, at, _ in finished.lost} <= hurt
        for ino, page in hurt:
            self.put(ino, page * PAGE_SIZE, bytes(PAGE_SIZE))


class PunchModel(ZeroModel):
    strategy = "punch"


class QuarantineModel(RepairModel):
    strategy = "quarantine"

    def after_failure(
        self, hurt: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
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
        self, hurt: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        """Nothing is read any more, so nothing wrong is."""
        assert self.core.fs.shutdown_reason is not None
        for ino in self.files:
            with pytest.raises(Shutdown):
                self.core.fs.read(ino, 0, 1)
        self.core.sound = False
        self.stack.close()
        self.start()


class RereadModel(RepairModel):
    """``pristine``: pages that are what the backing directory has."""

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
        """Some file that has the page has it, and the size, from the backing directory, and it did not
        change.
        """
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
    """The strategy is chosen again now and then, and begins while files are used: what it has not come to is
    not promised.
    """

    steps: Iterator[Progress] | None = None

    @initialize()
    def start(self) -> None:
        super().start()
        for module in (mirror, parity):
            self.stack.enter_context(mock.patch.object(module, "PIECE", 8))

    # It takes what is there for what was written: corruption beyond its promise would not be found any more.
    @precondition(lambda self: not (self.broken and self.finds_corruption))
    @rule()
    def choose_again(self) -> None:
        self.steps = self.made.repairs.choose(self.strategy)
        self.step()
        # While what was kept is thrown away there is no strategy.
        while self.steps is not None and not self.made.repairs.is_active:
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
        """What could not be had when it went bad."""
        bad = [part.outer(PAGE_SIZE) for part in self.core.pmem.dax.poisoned(0, self.core.pmem.dax.size)]
        for part in bad:
            blocks = Range(part.start // PAGE_SIZE, part.end // PAGE_SIZE)
            assert self.made.repairs.repair_now(blocks, Incident(0, 0, 0, 0), ()) is not None

    @rule(crash=st.booleans())
    def remount(self, crash: bool) -> None:
        self.steps = None  # it begins anew at the mount
        super().remount(crash)


class ChecksumModel(BegunModel):
    """Silent corruption is found, and mended as far as a failure there would be. ``together``: device bytes
    that one corruption more than is promised may cost.
    """

    finds_corruption = True
    together = PAGE_SIZE

    # In a stripe that had poison when it was to be added up, nothing is known of the other slices.
    @precondition(lambda self: any(self.files.values()) and not self.begins)
    @precondition(lambda self: not self.early & self.broken)
    @rule(index=which, at=offsets, length=st.integers(1, 3000), seed=seeds)
    def corrupt(self, index: int, at: int, length: int, seed: int) -> None:
        """Found by the next read, and never taken for what was written."""
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
        strategy = self.made.repairs._strategy
        assert strategy is not None
        for _ in strategy.scrub():
            pass


class MirrorModel(BegunModel):
    strategy = "mirror"

    def is_promised(self, offset: int, length: int) -> bool:
        """What is hit was whole, and its copies are not hit with it."""
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
        """One bad slice in any stripe."""
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
        self, hurt: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        super().after_failure(hurt, finished, offset, length)
        if finished.verdict != "recovered":
            area = 8 * PAGE_SIZE  # what else was bad of the stripes, silently, is found by the next read
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
        """After the window's end, as parity."""
        strategy = self.made.repairs._strategy
        assert strategy is not None
        strategy.tick()
        return super().is_promised(offset, length)


def _case(machine: type[RepairModel]) -> type:
    machine.TestCase.settings = settings(
        max_examples=int(os.environ.get("DAXEMU_MODEL_EXAMPLES", "12")),
        stateful_step_count=25,
        derandomize="DAXEMU_MODEL_RANDOM" not in os.environ,
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
