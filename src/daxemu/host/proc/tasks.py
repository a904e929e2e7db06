"""Who maps what: the processes of this machine as /proc shows them (the kernel's walk over i_mmap and page
tables).

Addresses are bytes, file positions pages. Processes that vanish while they are looked at, or that we may not
look into, are left out: a process that is gone cannot be told, and one that is another user's is not ours to
tell.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from operator import attrgetter
from typing import NamedTuple

from daxemu.host import victims
from daxemu.host.proc import collect_in_c
from daxemu.host.proc.mapcount import all_found
from daxemu.host.proc.procfs import read_fields, read_whole
from daxemu.mm.memory_failure import PresentRun, Task, Thread
from daxemu.ranges import Range, merged
from daxemu.text import name_text
from daxemu.uapi import CAP_FSETID, PAGE_SHIFT, PAGE_SIZE, Ino

_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)

# uapi/linux/fs.h
_PAGE_IS_FILE = 1 << 2
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
_SCAN_ARG = struct.Struct("=12Q")
_PAGE_REGION = struct.Struct("=3Q")
_REGIONS = 256

_PM_PRESENT = 1 << 63
_PM_SWAP = 1 << 62
_PM_FILE = 1 << 61
_LOOKS = 8  # at a process that maps and faults meanwhile
_PM_CHUNK = 1 << 16  # pages looked at in one read(2) where PAGEMAP_SCAN is missing


class Vma(NamedTuple):
    """One mapping of a file of ours: addresses ``[start, end)`` show the file's pages from ``pgoff`` on, or a
    private one copies.
    """

    start: int
    end: int
    pgoff: int
    ino: Ino
    private: bool
    writable: bool
    """Shared, and for writing: stores reach the file."""
    copies: bool = False
    """Private, and for writing: a store copies the page."""

    @property
    def area(self) -> Range:
        """Its addresses."""
        return Range(self.start, self.end)


Wanted = Mapping[Ino, Sequence[Range]] | None
"""Page ranges by inode; None is everything on the device, of which one run of each process is enough."""
PagesOf = Callable[[int, list[Vma], Wanted], Iterator[PresentRun]]


def collect_tasks(
    dev: tuple[int, int],
    wanted: Wanted,
    skip: frozenset[int] = frozenset(),
    pages_of: PagesOf | None = None,
    likely: Set[int] = frozenset(),
) -> list[Task]:
    """Every process that has a wanted page of a file on ``dev``, with where.

    ``pages_of`` says what having is: :func:`present_runs` unless given, or :func:`mapped_runs`. ``likely``
    are those to look at first: it may turn out that nobody else has any.
    """
    pages_of = pages_of or present_runs
    pids = list(_pids(skip))
    found = _look_at_each([pid for pid in pids if pid in likely], dev, wanted, pages_of)
    rest = [pid for pid in pids if pid not in likely]
    # To be certain of those that were found costs as much again as to find them.
    if wanted is not None and pages_of is present_runs and len(found) < len(rest):
        everybody = all_found(found, wanted)
        rest = rest if everybody is None else everybody.living_in(rest)
    found += _look_at_each(rest, dev, wanted, pages_of)
    return sorted(found, key=attrgetter("pid"))


def _look_at_each(pids: list[int], dev: tuple[int, int], wanted: Wanted, pages_of: PagesOf) -> list[Task]:
    tasks = []
    for found in pids if victims.MISSING else _looked_at(pids, dev, wanted, pages_of):
        task = found if isinstance(found, Task) else _look_at(found, dev, wanted, pages_of)
        if task is not None:
            tasks.append(task)
    return tasks


def _looked_at(
    pids: list[int], dev: tuple[int, int], wanted: Wanted, pages_of: PagesOf
) -> Iterator[Task | int]:
    """What C found at once, and who is still to be looked at."""
    is_plain = wanted is not None and pages_of is present_runs
    for found in collect_in_c.collect(pids, dev, wanted if wanted is not None and is_plain else {}):
        if isinstance(found, int):
            yield found
            continue
        try:
            # The leader's line of stat said it all if it is the only one.
            alone = found.nr_threads == 1
            threads = [Thread(found.pid, found.flags)] if alone else read_threads(found.pid)
            yield Task(found.pid, _as_name(found.comm), tuple(threads), tuple(map(_present, found.runs)))
        except _GONE:
            continue


def _present(run: collect_in_c.Run) -> PresentRun:
    area = Range(run.vma_start, run.vma_end)
    writable = bool(run.writable)
    return PresentRun(run.ino, run.first, run.nr_pages, run.address, PAGE_SHIFT, area, writable=writable)


def _pids(skip: frozenset[int]) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in skip:
            yield int(name)


def _look_at(pid: int, dev: tuple[int, int], wanted: Wanted, pages_of: PagesOf) -> Task | None:
    try:
        present = _settled(pid, dev, lambda vmas: pages_of(pid, vmas, wanted))
        if not present:
            return None
        return Task(pid, read_comm(pid), tuple(read_threads(pid)), present)
    except _GONE:
        return None


def _settled(
    pid: int, dev: tuple[int, int], look: Callable[[list[Vma]], Iterable[PresentRun]]
) -> tuple[PresentRun, ...]:
    """What ``look`` finds in the page tables at the addresses of given mappings.

    Mappings and page tables cannot be read at once: what is present at an address may belong to what was
    mapped there for a moment, or have moved away. A process that changes all the while is looked at several
    times, and has what it had each time.
    """
    vmas, faults = list(read_vmas(pid, dev)), _faults(pid)
    found: tuple[PresentRun, ...] = ()
    looks = []
    for _ in range(_LOOKS if vmas else 0):
        before, at_first = vmas, faults
        found = tuple(look(vmas))
        vmas, faults = list(read_vmas(pid, dev)), _faults(pid)
        if vmas == before:
            if not found or faults == at_first:
                return found
            looks.append(found)
    return tuple(
        run
        for run in found
        if _is_shown(run, vmas) and all(any(_overlap(run, other) for other in each) for each in looks)
    )


def _faults(pid: int) -> list[bytes]:
    """How many page faults the process has had: without one, nothing becomes present."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2].split()[7:10:2]


