"""Verbs of the filesystem: limits, sharing rules, lifetimes, shutdown, and queries."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from contextlib import suppress

import pytest

from daxemu.errors import Busy, FsError, NoSpace, Shutdown
from daxemu.events import FilesystemShutdown
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import MAX_FILE_SIZE, ROOT_INO
from daxemu.pmem.inject import inject, uninject
from daxemu.uapi import PAGE_SIZE
from tests.support.core import ROOT, Core, pages


def used_bytes(core: Core) -> int:
    return (core.path / "media").stat().st_blocks * 512


def refuses(number: int, verb: Callable[..., object], *arguments: object) -> bool:
    with pytest.raises(FsError) as caught:
        verb(*arguments)
    return caught.value.errno == number


# -- reading, writing, cutting


def test_a_write_of_nothing_does_nothing(core: Core) -> None:
    ino = core.file()
    free = core.fs.statfs().free
    assert core.fs.write(ino, 5000, b"") == 0
    assert core.fs.names.get(ino).size == 0
    assert core.fs.statfs().free == free


def test_a_read_ends_at_the_end_of_the_file(core: Core) -> None:
    ino = core.file(data=b"x" * 5000)
    assert bytes(core.fs.read(ino, 4990, 100)) == b"x" * 10
    assert bytes(core.fs.read(ino, 5000, 100)) == b""
    assert bytes(core.fs.read(ino, 1 << 60, 100)) == b""


def test_no_file_grows_beyond_the_largest_size(core: Core) -> None:
    ino = core.file()
    core.fs.set_size(ino, MAX_FILE_SIZE)
    assert refuses(errno.EFBIG, core.fs.set_size, ino, MAX_FILE_SIZE + 1)
    assert refuses(errno.EFBIG, core.fs.write, ino, MAX_FILE_SIZE, b"x")
    core.fs.write(ino, MAX_FILE_SIZE - 1, b"x")
    assert bytes(core.fs.read(ino, MAX_FILE_SIZE - 2, 10)) == b"\0x"


def test_directories_have_no_bytes(core: Core) -> None:
    assert refuses(errno.EISDIR, core.fs.read, ROOT_INO, 0, 1)
    assert refuses(errno.EISDIR, core.fs.write, ROOT_INO, 0, b"x")
    assert refuses(errno.EISDIR, core.fs.set_size, ROOT_INO, 0)


def test_writing_and_cutting_change_the_times(core: Core) -> None:
    ino = core.file()
    inode = core.fs.names.get(ino)
    for verb in (lambda: core.fs.write(ino, 0, b"x"), lambda: core.fs.set_size(ino, 0)):
        inode.mtime = inode.ctime = 0
        verb()
        assert inode.mtime == inode.ctime > 0


# -- lifetime


def test_an_unlinked_file_keeps_its_bytes_while_it_is_open(core: Core) -> None:
    ino = core.file(data=pages("A"))
    free = core.fs.statfs().free
    for _ in range(2):
        core.fs.open(core.fs.names.get(ino))
    core.fs.unlink(ROOT_INO, b"f")
    core.fs.release(ino)
    assert core.read(ino) == pages("A")
    assert core.fs.statfs().free == free
    core.fs.release(ino)
    assert refuses(errno.ESTALE, core.fs.read, ino, 0, 1)
    assert core.fs.statfs().free == free + 1


def test_an_unlinked_file_that_the_kernel_knows_keeps_its_inode_but_no_bytes(core: Core) -> None:
    ino = core.file(data=pages("A"))
    free = core.fs.statfs().free
    inode = core.fs.names.get(ino)
    core.fs.pin(inode, 2)
    core.fs.unlink(ROOT_INO, b"f")
    assert core.fs.statfs().free == free + 1
    core.fs.unpin(ino)
    assert core.fs.names.get(ino) is inode
    assert refuses(errno.ESTALE, core.fs.open, inode)
    core.fs.unpin(ino)
    assert refuses(errno.ESTALE, core.fs.names.get, ino)


def test_a_file_that_a_rename_replaced_goes(core: Core) -> None:
    old = core.file(b"old", pages("A"))
    core.file(b"new", pages("B"))
    core.fs.rename((ROOT_INO, b"new"), (ROOT_INO, b"old"), 0)
    assert refuses(errno.ESTALE, core.fs.names.get, old)


def test_an_unlinked_open_file_ends_with_the_mount(core: Core) -> None:
    free = core.fs.statfs().free
    ino = core.file(data=pages("A"))
    core.fs.open(core.fs.names.get(ino))
    core.fs.unlink(ROOT_INO, b"f")
    core.reopen()
    assert len(core.fs.names) == 1
    assert core.fs.statfs().free == free


def test_memory_is_given_back_with_the_last_link(core: Core) -> None:
    before = used_bytes(core)
    one = core.file(b"1", bytes(100 * PAGE_SIZE))
    core.clone(one, b"2")
    assert used_bytes(core) == before + 100 * PAGE_SIZE
    core.fs.unlink(ROOT_INO, b"1")
    core.fs.commit()
    assert used_bytes(core) == before + 100 * PAGE_SIZE
    core.fs.unlink(ROOT_INO, b"2")
    assert used_bytes(core) == before + 100 * PAGE_SIZE
    core.fs.commit()
    assert used_bytes(core) == before


def test_a_cleared_page_is_reserved_again(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    used = used_bytes(core)
    (place,) = core.fs.device_ranges(ino, PAGE_SIZE, PAGE_SIZE)
    inject(core.pmem, place.start, PAGE_SIZE)
    core.fs.adopt_cleared(uninject(core.pmem, place.start, PAGE_SIZE))
    assert used_bytes(core) == used
    assert core.read(ino) == pages("A") + bytes(PAGE_SIZE) + pages("C")


# -- shutdown


def test_after_a_shutdown_every_verb_is_eio(core: Core) -> None:
    ino = core.file(data=pages("A"))
    core.fs.shutdown("for a test")
    verbs: list[Callable[[], object]] = [
        lambda: core.fs.read(ino, 0, 1),
        lambda: core.fs.write(ino, 0, b"x"),
        lambda: core.fs.set_size(ino, 0),
        lambda: core.fs.mknod(ROOT_INO, b"g", stat.S_IFREG, 0, ROOT),
        lambda: core.fs.mkdir(ROOT_INO, b"g", 0o755, ROOT),
        lambda: core.fs.symlink(ROOT_INO, b"g", b"t", ROOT),
        lambda: core.fs.link(ino, ROOT_INO, b"g"),
        lambda: core.fs.setxattr(ino, b"user.a", b"", 0),
        lambda: core.fs.unlink(ROOT_INO, b"f"),
        lambda: core.fs.rmdir(ROOT_INO, b"d"),
        lambda: core.fs.rename((ROOT_INO, b"f"), (ROOT_INO, b"g"), 0),
        lambda: core.fs.remap_file_range(ino, 0, ino, PAGE_SIZE, 0),
    ]
    for verb in verbs:
        with pytest.raises(Shutdown) as caught:
            verb()
        assert caught.value.errno == errno.EIO


def test_a_second_shutdown_is_none(core: Core) -> None:
    core.fs.shutdown("first")
    core.fs.shutdown("second")
    assert core.fs.shutdown_reason == "first"
    assert len(core.of_type(FilesystemShutdown)) == 1


def test_a_shutdown_that_cannot_save_is_a_shutdown(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise NoSpace("the memory behind the device is full")

    monkeypatch.setattr(core.fs, "commit", full)
    with suppress(NoSpace):
        core.fs.shutdown("for a test")
    with pytest.raises(Shutdown):
        core.fs.check_alive()


def test_after_fsync_a_power_failure_loses_nothing_and_before_it_everything(core: Core) -> None:
    core.file(b"kept", pages("A"))
    core.fs.fsync()
    core.file(b"lost", pages("B"))
    core.fs.abandon()
    with pytest.raises(Shutdown):
        core.fs.fsync()
    core.reopen()
    assert set(core.fs.names.directory(ROOT_INO)[1]) == {b"kept"}


def test_a_file_that_was_open_without_a_name_at_the_unmount_leaves_nothing(core: Core) -> None:
    """A process holds such files open during a forced unmount."""
    ino = core.file(b"f", b"secret" * 4000)
    core.fs.open(core.fs.names.get(ino))
    core.fs.unlink(ROOT_INO, b"f")
    core.fs.fsync()
    core.reopen()
    other = core.file(b"other")
    core.fs.fallocate(other, 0, 0, 24000)
    assert core.read(other) == bytes(24000)


def test_what_a_lost_write_left_beyond_the_end_reads_as_zeros(core: Core) -> None:
    """The bytes are in the block at once, the file's new size only with the commit."""
    ino = core.file(b"f", b"x")
    core.fs.commit()
    core.fs.write(ino, 0, b"y" * 1000)
    core.close(save=False)
    core.open()
    assert core.read(ino) == b"y"
    core.fs.set_size(ino, 2000)
    assert core.read(ino) == b"y" + bytes(1999)
    assert fsck(core.fs) == []


