"""Parsers of /proc: hostile names, vanished processes, reads that are cut short."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxemu.host.proc import maps, pagemap, processes, stat, status
from daxemu.uapi import PAGE_SHIFT, PAGE_SIZE
from tests.support.actor import Actor

NAMES = [
    b"plain",
    b"two words",
    b") Z 7 (",
    b"a\nTgid:\t1",
    b"x 00:63 y",
    b"\xff\xfe",
    b"back\\slash",
    b"State:\tZ",
    b"",
]
PR_SET_NAME = 15


@contextmanager
def named(name: bytes) -> Iterator[int]:
    """A process with the given name, asleep."""
    code = (
        "import ctypes, sys, os\n"
        f"ctypes.CDLL(None).prctl({PR_SET_NAME}, {name!r}, 0, 0, 0)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


@pytest.mark.parametrize("name", NAMES)
def test_a_name_changes_no_other_field(name: bytes) -> None:
    with named(name) as pid:
        found = stat.read(pid)
        assert (found.state in "SR", found.parent, found.is_dead) == (True, os.getpid(), False)
        text = status.read(pid)
        assert (text.tid, text.tgid, text.tracer) == (pid, pid, 0)
        assert (text.state in "SR", text.euid, text.is_dead) == (True, os.geteuid(), False)
        assert processes.process_of(pid) == pid
        assert [thread.tid for thread in processes.read_threads(pid)] == [pid]


def test_the_stat_of_a_name_with_newlines_is_one_line() -> None:
    fields = " ".join(map(str, range(1, 52)))
    found = stat.parse(b"7 (a) R\nb) S " + fields.encode() + b"\n")
    assert (found.state, found.parent, found.flags) == ("S", 1, 6)
    assert found.faults == (b"7", b"9")


STAT = b"7 (cat) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19\n"
STATUS = b"Name:\tcat\nState:\tS (sleeping)\nTgid:\t7\nPid:\t7\nTracerPid:\t0\nUid:\t1\t2\t3\t4\n"
MAPS = b"1000-3000 rw-s 00005000 00:63 7                /dev/shm/a b\n4000-5000 r-xp 00000000 00:00 0 \n"


@pytest.mark.parametrize("size", range(len(STAT)))
def test_a_stat_that_is_cut_short_is_of_a_process_that_is_gone(size: int) -> None:
    with pytest.raises(ProcessLookupError):
        stat.parse(STAT[:size])


@pytest.mark.parametrize("size", range(len(STATUS)))
def test_a_status_that_is_cut_short_is_of_a_process_that_is_gone(size: int) -> None:
    with pytest.raises(ProcessLookupError):
        assert status.parse(STATUS[:size]).euid  # the last line


@pytest.mark.parametrize("size", [size for size in range(1, len(MAPS)) if MAPS[size - 1 : size] != b"\n"])
def test_maps_that_are_cut_short_are_of_a_process_that_is_gone(size: int) -> None:
    with pytest.raises(ProcessLookupError):
        list(maps.parse(MAPS[:size]))


def test_of_equal_lines_in_status_the_first_counts() -> None:
    assert status.parse(STATUS + b"Tgid:\t9\n").tgid == 7
    assert status.parse(b"Name:\tTgid:\t9\n" + STATUS).tgid == 7


def test_fields_of_status_that_a_kernel_may_lack() -> None:
    found = status.parse(STATUS)
    assert (found.ns_tgid, found.ns_tid, found.seccomp) == (7, 7, 0)
    nested = status.parse(STATUS + b"NStgid:\t7\t3\nNSpid:\t7\t4\nSeccomp:\t2\n")
    assert (nested.ns_tgid, nested.ns_tid, nested.seccomp) == (3, 4, 2)


def test_masks_groups_and_capabilities() -> None:
    found = status.parse(
        STATUS + b"Gid:\t5\t6\t7\t8\nGroups:\t10 20 \nSigPnd:\t0000000000000040\nSigBlk:\t0\n"
        b"SigIgn:\t1000\nCapEff:\t0000000000200000\n"
    )
    assert found.groups == [8, 10, 20]
    assert (found.pending, found.blocked, found.ignored) == (1 << 6, 0, 1 << 12)
    assert found.has_capability(21)
    assert not found.has_capability(20)


def test_mappings_with_their_modes() -> None:
    shared, private = maps.parse(MAPS)
    assert (shared.start, shared.end, shared.pgoff, shared.ino, shared.dev) == (
        0x1000,
        0x3000,
        5,
        7,
        (0, 0x63),
    )
    assert (shared.private, shared.writable, shared.copies, shared.executable) == (False, True, False, False)
    assert (private.private, private.writable, private.copies, private.executable) == (
        True,
        False,
        False,
        True,
    )
    assert (shared.nr_pages, shared.page_at(0x2000), shared.address_of(6)) == (2, 6, 0x2000)
    assert list(maps.parse(MAPS, (0, 0x63))) == [shared]


@pytest.mark.parametrize("name", [b"x 00:63 y", b" 00:63 ", b"\xff 00:63", b"a\\01200:63", b"r\r00:63"])
def test_a_path_that_holds_a_device_number_is_on_its_own_device(name: bytes) -> None:
    line = b"1000-2000 rw-s 00000000 00:01 7                /dev/shm/%b\n" % name
    assert list(maps.parse(line, (0, 0x63))) == []
    assert [vma.dev for vma in maps.parse(line)] == [(0, 1)]


@pytest.mark.parametrize("number", [maps._PROCMAP_QUERY, 0xDEAD], ids=["asked", "read"])
def test_both_ways_to_a_mapping_say_the_same(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_PROCMAP_QUERY", number)
    for vma in maps.read(os.getpid()):
        if vma.ino and vma.end - vma.start > PAGE_SIZE:
            assert maps.find_vma(os.getpid(), vma.end - 1) == vma
    assert maps.find_vma(os.getpid(), 0) is None


def test_a_process_that_vanished_says_so(tmp_path: Path) -> None:
    with Actor.spawn("mapper", cwd=tmp_path) as actor:
        pid = actor.pid
    for read in (
        stat.read,
        status.read,
        lambda pid: list(maps.read(pid)),
        pagemap.Pagemap,
        processes.read_comm,
    ):
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            read(pid)
    assert status.find(pid) is None
    assert maps.find_vma(pid, 0x1000) is None
    assert processes.process_of(pid) == pid
    assert processes.comm_of(pid) == "?"
    assert not processes.capable(pid, 0)
    assert not processes.in_group_or_capable(pid, os.getegid())


def test_entries_of_a_page_table() -> None:
    entry = pagemap.PageEntry(1 << 63 | 1 << 61 | 0x123)
    assert (entry.present, entry.swapped, entry.is_file, entry.pfn) == (True, False, True, 0x123)
    assert pagemap.PageEntry(1 << 62).swapped
    with pagemap.Pagemap("self") as own:
        code = next(vma for vma in maps.read(os.getpid()) if vma.executable and vma.ino)
        assert len(own.entries(code.start, code.nr_pages)) == code.nr_pages
        runs = list(own.present_in(code.start, code.end))
        marked = [
            at
            for at, page in enumerate(own.entries(code.start, code.nr_pages))
            if page.present and page.is_file
        ]
    assert runs
    listed = {code.pgoff + at for at in marked}
    assert {code.page_at(address) for run in runs for address in range(*run, 1 << PAGE_SHIFT)} <= listed