def _overlap(run: PresentRun, other: PresentRun) -> bool:
    same = Range(run.index, run.index + run.nr_pages).clip(other.index, other.index + other.nr_pages)
    return run.mapping == other.mapping and bool(same)


def read_vmas(pid: int, dev: tuple[int, int]) -> Iterator[Vma]:
    """The mappings of files on ``dev`` in a process. Raises one of the errors of a vanished process."""
    text = read_whole(f"/proc/{pid}/maps")
    shown = b"%02x:%02x" % dev
    if shown not in text:
        return
    for line in text.split(b"\n"):
        # A file's name, which comes last, may hold anything but a newline.
        if shown in line and (fields := line.split(None, 5))[3] == shown:
            addresses, mode, offset, _, ino, *_ = fields
            start, end = addresses.split(b"-")
            pgoff = int(offset, 16) >> PAGE_SHIFT
            private = mode.endswith(b"p")
            can_write = mode[1:2] == b"w"
            stores = (can_write and not private, can_write and private)
            yield Vma(int(start, 16), int(end, 16), pgoff, int(ino), private, *stores)


class Mapped(NamedTuple):
    """What a process shows of a file of ours, in bytes of the file."""

    pid: int
    comm: str
    ino: Ino
    offset: int
    length: int


def mapped_files(dev: tuple[int, int]) -> Iterator[Mapped]:
    """Every mapping of a file on ``dev``, in every process that we may look into."""
    for pid in _pids(frozenset()):
        try:
            vmas = list(read_vmas(pid, dev))
            comm = read_comm(pid) if vmas else ""
        except _GONE:
            continue
        for vma in vmas:
            yield Mapped(pid, comm, vma.ino, vma.pgoff << PAGE_SHIFT, vma.end - vma.start)


