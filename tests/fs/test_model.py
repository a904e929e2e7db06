"""The filesystem against a plain model: any sequence of verbs, every invariant after each step."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from daxemu.errors import FsError, MediaError, NoSpace
from daxemu.events import PoisonCleared, StoreLost
from daxemu.fs.fault import FaultKind
from daxemu.fs.inode import ROOT_INO
from daxemu.pmem.inject import inject, scrub, uninject
from daxemu.uapi import PAGE_SIZE, PMD_SIZE, SECTOR_SIZE
from tests.fs.invariants import Invariants
from tests.fs.model import File, Model
from tests.support.core import core_at
from tests.support.followed import Followed
from tests.support.layouts import Holder

EXAMPLES = int(os.environ.get("DAXEMU_MODEL_EXAMPLES", "40"))
pytestmark = pytest.mark.timeout(
    200 + 15 * EXAMPLES
)  # for shrinking a failing example; a passing run takes 15 s

NAMES = [b"a", b"b", b"c", b"d"]
NOISE = random.Random(1).randbytes(1 << 21)
MAX_PAGES = 8

which = st.integers(0, 7)
offsets = st.one_of(
    st.integers(0, MAX_PAGES).map(lambda page: page * PAGE_SIZE), st.integers(0, MAX_PAGES * PAGE_SIZE)
)
lengths = st.one_of(
    st.integers(1, MAX_PAGES).map(lambda page: page * PAGE_SIZE), st.integers(1, 5 * PAGE_SIZE)
)
blocks = st.integers(0, MAX_PAGES)


class FilesystemAgainstModel(Invariants):
    """Each rule does the same to both.

    A rule with a predicted error checks the error, and the absence of changes.
    """

    @initialize(
        prefill=st.integers(0, 7),
        eio=st.booleans(),
        align=st.sampled_from([PAGE_SIZE, PMD_SIZE]),
        is_direct=st.booleans(),
    )
    def start(self, prefill: int, eio: bool, align: int, is_direct: bool) -> None:
        self._context = core_at(align=align, is_direct=is_direct)
        self.core = self._context.__enter__()
        self.model = Model()
        self.committed = Model()
        self.proxies = {}
        self.counted = Counter()
        self.watch_commits()
        for name in NAMES[:2]:
            self.create(name)
        if prefill:
            self.write(0, 0, 6 * PAGE_SIZE, 0, False)
            self.clone(0, 1, 0, 1, prefill)
        if prefill > 3:
            self.poison(0, prefill * 1000, 3000, bool(prefill % 2))
        self.core.fs.lost_store_is_eio = eio
        self.holder = Holder(self.core.fs)
        self.followed = Followed(self.core.fs)

    def teardown(self) -> None:
        if hasattr(self, "core"):
            self.core.sound = False  # the invariants were checked after the last step
            self._context.__exit__(None, None, None)

    def pick(self, index: int) -> File:
        files = self.model.files
        return files[index % len(files)]

    # -- names

    @rule(name=st.sampled_from(NAMES))
    def create(self, name: bytes) -> None:
        if name in self.model.names:
            with pytest.raises(FsError):
                self.core.file(name)
        else:
            self.model.names[name] = File(self.core.file(name))

    @precondition(lambda self: self.model.names)
    @rule(index=which, name=st.sampled_from(NAMES))
    def link(self, index: int, name: bytes) -> None:
        file = list(self.model.names.values())[index % len(self.model.names)]
        if name not in self.model.names:
            self.core.fs.link(file.ino, ROOT_INO, name)
            self.model.names[name] = file

    @precondition(lambda self: self.model.names)
    @rule(index=which)
    def unlink(self, index: int) -> None:
        name = list(self.model.names)[index % len(self.model.names)]
        self.core.fs.unlink(ROOT_INO, name)
        self.model.unlink(name)

    @precondition(lambda self: self.model.names)
    @rule(index=which, new=st.sampled_from(NAMES))
    def rename(self, index: int, new: bytes) -> None:
        old = list(self.model.names)[index % len(self.model.names)]
        self.core.fs.rename((ROOT_INO, old), (ROOT_INO, new), 0)
        self.model.rename(old, new)

    @precondition(lambda self: self.model.files)
    @rule(index=which)
    def open_file(self, index: int) -> None:
        file = self.pick(index)
        self.core.fs.open(self.core.fs.names.get(file.ino))
        file.opens += 1
        self.model.open_files.append(file)

    @precondition(lambda self: self.model.open_files)
    @rule(index=which)
    def close_file(self, index: int) -> None:
        file = self.model.open_files[index % len(self.model.open_files)]
        self.core.fs.release(file.ino)
        file.opens -= 1
        self.model.open_files.remove(file)

    # -- bytes

    def store(
        self, file: File, offset: int, data: bytes, from_cache: bool, *, by_holder: bool = False
    ) -> bool:
        """Write to both, and check the outcome predicted by the model. Return True if the write succeeded.

        ``by_holder``: without the filesystem, where a layout allows it.
        """
        fs, model = self.core.fs, self.model
        self.begin()
        if by_holder and self.holder.store(file.ino, offset, data):
            assert not model.meets_poison(file, offset, len(data))
            assert not model.write(file, offset, data, from_cache=from_cache)
            event("store by a layout")
            return True
        room = fs.statfs().available
        before = len(self.core.events)
        if not from_cache and model.meets_poison(file, offset, len(data)):
            event("partial write over poison")
            with pytest.raises(MediaError):
                fs.write(file.ino, offset, data)
            return False
        if model.given_up and model.needed(file, offset, len(data)) > room:
            model.given_up = set()  # a commit makes room
        if model.needed(file, offset, len(data)) > room:
            event("full device")
            with pytest.raises(NoSpace):
                fs.write(file.ino, offset, data, from_cache=from_cache)
            assert self.core.events[before:] == []
            return False
        cleared_sectors = sum(
            len(page.bad)
            for index, page in file.pages.items()
            if offset <= index * PAGE_SIZE
            and (index + 1) * PAGE_SIZE <= offset + len(data)
            and not model.is_shared(page)
        )
        lost = model.write(file, offset, data, from_cache=from_cache)
        if lost and fs.lost_store_is_eio:
            with pytest.raises(MediaError):
                fs.write(file.ino, offset, data, from_cache=True)
        else:
            assert fs.write(file.ino, offset, data, from_cache=from_cache) == len(data)
        reported = [e for e in self.core.events[before:] if isinstance(e, StoreLost)]
        reported_pages = [
            range(e.offset // PAGE_SIZE, -(-(e.offset + e.length) // PAGE_SIZE)) for e in reported
        ]
        assert {i for pages in reported_pages for i in pages} == set(lost)
        event("lost store" if lost else "store")
        cleared = [e for e in self.core.events[before:] if isinstance(e, PoisonCleared)]
        assert sum(e.length for e in cleared) == (0 if from_cache else cleared_sectors * SECTOR_SIZE)
        return True

    @precondition(lambda self: self.model.files)
    @rule(
        index=which,
        offset=offsets,
        length=lengths,
        seed=st.integers(0, 9999),
        whole=st.booleans(),
        by_holder=st.booleans(),
    )
    def write(
        self, index: int, offset: int, length: int, seed: int, whole: bool, by_holder: bool = False
    ) -> None:
        if whole:
            offset, length = offset // PAGE_SIZE * PAGE_SIZE, -(-length // PAGE_SIZE) * PAGE_SIZE
        data = NOISE[seed : seed + length]
        self.store(self.pick(index), offset, data, from_cache=False, by_holder=by_holder)

    @precondition(lambda self: self.model.files)
    @rule(index=which, first=blocks, count=st.integers(1, 4), seed=st.integers(0, 9999))
    def write_back(self, index: int, first: int, count: int, seed: int) -> None:
        """Write back whole pages from the page cache, cut off at the end of the file."""
        file = self.pick(index)
        length = min(file.size, (first + count) * PAGE_SIZE) - first * PAGE_SIZE
        if length > 0:
            data = NOISE[seed : seed + length]
            self.store(file, first * PAGE_SIZE, data, from_cache=True, by_holder=bool(seed % 2))

    @precondition(lambda self: self.model.files)
    @rule(index=which, offset=offsets, length=lengths, seed=st.integers(0, 9999))
    def store_through_mapping(self, index: int, offset: int, length: int, seed: int) -> None:
        """Store into one page of a direct mapping, also beyond the end of the file in its last page."""
        file, fs, model = self.pick(index), self.core.fs, self.model
        block, at = offset // PAGE_SIZE, offset % PAGE_SIZE
        self.begin()
        page = file.pages.get(block)
        if block * PAGE_SIZE >= file.size:
            assert fs.fault(file.ino, block, is_store=True, limit=1).kind is FaultKind.BEYOND_EOF
            return
        if page is not None and page.bad:
            if model.is_shared(page):
                with pytest.raises(MediaError):
                    fs.fault(file.ino, block, is_store=True, limit=1)
            return
        room = fs.statfs().available
        needed = model.needed(file, block * PAGE_SIZE, PAGE_SIZE)
        if model.given_up and needed > room:
            model.given_up = set()
            needed = model.needed(file, block * PAGE_SIZE, PAGE_SIZE)
        if needed > room:
            with pytest.raises(NoSpace):
                fs.fault(file.ino, block, is_store=True, limit=1)
            return
        event("store through a mapping")
        run = fs.fault(file.ino, block, is_store=True, limit=1)
        assert (run.kind, run.file_block, run.length, run.is_shared) == (FaultKind.MAPPED, block, 1, False)
        data = NOISE[seed : seed + min(length, PAGE_SIZE - at)]
        fs.dax.direct_access(run.dev_block * PAGE_SIZE + at, len(data))[:] = data
        first = bytes(model.content(file)[block * PAGE_SIZE : block * PAGE_SIZE + 1])
        model.write(file, block * PAGE_SIZE, first)  # allocates or copies the block
        model.write(file, offset, data[: max(0, file.size - offset)])

    @precondition(lambda self: self.model.files)
    @rule(index=which, keep=st.integers(0, 3))
    def fill_the_device(self, index: int, keep: int) -> None:
        file = self.pick(index)
        for count in (256, 32, 4, 1):
            while self.core.fs.statfs().available >= count + keep:
                at = -(-file.size // PAGE_SIZE) * PAGE_SIZE
                assert self.store(file, at, NOISE[count : count + count * PAGE_SIZE], from_cache=False)
        self.store(file, -(-file.size // PAGE_SIZE) * PAGE_SIZE, NOISE[: 8 * PAGE_SIZE], from_cache=False)

    @precondition(lambda self: self.model.files)
    @rule(index=which, size=offsets)
    def truncate(self, index: int, size: int) -> None:
        file = self.pick(index)
        self.begin()
        tail = PAGE_SIZE - size % PAGE_SIZE
        refusal: type[Exception] | None = None
        if size < file.size and size % PAGE_SIZE and size // PAGE_SIZE in file.pages:
            if self.model.meets_poison(file, size, tail):
                refusal = MediaError
            elif self.model.needed(file, size, tail) > self.core.fs.statfs().available:
                refusal = NoSpace
        if refusal is not None:
            with pytest.raises(refusal):
                self.core.fs.set_size(file.ino, size)
            return
        self.core.fs.set_size(file.ino, size)
        self.model.truncate(file, size)

    @precondition(lambda self: self.model.files and self.core.fs.statfs().available > 3 * MAX_PAGES)
    @rule(
        index=which,
        mode=st.sampled_from([0, 1, 3, 16, 17]),
        offset=offsets,
        length=lengths,
        whole=st.booleans(),
    )
    def fallocate(self, index: int, mode: int, offset: int, length: int, whole: bool) -> None:
        file, fs = self.pick(index), self.core.fs
        if whole:
            offset, length = offset // PAGE_SIZE * PAGE_SIZE, -(-length // PAGE_SIZE) * PAGE_SIZE
        fs.commit()  # otherwise a lack of room may cause a commit between punching and allocating
        self.model.given_up = set()
        if mode & ~1 and self.model.meets_poison(file, offset, length):
            return  # refused, but an edge before the poisoned one may be zeroed already
        fs.fallocate(file.ino, mode, offset, length)
        if mode & ~1:
            self.model.punch(file, offset, length)
        if mode != 3:
            self.model.preallocate(file, offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE))
        if not mode & 1:
            file.size = max(file.size, offset + length)

    @precondition(lambda self: self.model.files)
    @rule(source=which, dest=which, src_block=blocks, dst_block=blocks, count=st.integers(0, MAX_PAGES))
    def clone(self, source: int, dest: int, src_block: int, dst_block: int, count: int) -> None:
        src, dst = self.pick(source), self.pick(dest)
        self.begin()
        src_offset, dst_offset, length = src_block * PAGE_SIZE, dst_block * PAGE_SIZE, count * PAGE_SIZE
        if count == 0 or src_offset < src.size < src_offset + length:
            length = src.size - src_offset
        if not length:
            return
        if not self.model.may_clone(src, src_offset, dst, dst_offset, length):
            with pytest.raises(FsError):
                self.core.fs.remap_file_range(src.ino, src_offset, dst.ino, dst_offset, length)
            return
        assert self.core.fs.remap_file_range(src.ino, src_offset, dst.ino, dst_offset, length) == length
        self.model.clone(src, src_offset, dst, dst_offset, length)

    # -- poison

    @precondition(lambda self: self.model.files)
    @rule(index=which, offset=offsets, length=st.integers(1, 3 * PAGE_SIZE), latent=st.booleans())
    def poison(self, index: int, offset: int, length: int, latent: bool) -> None:
        file = self.pick(index)
        for part in self.core.fs.device_ranges(file.ino, offset, length):
            inject(self.core.pmem, part.start, part.length, latent=latent)
        self.model.poison(file, offset, length)

    @precondition(lambda self: self.model.files)
    @rule(index=which, first=blocks, count=st.integers(1, 4))
    def memory_failure(self, index: int, first: int, count: int) -> None:
        """Exactly the file pages on a failed page are named, each at its own offset."""
        file = self.pick(index)
        found, named = set(), set()
        for incident in self.core.fail(file.ino, first, count):
            assert incident.error is None
            for m in incident.mappings:
                named |= {(m.mapping, m.index + i, m.pfn + i) for i in range(m.count)}
        self.model.poison(file, first * PAGE_SIZE, count * PAGE_SIZE)
        failed = {file.pages[i] for i in range(first, first + count) if i in file.pages}
        found = {(f.ino, i) for f in self.model.files for i, page in f.pages.items() if page in failed}
        assert {(ino, i) for ino, i, _ in named} == found
        base = self.core.pmem.dax.base_pfn
        assert all(pfn == base + self.block_of(ino, i) for ino, i, pfn in named)

    @precondition(lambda self: self.model.files)
    @rule(index=which, offset=offsets, length=st.integers(1, 3 * PAGE_SIZE))
    def clear(self, index: int, offset: int, length: int) -> None:
        file = self.pick(index)
        for part in self.core.fs.device_ranges(file.ino, offset, length):
            self.core.fs.adopt_cleared(uninject(self.core.pmem, part.start, part.length))
        self.model.clear(file, offset, length)

    @rule()
    def scrub(self) -> None:
        scrub(self.core.pmem)
        assert scrub(self.core.pmem) == []

    # -- commits, unmounts, crashes

    @rule()
    def fsync(self) -> None:
        self.core.fs.fsync()


FilesystemAgainstModel.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
TestFilesystemAgainstModel = FilesystemAgainstModel.TestCase


@pytest.mark.parametrize("at", [0, 1, 2, PAGE_SIZE - 1])
def test_a_store_through_a_mapping_beyond_the_end_changes_neither_size_nor_bytes(at: int) -> None:
    @settings(max_examples=1)
    @given(st.none())  # the rules note events, which hypothesis allows in a test of its own only
    def steps(_: None) -> None:
        state = FilesystemAgainstModel()
        try:
            state.start(prefill=0, eio=False, align=PAGE_SIZE, is_direct=False)
            state.truncate(index=0, size=1)
            state.store_through_mapping(index=0, length=PAGE_SIZE, offset=at, seed=0)
            state.contents_are_the_models()
            assert state.pick(0).size == 1
            state.truncate(index=0, size=PAGE_SIZE)  # the bytes beyond the end must not come back
            state.contents_are_the_models()
            state.fsck_finds_nothing()
        finally:
            state.teardown()

    steps()
