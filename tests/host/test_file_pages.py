"""Pages of files at each address of a process; only victims with the page mapped are signalled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daxemu.host.proc import maps
from daxemu.host.proc.file_pages import FilePage, find_page, page_at
from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import Delivered, Gone, NotTaken
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AO, BUS_MCEERR_AR
from tests.host.tracee import Start, Tracee, scenario
from tests.support.actor import Actor

PAGE = 4096


def page_of(file: Path, pgoff: int) -> FilePage:
    found = file.stat()
    return FilePage(os.major(found.st_dev), os.minor(found.st_dev), found.st_ino, pgoff)


@pytest.mark.parametrize("query", ["ioctl", "text"])
def test_pages_of_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    if query == "text":
        monkeypatch.setattr(maps, "_PROCMAP_QUERY", 0xDEAD)  # a kernel that does not know the ioctl
    file = tmp_path / "f"
    file.write_bytes(bytes(64 * PAGE))
    with Actor.spawn(cwd=tmp_path) as actor:
        actor.cmd("open 0 f rw")
        actor.cmd("mmap 0 0 8 16 shared")
        actor.cmd("mmap 1 0 40 2 private")
        address = actor.addr(0)
        assert page_at(actor.pid, address + PAGE + 7) == page_of(file, 9)
        assert page_at(actor.pid, actor.addr(1, 1)) == page_of(file, 41)
        assert page_at(actor.pid, 0) is None
        assert find_page(actor.pid, page_of(file, 9), address + PAGE) == address + PAGE
        assert find_page(actor.pid, page_of(file, 9), address) == address + PAGE
        assert find_page(actor.pid, page_of(file, 24), address) is None
        actor.cmd("munmap 0")
        assert page_at(actor.pid, address) is None
    assert page_at(actor.pid, address) is None
    assert find_page(actor.pid, page_of(file, 9), address) is None


def test_ao_carries_the_present_address_of_the_page() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        address = tracee.map + 3 * PAGE
        pending = await link.send_ao(tracee.pid, tracee.pid, 0x1000, page=page_of(tracee.file, 3))
        assert await pending.wait(30) == Delivered(pending.id, tracee.pid, BUS_MCEERR_AO, address, pending.id)
        assert await tracee.line() == f"BUS 5 {address:x} 12 {tracee.pid}"

    scenario(play)


def test_a_process_that_unmapped_the_page_gets_no_ao() -> None:
    """As after execve(2), of a program without a handler."""

    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        gone = page_of(tracee.file, 1 << 20)
        for _ in range(2):  # the second request finds the thread held
            pending = await link.send_ao(tracee.pid, tracee.pid, tracee.map, page=gone)
            assert await pending.wait(30) == Gone(pending.id)
        await tracee.free()
        assert await tracee.ask("count") == "counted 0"

    scenario(play)


def test_a_fault_of_another_page_does_not_become_ar() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        os.truncate(tracee.file, 0)
        armed = await link.arm(tracee.pid, 1.0, page_of(tracee.file, 5))
        assert isinstance(armed, Armed)
        assert await touch(tracee, 2) == f"BUS {BUS_ADRERR} {tracee.map + 2 * PAGE:x} 0 {tracee.pid}"
        assert await armed.wait(30) == NotTaken(armed.id)
        armed = await link.arm(tracee.pid, 30, page_of(tracee.file, 5))
        assert isinstance(armed, Armed)
        address = tracee.map + 5 * PAGE
        assert await touch(tracee, 5) == f"BUS {BUS_MCEERR_AR} {address:x} 12 {tracee.pid}"
        assert await armed.wait(30) == Delivered(armed.id, tracee.pid, BUS_MCEERR_AR, address, armed.id)

    scenario(play)


async def touch(tracee: Tracee, page: int) -> str:
    return await tracee.ask(f"touch {page * PAGE}")
