"""Every strategy beside a plain model: faults within its promise lose nothing, those beyond are reported.

What a strategy says it recovered must be there; what it does not is either unreadable or of a form that its
own description names. Nothing is ever silently something else.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daxemu.errors import MediaError, Shutdown
from daxemu.events import CorruptionFound, RepairFinished
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.rmap import METADATA_INO
from daxemu.mm.incident import Incident
from daxemu.protocol import Progress
from daxemu.ranges import Range
from daxemu.repair import mirror, parity
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, Ino
from tests.support.repairing import Repairing, repairing

MOST = 24 * PAGE_SIZE
which = st.integers(0, 63)
seeds = st.integers(0, 1 << 16)
offsets = st.one_of(st.integers(0, 20).map(lambda page: page * PAGE_SIZE), st.integers(0, 20 * PAGE_SIZE))
lengths = st.one_of(st.integers(1, 4).map(lambda pages: pages * PAGE_SIZE), st.integers(1, 3 * PAGE_SIZE))


class RepairModel(RuleBasedStateMachine):
    """``files``: what was written. ``broken``: pages of which more than the strategy promises went bad."""

    strategy = "none"
    finds_corruption = False

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        self.made: Repairing = self.stack.enter_context(repairing(self.strategy))
        self.core = self.made.core
        self.files: dict[Ino, bytes] = {}
        self.touched: dict[Ino, set[int]] = {}
        """Pages written to since the strategy was chosen, by file."""
        self.broken: set[tuple[Ino, int]] = set()
        self.early: set[tuple[Ino, int]] = set()
        """Pages that failed before the strategy had come to them."""
        self.names = 0
        for seed in range(3):
            self.create()
            self.write(seed, 0, 9 * PAGE_SIZE + 700, seed)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            # What was changed silently beyond the end of a file may be there still.
            assert [wrong for wrong in fsck(self.core.fs) if "beyond its end" not in wrong] == []
            self.core.sound = False
            self.stack.close()

    @property
    def begins(self) -> bool:
        """Whether the strategy has not seen to everything yet."""
        return self.made.repairs.progress is not None

    # -- the filesystem's own verbs

    def pick(self, index: int) -> Ino:
        return sorted(self.files)[index % len(self.files)]

    def touch(self, ino: Ino, at: int, length: int) -> None:
        """These bytes are about to change."""
        pages = range(at // PAGE_SIZE, -(-(at + length) // PAGE_SIZE))
        self.touched.setdefault(ino, set()).update(pages)

    @precondition(lambda self: self.files)
    @rule(index=which, first=st.integers(0, 20), pages=st.integers(1, 4))
    def preallocate(self, index: int, first: int, pages: int) -> None:
        """Blocks that are zero without having been stored to."""
        ino, at = self.pick(index), first * PAGE_SIZE
        self.core.fs.fallocate(ino, FALLOC_FL_KEEP_SIZE, at, pages * PAGE_SIZE)

    @rule()
    def create(self) -> None:
        self.names += 1
        self.files[self.core.file(b"f%d" % self.names)] = b""

    @precondition(lambda self: self.files)
    @rule(index=which, at=offsets, length=lengths, seed=seeds)
    def write(self, index: int, at: int, length: int, seed: int) -> None:
        ino = self.pick(index)
        data = random.Random(seed).randbytes(length)
        self.touch(ino, at, length)
        try:
            self.core.fs.write(ino, at, data)
        except MediaError:
            touched = {(ino, page) for page in range(at // PAGE_SIZE, -(-(at + length) // PAGE_SIZE))}
            assert touched & self.broken, "a write was refused over pages that nothing had happened to"
            return
        old = self.files[ino].ljust(at, b"\0")
        self.files[ino] = old[:at] + data + old[at + length :]
        self.broken -= {(ino, page) for page in range(-(-at // PAGE_SIZE), (at + length) // PAGE_SIZE)}

    @precondition(lambda self: any(self.files.values()))
    @rule(index=which, page=st.integers(0, 20), seed=seeds)
    def write_back(self, index: int, page: int, seed: int) -> None:
        """A page that was stored to through a mapping; over poison it is lost."""
        ino = self.pick(index)
        at = page * PAGE_SIZE
        data = random.Random(seed).randbytes(min(PAGE_SIZE, max(0, len(self.files[ino]) - at)))
        places = self.core.fs.device_ranges(ino, at, PAGE_SIZE)
        is_poison = any(
            self.core.pmem.dax.is_poisoned(*place) for place in [(r.start, r.length) for r in places]
        )
        shared = any(
            count > 1 for r in places for _, count in self.core.fs.rmap.sharing(r.start >> 12, r.end >> 12)
        )
        if not data or (is_poison and shared):
            return
        self.touch(ino, at, len(data))
        self.core.fs.write(ino, at, data, from_cache=True)
        if not is_poison:
            self.put(ino, at, data)

    @precondition(lambda self: self.files)
    @rule(index=which, first=st.integers(0, 20), pages=st.integers(1, 6))
    def punch(self, index: int, first: int, pages: int) -> None:
        ino, at, length = self.pick(index), first * PAGE_SIZE, pages * PAGE_SIZE
        self.touch(ino, at, length)
        self.core.fs.fallocate(ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, length)
        old = self.files[ino]
        hole = bytes(max(0, min(at + length, len(old)) - at))
        self.files[ino] = old[:at] + hole + old[at + len(hole) :]
        self.broken -= {(ino, page) for page in range(first, first + pages)}

    @precondition(lambda self: self.files)
    @rule(index=which)
    def clone(self, index: int) -> None:
        source = self.pick(index)
        self.create()
        target = max(self.files)
        if self.files[source]:
            self.core.fs.remap_file_range(source, 0, target, 0, 0)
        self.files[target] = self.files[source]
        self.broken |= {(target, page) for ino, page in self.broken if ino == source}

    @precondition(lambda self: len(self.files) > 2)
    @rule(index=which)
    def unlink(self, index: int) -> None:
        ino = self.pick(index)
        name = self.core.fs.names.path_of(ino).strip("/").encode()
        self.core.fs.unlink(ROOT_INO, name)
        del self.files[ino]
        self.broken = {(other, page) for other, page in self.broken if other != ino}

    @rule()
    def commit(self) -> None:
        self.core.fs.commit()

    @rule(crash=st.booleans())
    def remount(self, crash: bool) -> None:
        self.core.fs.commit()
        self.made.remount(crash=crash)

    # -- faults

    @precondition(lambda self: any(self.files.values()))
    @rule(index=which, at=offsets, sectors=st.sampled_from([1, 1, 1, 3, 8, 8, 20]))
    def fail(self, index: int, at: int, sectors: int) -> None:
        ino = self.pick(index)
        if at >= len(self.files[ino]) or not self.core.fs.device_ranges(ino, at, 1):
            return
        offset = self.made.at(ino, at) // 512 * 512
        length = min(sectors * 512, self.core.pmem.dax.size - offset)
        first, last = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        if any(owner.ino == METADATA_INO for owner in self.core.fs.rmap.owners(first, last)):
            return
        hurt = self.pages_at(offset, length)
        is_late = not self.begins and not self.early & self.broken
        promised = is_late and self.is_promised(offset, length)
        finished = self.made.fail(offset, length)
        if self.strategy == "none":
            assert finished is None
            self.broken |= hurt
            return
        assert finished is not None
        event(f"{finished.verdict}, {'promised' if promised else 'beyond'}")
        assert finished.verdict != "failed", finished.reason
        if promised:
            assert finished.verdict == "recovered", finished.reason
        self.after_failure(hurt, finished, offset, length)
        if self.begins:
            self.early |= hurt

    def after_failure(
        self, hurt: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        """What a strategy lost, it lost in the form it says."""
        for ino, at, size in finished.lost:
            self.broken |= {(ino, page) for page in range(at // PAGE_SIZE, (at + size) // PAGE_SIZE)}

    def put(self, ino: Ino, at: int, data: bytes) -> None:
        """A file holds this now, as far as it goes."""
        old = self.files[ino]
        data = data[: max(0, len(old) - at)]
        self.files[ino] = old[:at] + data + old[at + len(data) :]

    def is_promised(self, offset: int, length: int) -> bool:
        """Whether the strategy must recover from this."""
        return False

    def pages_at(self, offset: int, length: int) -> set[tuple[Ino, int]]:
        """The pages of files that are at device bytes."""
        first, last = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        return {
            (owner.ino, owner.file_block + page)
            for owner in self.core.fs.rmap.owners(first, last)
            if owner.ino in self.files
            for page in range(owner.length)
        }

    def is_good(self, block: int, start: int, length: int) -> bool:
        """Whether bytes of a device block are what a file wrote there; true if it is no file's."""
        at = block * PAGE_SIZE + start
        for ino, page in self.pages_at(at, 1):
            if self.core.pmem.dax.is_poisoned(at, length) or (ino, page) in self.broken:
                return False
            there = bytes(self.core.pmem.dax.direct_access(at, length))
            written = self.files[ino][page * PAGE_SIZE :].ljust(PAGE_SIZE, b"\0")
            return there == written[start : start + length]
        return True

    # -- what holds

    @invariant()
    def what_was_written_is_there(self) -> None:
        for ino, data in self.files.items():
            for page in range(-(-len(data) // PAGE_SIZE)):
                wanted = data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                seen = len(self.core.events)
                try:
                    found = bytes(self.core.fs.read(ino, page * PAGE_SIZE, len(wanted)))
                except MediaError:
                    assert self.may_be_unreadable(ino, page), f"inode {ino} page {page} cannot be read"
                    self.broken.add((ino, page))
                    continue
                if found != wanted:
                    is_known = (ino, page) in self.broken and not self.finds_corruption
                    assert is_known, f"inode {ino} page {page} is silently another"
                assert all(e.repaired for e in self.core.events[seen:] if isinstance(e, CorruptionFound))

    def may_be_unreadable(self, ino: Ino, page: int) -> bool:
        return (ino, page) in self.broken


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
