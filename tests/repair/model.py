"""A plain model beside a filesystem with a repair strategy. test_model.py gives each strategy its rules."""

from __future__ import annotations

import random
from contextlib import ExitStack

from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daxemu.errors import MediaError
from daxemu.events import CorruptionFound, RepairFinished
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.rmap import METADATA_INO
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, Ino
from tests.support.repairing import Repairing, repairing

MOST = 24 * PAGE_SIZE
which = st.integers(0, 63)
seeds = st.integers(0, 1 << 16)
offsets = st.one_of(st.integers(0, 20).map(lambda page: page * PAGE_SIZE), st.integers(0, 20 * PAGE_SIZE))
lengths = st.one_of(st.integers(1, 4).map(lambda pages: pages * PAGE_SIZE), st.integers(1, 3 * PAGE_SIZE))


class RepairModel(RuleBasedStateMachine):
    """``files``: the data written to each file.

    ``broken``: pages with more damage than the strategy promises to repair.
    """

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
        """Pages that failed before the strategy had processed the block."""
        self.names = 0
        for seed in range(3):
            self.create()
            self.write(seed, 0, 9 * PAGE_SIZE + 700, seed)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            # Silent corruption beyond the end of a file may remain.
            assert [wrong for wrong in fsck(self.core.fs) if "beyond its end" not in wrong] == []
            self.core.sound = False
            self.stack.close()

    @property
    def begins(self) -> bool:
        """True while the strategy has not processed all blocks yet."""
        return self.made.host.progress is not None

    # -- verbs of the filesystem

    def pick(self, index: int) -> Ino:
        return sorted(self.files)[index % len(self.files)]

    def touch(self, ino: Ino, at: int, length: int) -> None:
        """Note a change of ``length`` bytes of the file from ``at`` on."""
        pages = range(at // PAGE_SIZE, -(-(at + length) // PAGE_SIZE))
        self.touched.setdefault(ino, set()).update(pages)

    @precondition(lambda self: self.files)
    @rule(index=which, first=st.integers(0, 20), pages=st.integers(1, 4))
    def preallocate(self, index: int, first: int, pages: int) -> None:
        """Allocate zeroed blocks without a store."""
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
            assert touched & self.broken, "a write was refused over undamaged pages"
            return
        old = self.files[ino].ljust(at, b"\0")
        self.files[ino] = old[:at] + data + old[at + length :]
        self.broken -= {(ino, page) for page in range(-(-at // PAGE_SIZE), (at + length) // PAGE_SIZE)}

    @precondition(lambda self: any(self.files.values()))
    @rule(index=which, page=st.integers(0, 20), seed=seeds)
    def write_back(self, index: int, page: int, seed: int) -> None:
        """Write back a page stored to through a mapping. Over poison the store is lost."""
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
        failed = self.pages_at(offset, length)
        is_late = not self.begins and not self.early & self.broken
        promised = is_late and self.is_promised(offset, length)
        finished = self.made.fail(offset, length)
        if self.strategy == "none":
            assert finished is None
            self.broken |= failed
            return
        assert finished is not None
        event(f"{finished.verdict}, {'promised' if promised else 'beyond'}")
        assert finished.verdict != "failed", finished.reason
        if promised:
            assert finished.verdict == "recovered", finished.reason
        self.after_failure(failed, finished, offset, length)
        if self.begins:
            self.early |= failed

    def after_failure(
        self, failed: set[tuple[Ino, int]], finished: RepairFinished, offset: int, length: int
    ) -> None:
        """Note the damage reported by the strategy."""
        for ino, at, size in finished.lost:
            self.broken |= {(ino, page) for page in range(at // PAGE_SIZE, (at + size) // PAGE_SIZE)}

    def put(self, ino: Ino, at: int, data: bytes) -> None:
        """Note the new contents ``data`` of the file, up to the file size."""
        old = self.files[ino]
        data = data[: max(0, len(old) - at)]
        self.files[ino] = old[:at] + data + old[at + len(data) :]

    def is_promised(self, offset: int, length: int) -> bool:
        """Return True if the strategy must recover from the failure."""
        return False

    def pages_at(self, offset: int, length: int) -> set[tuple[Ino, int]]:
        """Return the pages of files at a range of device bytes."""
        first, last = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        return {
            (owner.ino, owner.file_block + page)
            for owner in self.core.fs.rmap.owners(first, last)
            if owner.ino in self.files
            for page in range(owner.length)
        }

    def is_good(self, block: int, start: int, length: int) -> bool:
        """Return True if bytes of a device block are the bytes a file wrote there, or belong to no file."""
        at = block * PAGE_SIZE + start
        for ino, page in self.pages_at(at, 1):
            if self.core.pmem.dax.is_poisoned(at, length) or (ino, page) in self.broken:
                return False
            there = bytes(self.core.pmem.dax.direct_access(at, length))
            written = self.files[ino][page * PAGE_SIZE :].ljust(PAGE_SIZE, b"\0")
            return there == written[start : start + length]
        return True

    # -- invariants

    @invariant()
    def every_page_is_as_written_or_known_to_be_damaged(self) -> None:
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
                    assert is_known, f"inode {ino} page {page} differs silently"
                assert all(e.repaired for e in self.core.events[seen:] if isinstance(e, CorruptionFound))

    def may_be_unreadable(self, ino: Ino, page: int) -> bool:
        return (ino, page) in self.broken
