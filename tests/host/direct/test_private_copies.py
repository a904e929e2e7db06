"""Private copies of direct mappings: what stays when the file changes, and what goes with the page."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

import pytest

from daxemu.fs.inode import ROOT_INO
from daxemu.host.direct.advice import MADV_FREE, MADV_WIPEONFORK
from daxemu.host.direct.calls import MAP_PRIVATE
from daxemu.host.direct.syscalls import MADV_DONTNEED
from daxemu.host.run.filters import Nr
from daxemu.ranges import Range
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, Ino
from tests.host.direct.test_own_space import run
from tests.support.core import Core, pages
from tests.support.own_space import Host

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd(2) needs root")

Change = Callable[[Host, Ino], Awaitable[None]]


async def punch(host: Host, ino: Ino) -> None:
    await host.fallocate(ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE_SIZE, PAGE_SIZE)


async def copy_on_write(host: Host, ino: Ino) -> None:
    await host.clone(ino, host.core.file(b"clone"))
    await host.write(ino, PAGE_SIZE, pages("n"))


async def replace_by_a_clone(host: Host, ino: Ino) -> None:
    await host.clone(host.core.file(b"source", pages("wxyz")), ino)


async def need_room(host: Host, ino: Ino) -> None:
    """Make the mapping lazy because the address space has no room for a further piece."""
    process = host.processes[0]
    host.mappings.page_tables._most_pieces = len(process.space.pieces)
    at = await process.mmap(host.core.file(b"other", pages("o")), 1)
    assert await process.letters(at, 1) == "o"


@pytest.mark.parametrize("change", [punch, copy_on_write, replace_by_a_clone, need_room])
def test_a_truncation_takes_a_private_copy_whose_block_became_lazy_before(core: Core, change: Change) -> None:
    async def test(host: Host) -> None:
        ino = core.file(data=pages("abcd"))
        process = host.process()
        at = await process.mmap(ino, 4, flags=MAP_PRIVATE)
        assert await process.store(at + PAGE_SIZE, b"P")
        await change(host, ino)
        assert await process.letters(at + PAGE_SIZE, 1) == "P"
        await host.truncate(ino, PAGE_SIZE)
        assert await process.letters(at + PAGE_SIZE, 3) == "!!!"
        await host.truncate(ino, 4 * PAGE_SIZE)
        assert await process.letters(at + PAGE_SIZE, 3) == "..."

    run(core, test)


async def drop(host: Host, at: int, count: int) -> None:
    assert await host.processes[0].call(Nr.MADVISE, at, count * PAGE_SIZE, MADV_DONTNEED) == 0


def test_madv_dontneed_takes_a_private_copy_of_a_hole(core: Core) -> None:
    async def test(host: Host) -> None:
        ino = core.file(data=pages("a"))
        await host.truncate(ino, 3 * PAGE_SIZE)
        process = host.process()
        at = await process.mmap(ino, 3, flags=MAP_PRIVATE)
        assert await process.store(at + PAGE_SIZE, b"P")
        await drop(host, at, 3)
        assert await process.letters(at, 3) == "a.."
        await host.write(ino, PAGE_SIZE, pages("bc"))
        assert await process.letters(at, 3) == "abc"

    run(core, test)


@pytest.mark.parametrize("change", [punch, copy_on_write, replace_by_a_clone])
def test_madv_dontneed_never_shows_a_block_that_another_file_has_now(core: Core, change: Change) -> None:
    async def test(host: Host) -> None:
        ino, thief = core.file(data=pages("abcd")), core.file(b"thief")
        process = host.process()
        at = await process.mmap(ino, 4, flags=MAP_PRIVATE)
        assert await process.store(at + PAGE_SIZE, b"P")
        (had,) = core.fs.runs(ino, Range(1, 2))
        await change(host, ino)
        if change is copy_on_write:
            core.fs.unlink(ROOT_INO, b"clone")
        core.fs.commit()
        size = 0
        while not any(owner.ino == thief for owner in core.fs.rmap.owners(had.dev_block, had.dev_block + 1)):
            core.fs.write(thief, size, pages("T"))
            size += PAGE_SIZE
        await drop(host, at, 4)
        shown = core.read(ino)[::PAGE_SIZE].decode().replace("\0", ".")
        assert await process.letters(at, 4) == shown
        assert "T" not in shown

    run(core, test)


def test_madv_dontneed_takes_private_copies_of_data_and_leaves_the_rest(core: Core) -> None:
    async def test(host: Host) -> None:
        process = host.process()
        at = await process.mmap(core.file(data=pages("abcd")), 4, flags=MAP_PRIVATE)
        for page in (0, 2):
            assert await process.store(at + page * PAGE_SIZE, b"P")
        await drop(host, at + PAGE_SIZE, 3)
        assert await process.letters(at, 4) == "Pbcd"

    run(core, test)


@pytest.mark.parametrize("advice", [MADV_FREE, MADV_WIPEONFORK])
def test_advice_for_anonymous_memory_is_refused_as_for_every_file(core: Core, advice: int) -> None:
    async def test(host: Host) -> None:
        ino = core.file(data=pages("a"))
        await host.truncate(ino, 2 * PAGE_SIZE)
        process = host.process()
        at = await process.mmap(ino, 2, flags=MAP_PRIVATE)
        assert await process.store(at + PAGE_SIZE, b"P")
        for page in (0, 1):
            assert await process.call(Nr.MADVISE, at + page * PAGE_SIZE, PAGE_SIZE, advice) == -errno.EINVAL
        assert await process.letters(at, 2) == "aP"

    run(core, test)
