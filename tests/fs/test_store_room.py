"""Store.ensure_room: admitted changes always fit; a full metadata region can be committed and loaded."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from daxemu.errors import NoSpace
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.metadata_page import PAYLOAD, MetadataFile
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.store import BASE_PAGES, LARGE_PAGES, LINK_BYTES
from daxemu.uapi import PAGE_SIZE, Block, Ino
from tests.support.core import ROOT, Core


def until_full(verb: Callable[[], object]) -> int:
    """Repeat ``make`` until the metadata region refuses. Return the number of repetitions."""
    for done in range(1_000_000):
        try:
            verb()
        except NoSpace:
            return done
    raise AssertionError("the metadata region is never full")


def fill(core: Core, kind: str, dice: random.Random, big: Ino) -> None:
    """Make another inode of a kind, with the longest name."""
    name = b"%0255d" % dice.randrange(10**200)
    match kind:
        case "files":
            core.file(name)
        case "directories":
            core.dir(name)
        case "symlinks":
            core.fs.symlink(ROOT_INO, name, (name * 16)[: dice.choice([1, 255, 4080])], ROOT)
        case "hard links":
            core.fs.link(big, ROOT_INO, name)
        case "attributes":
            core.fs.setxattr(ROOT_INO, b"user." + name[:250], b"v" * dice.choice([0, 40, 300]), 0)
        case "clones":
            core.fs.remap_file_range(big, 0, core.file(name), 0, 0)


KINDS = ["files", "directories", "symlinks", "hard links", "attributes", "clones"]


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [KINDS], ids=", ".join)
def test_what_was_admitted_can_be_saved(core: Core, kinds: list[str]) -> None:
    dice, big = random.Random(5), core.file(b"big")
    for block in range(0, 600, 2):
        core.fs.write(big, (1 << 62) + block * PAGE_SIZE, b"x")  # far away: large numbers take more bytes
    assert until_full(lambda: fill(core, dice.choice(kinds), dice, big)) > 10
    before = (len(core.fs.names), core.fs.rmap.link_count, core.fs.names.name_bytes)
    core.reopen()
    assert (len(core.fs.names), core.fs.rmap.link_count, core.fs.names.name_bytes) == before


@pytest.mark.parametrize("core", [1 << 30], indirect=True)
def test_a_large_region_grows_in_pieces(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """No change waits for all pages of a growth: each seals a few, ahead of need."""
    store, sealed = core.fs.store, 0
    seal_new = MetadataRegion._seal_new

    def counting(self: MetadataRegion, file: MetadataFile, first: Block, end: Block) -> None:
        nonlocal sealed
        sealed += end - first
        seal_new(self, file, first, end)

    monkeypatch.setattr(MetadataRegion, "_seal_new", counting)
    store.ensure_room(0, LARGE_PAGES * PAYLOAD // LINK_BYTES, 0)
    store.ensure_room(0, store._room // LINK_BYTES, 0)
    began, most, total = store._room, 0, 0
    for links in range(began * 3 // 4 // LINK_BYTES, 2 * began // LINK_BYTES, 500):
        sealed = 0
        store.ensure_room(0, links, 0)
        assert BASE_PAGES * PAGE_SIZE + links * LINK_BYTES <= store._room
        most, total = max(most, sealed), total + sealed
        if links % 5000 < 500:
            assert fsck(core.fs) == []
    assert store._room > 3 * began // 2
    assert total > LARGE_PAGES
    assert most <= 256


@pytest.mark.parametrize("core", [1 << 30], indirect=True)
@pytest.mark.parametrize("save", [True, False])
def test_a_growth_under_way_leaves_no_bytes_in_free_blocks(core: Core, save: bool) -> None:
    store = core.fs.store
    store.ensure_room(0, LARGE_PAGES * PAYLOAD // LINK_BYTES, 0)
    store.ensure_room(0, store._room // LINK_BYTES, 0)
    ahead = (store._room * 15 // 16 - BASE_PAGES * PAGE_SIZE) // LINK_BYTES
    for _ in range(4):
        store.ensure_room(0, ahead, 0)
    assert store._growth is not None
    core.close(save=save)
    core.open()
    for run in core.fs.allocator.free_ranges():
        offset, length = run.start * PAGE_SIZE, min(run.length, 16384) * PAGE_SIZE
        assert bytes(core.pmem.dax.direct_access(offset, length)) == bytes(length)


def test_removing_makes_room_again(core: Core) -> None:
    numbers = iter(range(1_000_000))
    until_full(lambda: core.file(b"%0255d" % next(numbers)))
    for number in range(50):
        core.fs.unlink(ROOT_INO, b"%0255d" % number)
    assert until_full(lambda: core.file(b"%0255d" % next(numbers))) >= 49


def test_what_is_refused_has_changed_nothing(core: Core) -> None:
    numbers = iter(range(1_000_000))
    done = until_full(lambda: core.fs.setxattr(ROOT_INO, b"user.%d" % next(numbers), b"v" * 60000, 0))
    assert len(core.fs.names.get(ROOT_INO).xattrs) == done
    core.reopen()
    assert len(core.fs.names.get(ROOT_INO).xattrs) == done


def test_a_write_into_fragments_asks_for_all_the_links_it_makes(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave free space in single blocks only, so that every written block is a separate link."""
    asked = 0
    ensure_room = core.fs.store.ensure_room

    def watch(inodes: int, links: int, name_bytes: int) -> None:
        nonlocal asked
        asked = max(asked, links)
        ensure_room(inodes, links, name_bytes)

    one, two, three, four = (core.file(name) for name in (b"1", b"2", b"3", b"4"))
    for block in range(100):
        core.fs.write(one, block * PAGE_SIZE, b"x")
        core.fs.write(two, block * PAGE_SIZE, b"x")
    core.fs.write(four, 0, bytes(50 * PAGE_SIZE))
    core.fs.write(core.file(b"rest"), 0, bytes(core.fs.statfs().free * PAGE_SIZE))
    core.clone(four, b"5")
    core.fs.unlink(ROOT_INO, b"2")
    monkeypatch.setattr(core.fs.store, "ensure_room", watch)
    verbs: list[Callable[[], object]] = [
        lambda: core.fs.write(three, 0, bytes(20 * PAGE_SIZE)),
        lambda: core.fs.write(four, 10 * PAGE_SIZE - 1, b"xy"),
        lambda: core.fs.write(four, 20 * PAGE_SIZE - 1, bytes(PAGE_SIZE + 2)),
        lambda: core.fs.set_size(three, 100),
        lambda: core.fs.fallocate(three, 0, 0, 20 * PAGE_SIZE),
        lambda: core.fs.fallocate(four, 0x10, 30 * PAGE_SIZE - 1, 5 * PAGE_SIZE),
        lambda: core.fs.fallocate(four, 0x03, 40 * PAGE_SIZE - 1, 5 * PAGE_SIZE),
        lambda: core.fs.remap_file_range(four, 0, three, 30 * PAGE_SIZE, 0),
        lambda: core.fs.remap_file_range(one, 0, four, 2 * PAGE_SIZE, PAGE_SIZE),
    ]
    for number, verb in enumerate(verbs):
        asked = core.fs.rmap.link_count
        verb()
        assert core.fs.rmap.link_count <= asked, number