def test_an_fsync_that_cannot_save_shuts_down(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(names: object, rmap: object, **options: object) -> None:
        raise NoSpace("the memory behind the device is full")

    core.file(b"f")
    monkeypatch.setattr(core.fs.store, "commit", full)
    for _ in range(2):
        with pytest.raises(Shutdown):
            core.fs.fsync()
    monkeypatch.undo()


# -- the device


def test_a_held_device_is_busy_and_nothing_on_it_changes(core: Core) -> None:
    ino = core.file(data=pages("A"))
    before = hash(bytes(core.pmem.media.view(0, core.pmem.media.size)))
    with pytest.raises(Busy):
        Filesystem(core.pmem.dax, core.mm, core.events.append)
    assert hash(bytes(core.pmem.media.view(0, core.pmem.media.size))) == before
    assert core.read(ino) == pages("A")


def test_close_lets_go_of_the_device(core: Core) -> None:
    core.fs.close()
    assert core.pmem.dax.dax_is_idle()
    core.fs = Filesystem(core.pmem.dax, core.mm, core.events.append)


def test_the_root_of_a_new_filesystem_belongs_to_its_maker(core: Core) -> None:
    core.fs.close()
    core.pmem.dax.discard(0, core.pmem.dax.size)
    core.fs = Filesystem(core.pmem.dax, core.mm, core.events.append, owner=(1000, 100))
    core.reopen()
    root = core.fs.names.get(ROOT_INO)
    assert (root.uid, root.gid) == (1000, 100)


def test_blocks_that_a_killed_supervisor_left_full_read_as_zeros(core: Core) -> None:
    """Uncommitted data lies in blocks that are free after the next mount."""
    core.file(data=b"secret" * 1000)
    core.close(save=False)
    core.open()
    ino = core.file(b"new", b"x")
    core.fs.set_size(ino, PAGE_SIZE)
    assert core.read(ino) == b"x" + bytes(PAGE_SIZE - 1)
