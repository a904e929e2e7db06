"""Invariants between a filesystem and its plain model. test_model.py checks them after every step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from daxemu.errors import MediaError
from daxemu.fs import fsck
from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import ReflinkProxy, Rmap
from daxemu.uapi import PAGE_SECTORS, PAGE_SIZE
from tests.fs.model import Model, Page
from tests.support.core import Core, touched_poison
from tests.support.followed import Followed
from tests.support.layouts import Holder

IN_MEMORY = (
    fsck._check_extents,
    fsck._check_tails,
    fsck._check_media,
    fsck._check_rmap,
    fsck._check_free_space,
    fsck._check_tree,
)


class Invariants(RuleBasedStateMachine):
    """Invariants checked after every rule.

    ``proxies``: device block and proxy of each page of the model after the previous step. ``committed``: the
    model of a mount after a crash now. ``begun``: the model of a mount after a commit at the start of the
    current step and a crash.
    """

    core: Core
    model: Model
    committed: Model
    begun: Model
    proxies: dict[Page, tuple[int, ReflinkProxy | None]]
    counted: Counter[Page]
    holder: Holder
    followed: Followed
    has_committed = False

    def block_of(self, ino: int, index: int) -> int:
        return self.core.fs.extents_of(ino).lookup(index, index + 1)[0].dev_block

    def placed(self) -> dict[Page, tuple[int, ReflinkProxy | None]]:
        """Return device block and proxy of each block of the model. All links of a block must agree."""
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
        """Run all checks but the check of the SQLite tables and pages, which runs at each mount."""
        assert [problem for check in IN_MEMORY for problem in check(self.core.fs)] == []

    @invariant()
    def layouts_are_true(self) -> None:
        """Every granted layout is true. Reads of the contents invariant below have granted most of them."""
        assert self.holder.wrong() == []
        for file in self.model.files:
            self.core.fs.layouts.grant_attributes(self.core.fs.names.get(file.ino))

    @invariant()
    def changes_are_reported(self) -> None:
        """Every block that a direct mapping must show in another way than before the step was reported."""
        assert self.followed.unreported([file.ino for file in self.model.files]) == []

    @invariant()
    def poisoned_pages_are_not_in_the_media(self) -> None:
        """With direct mappings, no page with poison has data in the media, so no process has the page."""
        assert touched_poison(self.core) == []

    @invariant()
    def contents_are_the_models(self) -> None:
        """Every page without poison has the model's contents.

        A read of a poisoned page, or of a range with one, is EIO.
        """
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
        """A model page keeps device block and proxy since the previous step. A shared block has a proxy."""
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

    def metadata_blocks(self) -> set[int]:
        region = self.core.fs.region
        return {block for link in region._extents for block in range(link.dev_block, link.dev_end)}

    @invariant()
    def free_space_is_the_rest(self) -> None:
        fs = self.core.fs
        used = {block for block, _ in self.placed().values()} | self.metadata_blocks()
        free = {block for run in fs.allocator.free_ranges() for block in range(*run)}
        bad = {sector // PAGE_SECTORS for run in self.core.pmem.badblocks for sector in range(*run)}
        assert used.isdisjoint(free)
        assert len(used) + len(free) == fs.allocator.total == 2048
        assert len(self.metadata_blocks()) == sum(o.length for o in fs.rmap.owners(0, 2048) if o.ino == 0)
        assert fs.statfs().free == len(free)
        assert fs.statfs().available == len(free - bad)

    # -- after a crash

    def begin(self) -> None:
        """Note the start of a verb.

        A commit inside the verb, to make room, precedes every change of a table.
        """
        self.begun = self.model.after_crash()

    def watch_commits(self) -> None:
        """Record every commit, whatever the caller."""
        commit = self.core.fs.store.commit

        def watched(names: Namespace, rmap: Rmap, *, clean: bool = False) -> None:
            commit(names, rmap, clean=clean)
            self.committed = self.begun
            self.has_committed = True

        self.core.fs.store.commit = watched  # type: ignore[method-assign]
        self.begin()

    def mount_again(self, *, save: bool, is_direct: bool | None) -> None:
        """Unmount or crash, then mount. The committed state must be back, with the sharing of the commit."""
        before, eio = self.sharing(), self.core.fs.lost_store_is_eio
        self.core.close(save=save)
        self.core.is_direct = is_direct
        self.core.open()
        self.holder = Holder(self.core.fs)
        self.followed = Followed(self.core.fs)
        self.core.fs.lost_store_is_eio = eio
        if save:
            self.committed = self.model.after_crash()
        for page, used in self.tails().items():
            page.data[used:] = bytes(PAGE_SIZE - used)
        self.model = self.committed.after_crash()
        self.counted = self.model.counts()
        self.proxies = {}
        assert {name: f.ino for name, f in self.model.names.items()} == self.core.fs.names.directory(1)[1]
        if save:
            linked = self.model.counts().keys()
            groups = {page: group & linked for page, group in before.items() if page in linked}
            assert {page: len(group) for page, group in groups.items()} == {
                page: len(group) for page, group in self.sharing().items()
            }
        self.watch_commits()
        assert fsck.fsck(self.core.fs) == []

    @rule(is_direct=st.sampled_from([True, False, None]))
    def unmount(self, is_direct: bool | None) -> None:
        event("unmount")
        self.mount_again(save=True, is_direct=is_direct)

    @rule(is_direct=st.sampled_from([True, False, None]))
    def crash(self, is_direct: bool | None) -> None:
        if not any(page.bad for page in self.tails()):  # a mount cannot zero a tail with poison
            event("crash")
            self.mount_again(save=False, is_direct=is_direct)

    def tails(self) -> dict[Page, int]:
        """Return the blocks at or beyond the end of committed files, with the number of bytes inside."""
        return {
            page: max(0, file.size - index * PAGE_SIZE)
            for file in self.committed.files
            for index, page in file.pages.items()
            if (index + 1) * PAGE_SIZE > file.size
        }

    @rule(is_direct=st.sampled_from([True, False, None]))
    def crash_again(self, is_direct: bool | None) -> None:
        """Crash twice as often as unmount."""
        self.crash(is_direct)

    @invariant()
    def step_is_done(self) -> None:
        """Note the end of a step. A commit within the step preceded every change."""
        counts = self.model.counts()
        given_up = {page for page, before in self.counted.items() if 0 < counts[page] < before}
        self.model.given_up = (
            given_up if self.has_committed else given_up | self.model.given_up & counts.keys()
        )
        self.counted, self.has_committed = counts, False
        self.begin()

    def sharing(self) -> dict[Page, set[Page]]:
        """Return, for each block with a proxy, all blocks with the same proxy."""
        groups: dict[ReflinkProxy, set[Page]] = {}
        pages = self.placed()
        for page, (_, proxy) in pages.items():
            if proxy is not None:
                groups.setdefault(proxy, set()).add(page)
        return {page: groups[proxy] for page, (_, proxy) in pages.items() if proxy is not None}