def mapped_runs(pid: int, vmas: list[Vma], wanted: Wanted) -> Iterator[PresentRun]:
    """The wanted pages that are mapped, touched or not."""
    for vma, part in _wanted_parts(vmas, wanted):
        address = vma.start + ((part.start - vma.pgoff) << PAGE_SHIFT)
        yield PresentRun(
            vma.ino, part.start, part.length, address, PAGE_SHIFT, vma.area, writable=vma.writable
        )
        if wanted is None:
            return


def present_runs(pid: int, vmas: list[Vma], wanted: Wanted, *, copies: bool = False) -> Iterator[PresentRun]:
    """The wanted pages that are in the page tables. A private copy of a page (CoW) is the process's own and
    does not count; with ``copies`` each run says which wanted ones its mapping has.
    """
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for vma, part in _wanted_parts(vmas, wanted):
            low = vma.start + ((part.start - vma.pgoff) << PAGE_SHIFT)
            high = low + (part.length << PAGE_SHIFT)
            own = present_in(pagemap.fileno(), low, high, copies=True) if copies and vma.private else ()
            copied = tuple(_pages_of(vma, run) for run in own)
            for run in present_in(pagemap.fileno(), low, high):
                first, end = _pages_of(vma, run)
                yield PresentRun(
                    vma.ino, first, end - first, run.start, PAGE_SHIFT, vma.area, copied, vma.writable
                )
                if wanted is None:
                    return


def _wanted_parts(vmas: list[Vma], wanted: Wanted) -> Iterator[tuple[Vma, Range]]:
    """The wanted pages of the file that each mapping shows."""
    for vma in vmas:
        span = Range(vma.pgoff, vma.pgoff + ((vma.end - vma.start) >> PAGE_SHIFT))
        for pages in [span] if wanted is None else wanted.get(vma.ino, ()):
            if part := pages.clip(*span):
                yield vma, part


def _pages_of(vma: Vma, addresses: Range) -> Range:
    """The pages of the file that a mapping shows there."""
    return Range(*(vma.pgoff + ((address - vma.start) >> PAGE_SHIFT) for address in addresses))


def present_in(pagemap: int, start: int, end: int, *, copies: bool = False) -> Iterator[Range]:
    """The address ranges in ``[start, end)`` whose pages are present and the file's own.

    With ``copies`` those whose pages are private copies, swapped out or not.

    Costs what the page tables hold (PAGEMAP_SCAN, Linux 6.7); before that, time in proportion to the range.
    """
    try:
        yield from merged(_scan(pagemap, start, end, copies))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        yield from merged(_read_pagemap(pagemap, start, end, copies))


