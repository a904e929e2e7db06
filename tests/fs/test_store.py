"""Store: committed data comes back; each commit has all changes before, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import apsw
import pytest

from daxemu.fs import fsck
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import ROOT_INO, Inode
from daxemu.fs.inode_flags import APPEND, IMMUTABLE
from daxemu.fs.metadata_page import MetadataFile
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.uapi import PAGE_SIZE
from tests.support.core import ROOT, Core, pages
from tests.support.metadata import in_pages


def state(fs: Filesystem) -> dict[int, dict[str, Any]]:
    """Everything a store must keep, as plain values."""
    return {inode.ino: plain(inode) for inode in fs.names if inode.nlink}


def plain(inode: Inode) -> dict[str, Any]:
    kept = (
        "mode",
        "uid",
        "gid",
        "nlink",
        "rdev",
        "size",
        "atime",
        "mtime",
        "ctime",
        "entries",
        "target",
        "xattrs",
    )
    found = {name: getattr(inode, name) for name in kept}
    found["entries"], found["xattrs"] = dict(inode.entries or {}), dict(inode.xattrs)
    found["links"] = [
        (e.file_block, e.dev_block, e.length, e.proxy.number if e.proxy else None)
        for e in inode.extents or ()
    ]
    return found


@contextmanager
def mounted(core: Core) -> Iterator[Filesystem]:
    """Open a device without a filesystem read-only: nothing is written."""
    fs = Filesystem(core.pmem.dax, MemoryFailures(lambda event: None), lambda event: None)
    try:
        yield fs
    finally:
        fs.store.close()
        fs.dax.release(fs._holder)


def a_bit_of_everything(core: Core) -> None:
    ino = core.file(b"f", pages("AB") + b"tail")
    core.fs.link(ino, ROOT_INO, b"\xff\x01hard")
    core.clone(ino, b"clone")
    core.fs.setxattr(ino, b"user.\xff", b"v\x00", 0)
    core.fs.symlink(core.dir(b"d").ino, b"s", b"target\xfe", ROOT)
    core.fs.mknod(ROOT_INO, b"dev", 0o20600, 0x103, ROOT)
    core.fs.set_size(core.file(b"sparse"), 1 << 62)
    core.fs.set_inode_flags(core.file(b"locked"), IMMUTABLE | APPEND)


def test_everything_comes_back(core: Core) -> None:
    a_bit_of_everything(core)
    before, counts = state(core.fs), (core.fs.names.name_bytes, core.fs.names.next_ino)
    for _ in range(3):
        core.reopen()
        assert state(core.fs) == before
        assert (core.fs.names.name_bytes, core.fs.names.next_ino) == counts


CHANGES: dict[str, Callable[[Core], object]] = {
    "write": lambda c: c.fs.write(c.fs.names.lookup(1, b"f").ino, 5 * PAGE_SIZE, b"x"),
    "overwrite a shared block": lambda c: c.fs.write(c.fs.names.lookup(1, b"clone").ino, 0, b"x"),
    "truncate": lambda c: c.fs.set_size(c.fs.names.lookup(1, b"f").ino, 100),
    "truncate to nothing": lambda c: c.fs.set_size(c.fs.names.lookup(1, b"f").ino, 0),
    "punch": lambda c: c.fs.fallocate(c.fs.names.lookup(1, b"f").ino, 3, 0, PAGE_SIZE),
    "preallocate": lambda c: c.fs.fallocate(c.fs.names.lookup(1, b"f").ino, 1, 1 << 40, PAGE_SIZE),
    "clone": lambda c: c.clone(c.fs.names.lookup(1, b"f").ino, b"another"),
    "share a part": lambda c: c.fs.remap_file_range(
        c.fs.names.lookup(1, b"f").ino, 0, c.fs.names.lookup(1, b"sparse").ino, 1 << 30, PAGE_SIZE
    ),
    "unlink": lambda c: c.fs.unlink(1, b"clone"),
    "unlink one of two": lambda c: c.fs.unlink(1, b"f"),
    "link": lambda c: c.fs.link(c.fs.names.lookup(1, b"f").ino, 1, b"third"),
    "rename": lambda c: c.fs.rename((1, b"f"), (c.fs.names.lookup(1, b"d").ino, b"g"), 0),
    "rename a directory": lambda c: c.fs.rename((1, b"d"), (c.dir(b"e").ino, b"dd"), 0),
    "rename over": lambda c: c.fs.rename((1, b"dev"), (1, b"clone"), 0),
    "exchange": lambda c: c.fs.rename((1, b"f"), (1, b"d"), 2),
    "rmdir": lambda c: (c.fs.unlink(c.fs.names.lookup(1, b"d").ino, b"s"), c.fs.rmdir(1, b"d")),
    "setxattr": lambda c: c.fs.setxattr(ROOT_INO, b"user.a", b"1", 0),
    "removexattr": lambda c: c.fs.removexattr(c.fs.names.lookup(1, b"f").ino, b"user.\xff"),
    "chmod": lambda c: c.fs.setattr(ROOT_INO, mode=0o700),
    "chown and utimes": lambda c: c.fs.setattr(ROOT_INO, uid=5, gid=6, atime=7, mtime=-8),
    "made and removed": lambda c: (c.file(b"x"), c.fs.unlink(1, b"x")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_each_change_is_in_the_next_commit_and_not_before(
    core: Core, change: Callable[[Core], object]
) -> None:
    """After a crash the state is that of the last commit; the commit after a verb has all changes of the
    verb.
    """
    a_bit_of_everything(core)
    core.fs.commit()
    before = state(core.fs)
    change(core)
    after = state(core.fs)
    core.close(save=False)
    core.open()
    assert state(core.fs) == before
    change(core)
    core.fs.commit()
    wanted = state(core.fs)
    core.close(save=False)
    core.open()
    assert state(core.fs) == wanted
    assert wanted.keys() == after.keys()
    assert fsck.fsck(core.fs) == []


def test_numbers_are_never_used_twice_across_mounts(core: Core) -> None:
    last = core.file(b"gone")
    core.fs.unlink(ROOT_INO, b"gone")
    core.reopen()
    assert core.file(b"new") > last


def test_proxy_numbers_are_never_used_twice_across_mounts(core: Core) -> None:
    one = core.file(b"1", pages("A"))
    core.clone(one, b"2")
    core.reopen()
    core.clone(core.file(b"3", pages("B")), b"4")
    core.reopen()
    numbers = [
        {link.proxy.number for link in core.fs.extents_of(ino) if link.proxy} for ino in (one, one + 2)
    ]
    assert numbers[0].isdisjoint(numbers[1])


def test_a_commit_of_nothing_writes_nothing(core: Core) -> None:
    a_bit_of_everything(core)
    core.fs.commit()
    before = digest(core)
    core.fs.commit()
    assert digest(core) == before


def digest(core: Core) -> bytes:
    return hashlib.blake2b(core.pmem.media.view(0, core.pmem.media.size)).digest()


# -- crashes in the midst of a commit


@pytest.mark.parametrize("torn", [False, True])
def test_a_commit_is_all_or_nothing_wherever_it_is_cut_off(core: Core, torn: bool) -> None:
    """Mount the state of the device at each write of a few commits, with a checkpoint among the writes."""
    a_bit_of_everything(core)
    core.fs.commit()
    states, images = [state(core.fs)], []
    region, store = core.fs.region, core.fs.region._store

    def watched(file: MetadataFile, replica: int, first: int, blocks: memoryview) -> None:
        for at, page in in_pages(0, blocks):
            number = first + at // PAGE_SIZE
            if torn:
                place, half = region._device_offset(file, replica, number), PAGE_SIZE // 2
                kept = bytes(core.pmem.media.view(place, half))
                core.pmem.media.view(place, half)[:] = page[:half]
                images.append((len(states), snapshot(core)))
                core.pmem.media.view(place, half)[:] = kept
            store(file, replica, number, page)
            if not torn:
                images.append((len(states), snapshot(core)))

    region._store = watched  # type: ignore[method-assign]
    for number in range(8):
        for each in range(20):
            core.file(b"%0200d" % (number * 1000 + each))
        core.fs.rename((ROOT_INO, b"%0200d" % (number * 1000)), (ROOT_INO, b"moved %d" % number), 0)
        core.fs.commit()
        states.append(state(core.fs))
    region._store = store  # type: ignore[method-assign]
    core.without_filesystem()
    assert len(images) > 70
    for at, image in images[:: len(images) // 60]:
        restore(core, image)
        with mounted(core) as fs:
            assert state(fs) in (states[at - 1], states[at])


def snapshot(core: Core) -> list[tuple[int, bytes]]:
    """The pages of the metadata."""
    links = [link for link in core.fs.rmap if link.ino == 0]
    spans = [(link.dev_block * PAGE_SIZE, link.length * PAGE_SIZE) for link in links]
    return [(offset, bytes(core.pmem.media.view(offset, length))) for offset, length in spans]


def restore(core: Core, image: list[tuple[int, bytes]]) -> None:
    for offset, data in image:
        core.pmem.media.view(offset, len(data))[:] = data


def test_the_tables_are_sqlites_and_sound(core: Core) -> None:
    a_bit_of_everything(core)
    core.fs.commit()
    assert core.fs.store.integrity_check() == []
    assert isinstance(core.fs.store._connection(), apsw.Connection)
