"""Files of O_TMPFILE: in the store from the first commit on, without a name. A crash ends them."""

from __future__ import annotations

import stat

import pytest

from daxemu.errors import CorruptMetadata
from daxemu.events import no_log
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO, Inode
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.uapi import PAGE_SIZE
from tests.support.core import ROOT, Core, pages

LINKS = 5


def orphan(core: Core) -> Inode:
    """Make a file of LINKS extents without a name, as an open with O_TMPFILE does."""
    inode = core.fs.tmpfile(ROOT_INO, stat.S_IFREG | 0o600, ROOT)
    core.fs.open(inode)
    for number in range(LINKS):
        core.fs.write(inode.ino, number * 2 * PAGE_SIZE, pages("x"))
    return inode


def rows(core: Core, table: str) -> int:
    """Return the number of rows of a table."""
    ((count,),) = core.fs.store._execute(f"SELECT count(*) FROM {table}")
    assert isinstance(count, int)
    return count


def free(core: Core) -> int:
    return core.fs.statfs().free


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_crash_ends_a_file_without_a_name(core: Core, is_committed: bool) -> None:
    before = free(core)
    inode = orphan(core)
    if is_committed:
        core.fs.fsync()
        assert rows(core, "link") == LINKS
    core.close(save=False)
    core.open()
    assert core.fs.names.find(inode.ino) is None
    assert (rows(core, "inode"), rows(core, "link")) == (1, 0)
    assert free(core) == before
    assert fsck(core.fs) == []


def test_after_a_crash_an_orphan_is_no_problem_for_fsck(core: Core) -> None:
    orphan(core)
    core.fs.fsync()
    core.close(save=False)
    core.open_pmem()
    fs = Filesystem(core.pmem.dax, MemoryFailures(no_log), no_log, read_only=True)
    assert fsck(fs) == []
    fs.store.is_clean = True
    assert fsck(fs) == ["inode 2: unlinked, unused, and still there"]
    fs.close()
    core.drop_pmem()
    core.open()


def test_the_mount_ends_a_file_without_a_name(core: Core) -> None:
    before = free(core)
    orphan(core)
    core.fs.fsync()
    core.reopen()
    assert (rows(core, "inode"), rows(core, "link")) == (1, 0)
    assert free(core) == before


def test_a_closed_file_without_a_name_leaves_the_store(core: Core) -> None:
    inode = orphan(core)
    core.fs.fsync()
    core.fs.release(inode.ino)
    core.fs.fsync()
    assert (rows(core, "inode"), rows(core, "link")) == (1, 0)


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_name_comes_with_the_whole_file(core: Core, is_committed: bool) -> None:
    inode = orphan(core)
    contents = core.read(inode.ino)
    if is_committed:
        core.fs.fsync()
    core.fs.link(inode.ino, ROOT_INO, b"f")
    core.fs.fsync()
    core.close(save=False)
    core.open()
    assert core.fs.names.lookup(ROOT_INO, b"f").ino == inode.ino
    assert core.read(inode.ino) == contents
    assert rows(core, "link") == LINKS


def test_a_crash_before_the_commit_of_the_name_ends_the_file(core: Core) -> None:
    inode = orphan(core)
    core.fs.fsync()
    core.fs.link(inode.ino, ROOT_INO, b"f")
    core.close(save=False)
    core.open()
    assert core.fs.names.find(inode.ino) is None
    assert core.fs.names.directory(ROOT_INO)[1] == {}


def test_only_a_regular_file_can_be_an_orphan(core: Core) -> None:
    core.file()
    core.fs.commit()
    core.fs.store._execute("UPDATE inode SET nlink=0, mode=0x11a4")
    core.sound = False
    core.close(save=False)
    with pytest.raises(CorruptMetadata, match="not a regular file"):
        core.open()
    core.drop_pmem()