def pagemap_scan_works() -> bool:
    """Whether this kernel has PAGEMAP_SCAN. Raises OSError where there is no /proc/PID/pagemap."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        try:
            list(_scan(pagemap.fileno(), 0, PAGE_SIZE))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return False
    return True


def _scan(pagemap: int, start: int, end: int, copies: bool = False) -> Iterator[Range]:
    regions = array("B", bytes(_REGIONS * _PAGE_REGION.size))
    address, _ = regions.buffer_info()
    # inverted, all of, any of, returned
    categories = (0, _PAGE_IS_PRESENT | _PAGE_IS_FILE, 0, _PAGE_IS_FILE)
    if copies:
        categories = (_PAGE_IS_FILE, _PAGE_IS_FILE, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, _PAGE_IS_FILE)
    while start < end:
        argument = bytearray(
            _SCAN_ARG.pack(_SCAN_ARG.size, 0, start, end, 0, address, _REGIONS, 0, *categories)
        )
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument, True)
        filled = memoryview(regions)[: count * _PAGE_REGION.size]
        for first, last, _ in _PAGE_REGION.iter_unpack(filled):
            yield Range(first, last)
        walked = _SCAN_ARG.unpack(argument)[4]
        if walked <= start:
            return
        start = walked


def _read_pagemap(pagemap: int, start: int, end: int, copies: bool) -> Iterator[Range]:
    there = _PM_PRESENT | _PM_SWAP if copies else _PM_PRESENT
    for low in range(start, end, _PM_CHUNK * PAGE_SIZE):
        high = min(end, low + _PM_CHUNK * PAGE_SIZE)
        entries = array("Q", os.pread(pagemap, (high - low) >> PAGE_SHIFT << 3, low >> PAGE_SHIFT << 3))
        for index, entry in enumerate(entries):
            if entry & there and bool(entry & _PM_FILE) != copies:
                yield Range(low + index * PAGE_SIZE, low + (index + 1) * PAGE_SIZE)


def maps_still(task: Task, dev: tuple[int, int]) -> bool:
    """Whether the process still shows the same pages of the same files where ``task.present`` says."""
    try:
        vmas = list(read_vmas(task.pid, dev))
    except _GONE:
        return False
    return all(_is_shown(run, vmas) for run in task.present)


def _is_shown(run: PresentRun, vmas: Iterable[Vma]) -> bool:
    """Whether the first page of ``run`` is what its address shows."""
    return any(
        vma.ino == run.mapping
        and vma.start <= run.address < vma.end
        and vma.pgoff + ((run.address - vma.start) >> PAGE_SHIFT) == run.index
        for vma in vmas
    )


def read_threads(pid: int) -> Iterator[Thread]:
    """The threads of a process, in the kernel's order, with their task flags."""
    for name in os.listdir(f"/proc/{pid}/task"):
        try:
            # The name in field 2 may hold anything, parentheses too: the fields begin after the last one.
            fields = read_whole(f"/proc/{pid}/task/{name}/stat").rpartition(b") ")[2].split()
        except _GONE:
            continue
        yield Thread(int(name), int(fields[6]))


def read_comm(pid: int) -> str:
    """The process's name, as daxemu.text.name_text has it: the bytes can be had back."""
    return _as_name(read_whole(f"/proc/{pid}/comm"))


def comm_of(pid: int) -> str:
    """Return the process's name for an event; "?" if the process is gone or may not be read."""
    try:
        return read_comm(pid)
    except OSError:
        return "?"


def _as_name(comm: bytes) -> str:
    return name_text(comm.removesuffix(b"\n"))


def in_page_fault(tid: int) -> bool | None:
    """Whether a thread that a request came from is, or may be, in a page fault of its own: not in a system
    call, nor gone. None if that cannot be seen.
    """
    try:
        with open(f"/proc/{tid}/syscall", "rb") as file:
            # Also "running": it has asked, and is not asleep yet.
            return not file.read(1).isdigit()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return None


def process_of(tid: int) -> int:
    """The process a thread belongs to; the thread's own id if it is gone."""
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line.split()[1])
    except _GONE:
        pass
    return tid


def in_group_or_capable(tid: int, gid: int) -> bool:
    """Whether a thread is of the group, or has CAP_FSETID: it may leave S_ISGID set (fs/inode.c)."""
    if not (field := _status(tid)):
        return False
    groups = map(int, [field["Gid"].split()[3], *field["Groups"].split()])
    return gid in groups or _is_capable(field, CAP_FSETID)


def capable(tid: int, capability: int) -> bool:
    """Whether a thread has a capability; not if it is gone."""
    field = _status(tid)
    return bool(field) and _is_capable(field, capability)


def _is_capable(field: dict[str, str], capability: int) -> bool:
    return bool(int(field["CapEff"], 16) >> capability & 1)


def _status(tid: int) -> dict[str, str]:
    """/proc/TID/status; nothing if the thread is gone."""
    try:
        return read_fields(f"/proc/{tid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return {}
