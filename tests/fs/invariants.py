"""What must hold between a filesystem and the plain model of it; test_model.py looks after every step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant

from daxemu.errors import MediaError
from daxemu.fs.fsck import fsck
from daxemu.fs.rmap import ReflinkProxy
from daxemu.uapi import PAGE_SIZE, SECTORS_PER_PAGE
from tests.fs.model import Model, Page
from tests.support.core import Core


class Invariants(RuleBasedStateMachine):
    """``proxies``: where each page of the model was after the step before, and its proxy."""

    core: Core
    model: Model
    proxies: dict[Page, tuple[int, ReflinkProxy | None]]

    def block_of(self, ino: int, index: int) -> int:
        return self.core.fs.extents_of(ino).lookup(index, index + 1)[0].dev_block

    def placed(self) -> dict[Page, tuple[int, ReflinkProxy | None]]:
        """Where each block of the model is on the device, and its proxy: the same for all its links."""
        placed: dict[Page, tuple[int, ReflinkProxy | None]] = {}
        for file in self.model.files:
            extents = self.core.fs.extents_of(file.ino)
            mapped = {link.file_block + i: (link, i) for link in extents for i in range(link.length)}
            assert mapped.keys() == file.pages.keys()
            for index, page in file.pages.items():
                link, i = mapped[index]
                assert placed.setdefault(page, (link.dev_block + i, link.proxy)) == (
                    link.dev_block + i,
                    link.proxy,
                )
        return placed

    @invariant()
    def fsck_finds_nothing(self) -> None:
        assert fsck(self.core.fs) == []

    @invariant()
    def contents_are_the_models(self) -> None:
        """Every good page reads as it should, every bad one is EIO, and so is a range with a bad page."""
        fs = self.core.fs
        for file in self.model.files:
            assert fs.names.get(file.ino).size == file.size
            content, at = self.model.content(file), 0
            bad_pages = self.model.bad_pages(file)
            for bad in [*bad_pages, -(-file.size // PAGE_SIZE)]:
                good = content[at * PAGE_SIZE : bad * PAGE_SIZE]
                assert bytes(fs.read(file.ino, at * PAGE_SIZE, (bad - at) * PAGE_SIZE)) == good
                at = bad + 1
            for bad in bad_pages:
                with pytest.raises(MediaError):
                    fs.read(file.ino, bad * PAGE_SIZE, 1)
            if bad_pages:
                with pytest.raises(MediaError):
                    fs.read(file.ino, 0, file.size)

    @invariant()
    def blocks_keep_their_proxy(self) -> None:
        """Same model page, same device block, same proxy as after the step before; a shared block has one."""
        placed, counts = self.placed(), self.model.counts()
        assert len({block for block, _ in placed.values()}) == len(placed)
        for page, (block, proxy) in placed.items():
            assert counts[page] == 1 or proxy is not None
            old_block, old_proxy = self.proxies.get(page, (block, None))
            assert block == old_block
            assert old_proxy is None or proxy is old_proxy
        self.proxies = placed
        links = Counter(link.proxy for link in self.core.fs.rmap if link.proxy is not None)
        assert all(proxy.refcount == count for proxy, count in links.items())

    @invariant()
    def rmap_is_the_extent_maps_inverted(self) -> None:
        fs, total = self.core.fs, self.core.fs.allocator.total
        expected = {
            (file.ino, link.file_block + i, link.dev_block + i)
            for file in self.model.files
            for link in fs.extents_of(file.ino)
            for i in range(link.length)
        }
        for low, high in ((0, total), (520, 530), (514, 515)):
            owners = {
                (o.ino, o.file_block + i, o.dev_block + i)
                for o in fs.rmap.owners(low, high)
                for i in range(o.length)
                if o.ino
            }
            assert owners == {use for use in expected if low <= use[2] < high}

    @invariant()
    def free_space_is_the_rest(self) -> None:
        fs = self.core.fs
        used = {block for block, _ in self.placed().values()} | set(range(512))
        free = {block for run in fs.allocator.free_ranges() for block in range(*run)}
        bad = {sector // SECTORS_PER_PAGE for run in self.core.pmem.badblocks for sector in range(*run)}
        assert used.isdisjoint(free)
        assert len(used) + len(free) == fs.allocator.total == 2048
        assert fs.statfs().free == len(free)
        assert fs.statfs().available == len(free - bad)

    def sharing(self) -> dict[Page, set[Page]]:
        """For each block with a proxy the blocks that the same proxy stands for."""
        groups: dict[ReflinkProxy, set[Page]] = {}
        pages = self.placed()
        for page, (_, proxy) in pages.items():
            if proxy is not None:
                groups.setdefault(proxy, set()).add(page)
        return {page: groups[proxy] for page, (_, proxy) in pages.items() if proxy is not None}
