"""Direct mappings of real media in the test's own process: effects of each change of a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

import pytest
import trio

from daxemu.host.direct import calls, page_tables, requests
from daxemu.host.direct.calls import (
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_SYNC,
    OpenFile,
)
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.run.filters import Nr
from daxemu.host.run.seccomp import NotifiedCall
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, PMD_SIZE
from tests.support.core import Core, core_at, pages
from tests.support.own_space import READ, Host, host_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd(2) needs root")

Test = Callable[[Host], Awaitable[None]]


def run(core: Core, test: Test) -> None:
    async def main() -> None:
        async with host_of(core) as host:
            await test(host)

    trio.run(main)


def present(address: int, count: int) -> str:
    with Pagemap(os.getpid()) as pagemap:
        return "".join("1" if entry.present else "0" for entry in pagemap.entries(address, count))


def pfn(address: int) -> int:
    with Pagemap(os.getpid()) as pagemap:
        return pagemap.entries(address, 1)[0].pfn


def test_a_store_is_in_the_file_at_once_and_a_write_is_in_the_mapping(core: Core) -> None:
    async def test(host: Host) -> None:
        ino = core.file(data=pages("abcd"))
        process = host.process()
        at = await process.mmap(ino, 4, flags=MAP_SHARED_VALIDATE | MAP_SYNC)
        assert await process.letters(at, 4) == "abcd"
        assert await process.store(at + PAGE_SIZE, b"stored")
        assert core.read(ino)[PAGE_SIZE:][:6] == b"stored"
        await host.write(ino, 2 * PAGE_SIZE, b"written")
        assert await process.load(at + 2 * PAGE_SIZE, 7) == b"written"

    run(core, test)


def test_a_touch_makes_one_page_present(core: Core) -> None:
    async def test(host: Host) -> None:
        process = host.process()
        at = await process.mmap(core.file(data=pages("a" * 16)), 16)
        await process.load(at)
        await process.load(at + 5 * PAGE_SIZE)
        assert present(at, 16) == "1000010000000000"

    run(core, test)


def test_reflinks_share_a_page_until_a_store(core: Core) -> None:
    async def test(host: Host) -> None:
        a, b = core.file(b"a", pages("xyz")), core.file(b"b")
        one, other = host.process(), host.process()
        at = await one.mmap(a, 3)
        assert await one.letters(at, 3) == "xyz"
        await host.clone(a, b)
        assert present(at, 3) == "111"  # a clone leaves the source present
        bt = await other.mmap(b, 3)
        assert await other.letters(bt, 3) == "xyz"
        assert pfn(at + PAGE_SIZE) == pfn(bt + PAGE_SIZE)
        assert await one.store(at + PAGE_SIZE, b"!")
        assert (await one.letters(at, 3), await other.letters(bt, 3)) == ("x!z", "xyz")
        assert pfn(at + PAGE_SIZE) != pfn(bt + PAGE_SIZE)
        core.fs.fsync()  # until the commit, a crash would show the block in both files
        kept = pfn(bt + PAGE_SIZE)
        assert await other.store(bt + PAGE_SIZE, b"?")  # the last owner stores in place
        assert pfn(bt + PAGE_SIZE) == kept
        assert (core.read(a)[PAGE_SIZE:][:1], core.read(b)[PAGE_SIZE:][:1]) == (b"!", b"?")

    run(core, test)


def test_a_copy_at_a_store_is_shown_by_every_mapping_of_the_file(core: Core) -> None:
    async def test(host: Host) -> None:
        a, b = core.file(b"a", pages("xyz")), core.file(b"b")
        processes = [host.process() for _ in range(3)]
        at = [await process.mmap(a, 3) for process in processes]
        for process, address in zip(processes, at, strict=True):
            assert await process.letters(address, 3) == "xyz"
        await host.clone(a, b)
        assert await processes[1].store(at[1], b"N")
        for process, address in zip(processes, at, strict=True):
            assert await process.letters(address, 3) == "Nyz"
        assert core.read(b)[:1] == b"x"

    run(core, test)


def test_a_hole_is_zeros_until_a_store_allocates_it(core: Core) -> None:
    async def test(host: Host) -> None:
        ino = core.file()
        await host.truncate(ino, 8 * PAGE_SIZE)
        one, other = host.process(), host.process()
        at, bt = await one.mmap(ino, 8), await other.mmap(ino, 8)
        assert await other.letters(bt, 8) == "." * 8
        assert core.fs.extents_of(ino).blocks == 0
        assert await one.store(at + 3 * PAGE_SIZE, b"n")
        assert core.fs.extents_of(ino).blocks == 1
        assert await other.letters(bt, 8) == "...n...."
        assert await one.letters(at, 8) == "...n...."
        assert await other.store(bt + 3 * PAGE_SIZE + 1, b"m")
        assert core.read(ino)[3 * PAGE_SIZE :][:2] == b"nm"
        assert await other.store(bt + 4 * PAGE_SIZE, b"o")  # zeros were shown here
        assert await one.letters(at, 8) == "...no..."

    run(core, test)


def test_a_store_to_a_hole_of_a_full_device_fails_and_succeeds_with_space(core: Core) -> None:
    async def test(host: Host) -> None:
        ino, large = core.file(b"f"), core.file(b"large")
        await host.truncate(ino, 4 * PAGE_SIZE)
        core.fs.fallocate(large, 0, 0, core.fs.allocator.usable_blocks * PAGE_SIZE)
        process = host.process()
        at = await process.mmap(ino, 4)
        assert not await process.store(at, b"n")
        assert await process.load(at + PAGE_SIZE) == b"\0"
        await host.truncate(large, 0)
        core.fs.fsync()
        with trio.fail_after(5):
            while not await process.store(at, b"n"):  # noqa: ASYNC110 - the store itself is the event
                await trio.sleep(0.02)
        assert core.read(ino)[:1] == b"n"

    run(core, test)


def test_an_access_beyond_the_end_fails_until_the_file_grows(core: Core) -> None:
    async def test(host: Host) -> None:
        ino = core.file(data=pages("ab"))
        process = host.process()
        at = await process.mmap(ino, 4)
        assert await process.letters(at, 4) == "ab!!"
        await host.truncate(ino, 3 * PAGE_SIZE)
        assert await process.letters(at, 4) == "ab.!"
        assert await process.store(at + 2 * PAGE_SIZE, b"c")
        await host.truncate(ino, PAGE_SIZE)
        assert await process.letters(at, 4) == "a!!!"
        await host.truncate(ino, 4 * PAGE_SIZE)
        assert await process.letters(at, 4) == "a..."

    run(core, test)


def test_a_punched_hole_is_zeros_in_every_mapping(core: Core) -> None:
    async def test(host: Host) -> None:
        ino = core.file(data=pages("abcd"))
        one, other = host.process(), host.process()
        at, bt = await one.mmap(ino, 4), await other.mmap(ino, 4)
        assert await one.letters(at, 4) == await other.letters(bt, 4) == "abcd"
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        await host.fallocate(ino, mode, PAGE_SIZE, 2 * PAGE_SIZE)
        assert await one.letters(at, 4) == await other.letters(bt, 4) == "a..d"
        assert await one.store(at + PAGE_SIZE, b"B")
        assert await other.letters(bt, 4) == "aB.d"

    run(core, test)


def test_a_private_copy_stays_when_the_file_changes(core: Core) -> None:
    async def test(host: Host) -> None:
        ino, clone = core.file(b"a", pages("abcd")), core.file(b"b")
        await host.truncate(ino, 6 * PAGE_SIZE)
        process, writer = host.process(), host.process()
        at = await process.mmap(ino, 6, flags=MAP_PRIVATE, mode=os.O_RDONLY)
        assert await process.letters(at, 6) == "abcd.."
        for page in (1, 4):
            assert await process.store(at + page * PAGE_SIZE, b"P")
        assert core.read(ino)[PAGE_SIZE:][:1] == b"b"
        await host.clone(ino, clone)
        bt = await writer.mmap(ino, 6)
        for page in range(6):
            assert await writer.store(bt + page * PAGE_SIZE, b"W")
        assert await process.letters(at, 6) == "WPWWPW"
        await host.truncate(ino, 6 * PAGE_SIZE)
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        await host.fallocate(ino, mode, 0, 6 * PAGE_SIZE)
        assert await process.letters(at, 6) == ".P..P."

    run(core, test)


def scattered(core: Core, count: int) -> int:
    """Return a file of ``count`` extents of one block, with the letter a in each."""
    a, b = core.file(b"a"), core.file(b"b")
    for page in range(count):
        core.fs.write(a, page * PAGE_SIZE, pages("a"))
        core.fs.write(b, page * PAGE_SIZE, pages("b"))
    return a


def test_a_mapping_of_many_extents_shows_all_at_once(core: Core) -> None:
    async def test(host: Host) -> None:
        a, target = scattered(core, 600), core.file(b"")
        await host.clone(a, target)
        core.fs.write(a, 300 * PAGE_SIZE, pages("n"))  # neighbours are shared, this block is not
        process = host.process()
        at = await process.mmap(a, 600)
        assert process.space.shown.total == 600 * PAGE_SIZE
        assert await process.letters(at, 600) == "a" * 300 + "n" + "a" * 299
        for page in (0, 299, 300, 301, 599):
            assert await process.store(at + page * PAGE_SIZE, b"s")
            assert core.read(a)[page * PAGE_SIZE :][:1] == b"s"
        assert core.read(target) == pages("a" * 600)

    run(core, test)


def test_a_lazy_mapping_of_many_extents_shows_each_run_when_touched(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "EAGER", 256)

    async def test(host: Host) -> None:
        ino = core.file(b"a")
        for page in range(0, 600, 2):  # a hole behind each page
            core.fs.write(ino, page * PAGE_SIZE, pages("a"))
        process = host.process()
        at = await process.mmap(ino, 600)
        assert process.space.shown.total == 0
        assert await process.load(at + 598 * PAGE_SIZE) == b"a"
        assert await process.store(at + 300 * PAGE_SIZE, b"n")
        assert core.read(ino)[300 * PAGE_SIZE :][:1] == b"n"
        assert process.space.shown.total == 2 * PAGE_SIZE

    run(core, test)


@pytest.mark.parametrize("unit", [1, 2])
def test_munmap_mprotect_and_mremap_of_parts(core: Core, unit: int) -> None:
    async def test(host: Host) -> None:
        ino = core.file(data=pages("abcdefgh"))
        process = host.process()
        at = await process.mmap(ino, 8)
        assert await process.letters(at, 8) == "abcdefgh"
        assert await process.call(Nr.MUNMAP, at + 2 * PAGE_SIZE, unit * PAGE_SIZE) == 0
        assert not process.space.covers(process.space.at(at).addresses._replace(end=at + 3 * PAGE_SIZE))  # type: ignore[union-attr]
        assert await process.load(at + 2 * PAGE_SIZE) is None
        assert await process.call(Nr.MPROTECT, at, PAGE_SIZE, READ) == 0
        assert not await process.store(at, b"x")
        assert await process.store(at + PAGE_SIZE, b"B")
        moved = await process.call(Nr.MREMAP, at + 4 * PAGE_SIZE, 4 * PAGE_SIZE, 6 * PAGE_SIZE, 1)
        await host.truncate(ino, 10 * PAGE_SIZE)
        assert await process.letters(moved, 6) == "efgh.."
        assert await process.store(moved + 5 * PAGE_SIZE, b"J")
        assert core.read(ino)[9 * PAGE_SIZE :][:1] == b"J"

    run(core, test)


def test_map_fixed_replaces_a_mapping(core: Core) -> None:
    async def test(host: Host) -> None:
        a, b = core.file(b"a", pages("abcd")), core.file(b"b", pages("wxyz"))
        process = host.process()
        at = await process.mmap(a, 4)
        assert await process.letters(at, 4) == "abcd"
        got = await process.mmap(b, 2, flags=MAP_SHARED | MAP_FIXED, address=at + PAGE_SIZE, page=2)
        assert got == at + PAGE_SIZE
        assert await process.letters(at, 4) == "ayzd"
        assert await process.store(got, b"Y")
        assert core.read(b)[2 * PAGE_SIZE :][:1] == b"Y"

    run(core, test)


def test_a_file_without_a_name_lives_while_it_is_mapped(core: Core) -> None:
    async def test(host: Host) -> None:
        ino = core.file(b"f", pages("abcd"))
        process = host.process()
        at = await process.mmap(ino, 4)
        core.fs.unlink(1, b"f")
        core.fs.fsync()
        assert await process.letters(at, 4) == "abcd"
        assert await process.call(Nr.MUNMAP, at, 2 * PAGE_SIZE) == 0
        assert await process.letters(at + 2 * PAGE_SIZE, 2) == "cd"
        used = core.fs.allocator.free_blocks
        assert await process.call(Nr.MUNMAP, at + 2 * PAGE_SIZE, 2 * PAGE_SIZE) == 0
        assert core.fs.allocator.free_blocks == used + 4

    run(core, test)


def test_after_a_shutdown_every_access_fails(core: Core) -> None:
    async def test(host: Host) -> None:
        process = host.process()
        at = await process.mmap(core.file(data=pages("ab")), 4)
        assert await process.letters(at, 2) == "ab"
        await trio.to_thread.run_sync(host.mappings.revoke_all)
        assert await process.letters(at, 4) == "!!!!"

    run(core, test)


@pytest.mark.parametrize(
    ("mode", "prot", "flags", "offset", "pages_", "error"),
    [
        (os.O_RDONLY, 3, MAP_SHARED, 0, 1, errno.EACCES),
        (os.O_WRONLY, 1, MAP_PRIVATE, 0, 1, errno.EACCES),
        (os.O_RDWR, 3, MAP_SHARED, 1, 1, errno.EINVAL),
        (os.O_RDWR, 3, 0, 0, 1, errno.EINVAL),
        (os.O_RDWR, 3, MAP_SHARED, 0, 0, errno.EINVAL),
        (os.O_RDWR, 3, MAP_SHARED_VALIDATE | 0x4000000000 | 0x200000, 0, 1, errno.EOPNOTSUPP),
        (os.O_RDWR, 3, MAP_SHARED, (1 << 64) - PAGE_SIZE, 2, errno.EOVERFLOW),
        (os.O_RDONLY, 3, MAP_PRIVATE, 0, 1, 0),
    ],
)
def test_mmap_is_refused_as_by_the_kernel(
    core: Core, mode: int, prot: int, flags: int, offset: int, pages_: int, error: int
) -> None:
    async def test(host: Host) -> None:
        call = NotifiedCall(1, os.getpid(), Nr.MMAP, (0, pages_ * PAGE_SIZE, prot, flags, 3, offset))
        assert host.calls.check_mmap(call, OpenFile(core.file(), mode)) == error

    run(core, test)


def test_a_file_open_for_reading_stays_without_prot_write(core: Core) -> None:
    async def test(host: Host) -> None:
        process = host.process()
        at = await process.mmap(core.file(data=pages("a")), 1, READ, mode=os.O_RDONLY)
        assert await process.call(Nr.MPROTECT, at, PAGE_SIZE, 3) == -errno.EACCES
        assert await process.load(at) == b"a"

    run(core, test)


def test_a_large_mapping_is_protected_in_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store to any share after a clone is a copy."""
    for module in (page_tables, requests):
        monkeypatch.setattr(module, "LARGE", PAGE_SIZE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    length = 3 * PMD_SIZE - PAGE_SIZE

    async def test(host: Host) -> None:
        ino, other = core.file(data=b"a" * length), core.file(b"other")
        process = host.process()
        at = await process.mmap(ino, length // PAGE_SIZE)
        places = [
            share + inside for share in range(0, length, PMD_SIZE) for inside in (0, PMD_SIZE - 2 * PAGE_SIZE)
        ]
        for place in places:
            assert await process.store(at + place, b"b")
        await host.clone(ino, other)
        for place in places:
            assert await process.store(at + place, b"c")
        cloned = core.read(other)
        assert [cloned[place : place + 2] for place in places] == [b"ba"] * len(places)

    with core_at(size=64 << 20) as core:
        run(core, test)
