"""The seam for mappings: the only interface between the filesystem and the mappings of real processes.

The filesystem decides which bytes a file has, and which of them are poison. An implementation of ``Mappings``
makes the mappings of processes show that: host/page_cache (pages of the kernel's page cache, filled by
FUSE_READ and FUSE_WRITE), or direct mappings of the media. One mount has one implementation, chosen by
supervisor/run. No caller asks which one.

Ranges of files are bytes, of whole pages. Each method names the thread that it runs in: *worker* may wait on
the kernel, so a worker thread; *loop* is the trio thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

from daxemu.errors import DaxemuError
from daxemu.host.observer import Observer
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.present import Mapped
from daxemu.mm.incident import Incident
from daxemu.mm.to_kill import Task
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino


class Access(NamedTuple):
    """Access of a thread to bytes of a file that failed: a FUSE_READ, or a page fault in a direct mapping.

    ``error``: MediaError, or the error of a removed or shut-down filesystem. ``tid``: the waiting thread, 0
    if unknown. ``address``: the byte that the thread touched; None if only the page is known. ``is_store``:
    True for a page fault of a store. ``vma``: addresses of the shared mapping, if known. ``has_left``: return
    whether the thread has left this page fault: another event of the thread has come.
    """

    ino: Ino
    offset: int
    length: int
    tid: int
    error: DaxemuError
    address: int | None = None
    is_store: bool = False
    vma: Range | None = None
    has_left: Callable[[], bool] = lambda: False

    @property
    def is_read_ahead(self) -> bool:
        """True for several pages: no page fault needs more than one."""
        return self.length > PAGE_SIZE


Answer = Enum("Answer", ["ERROR", "AGAIN", "ZEROS", "SIGNALLED", "WAKE"])
"""Treatment of a failed access: let the access fail, repeat the access, answer zeros, do nothing, because the
thread leaves its page fault for a signal, or wake the thread, which touches the page again.
"""


class HardwareError(Protocol):
    """Execute madvise(MADV_HWPOISON) or, with ``soft``, madvise(MADV_SOFT_OFFLINE) of a thread on bytes of a
    file, which the thread has mapped at ``address``. ``simulated``: without poison.
    """

    async def __call__(
        self,
        tid: int,
        address: int,
        ino: Ino,
        offset: int,
        length: int,
        *,
        soft: bool,
        simulated: bool,
    ) -> int:
        """Return 0 or an errno. Loop."""


class RevokeLatent(Protocol):
    """See ``Upcalls.revoke_latent``."""

    async def __call__(self, incident: Incident, *, has_mutex: bool = False) -> None: ...


@dataclass(frozen=True)
class Upcalls:
    """Calls from an implementation to the supervisor. All run in the trio thread."""

    on_access: Callable[[Access], Awaitable[Answer]]
    """Decide about a failed access: ask the repair strategy, start the failure of latent poison, prepare an
    exact signal for the thread. The thread must wait until the answer.
    """
    revoke_latent: RevokeLatent
    """Collect and revoke the pages of an incident without a failure, and remember which processes had the
    pages present. ``has_mutex``: True if the caller holds ``mf_mutex``.
    """
    remember: Callable[[Incident], Awaitable[None]]
    """Remember which processes have the pages of an incident present. Preconditions: the caller holds
    ``mf_mutex``, and revokes the pages next.
    """


class Translations(Protocol):
    """Reverse map and page tables of all processes, for the files of one mount."""

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        """``collect_procs()``: return, for each incident, the processes with one of its pages, or a page of a
        PMD around one, present, with the addresses. Worker.

        A page of two incidents counts for the first only: the kernel would have unmapped the page before the
        second collection. Precondition: a removal, and an incident with PMDs, is the only incident.
        """

    def still_mapped(self, task: Task) -> bool:
        """Return whether a process still maps the pages of ``task.present`` at the same addresses. Worker."""

    def file_page(self, ino: Ino, index: int) -> FilePage:
        """Return the page that /proc/PID/maps shows where a process maps page ``index`` of a file. Any
        thread.
        """

    def revoke(self, incident: Incident) -> None:
        """``unmap_mapping_range()`` for every file range of the incident: the next access faults. Worker."""

    @property
    def survive_shutdown(self) -> bool:
        """True if pages stay mapped after a shutdown, as on DAX; False if revoke_all() must take the pages
        away, because the pages are copies of the media.
        """

    def revoke_all(self) -> None:
        """Revoke all pages of all files: after a shutdown or a removal every access fails. Worker."""


class Mappings(Translations, Protocol):
    """Mappings of the files of one mount in all processes."""

    def mapped_files(self) -> list[Mapped]:
        """Return every mapping of a file of the mount, in all processes that this process may look into.
        Worker.
        """

    # -- data and attributes that only the kernel or a mapping has

    async def write_back(self, ino: Ino, *, has_mutex: bool = False) -> None:
        """Return once the stores of all processes through mappings of a file are on the media. Loop.

        The pages stay mapped where possible; ``Upcalls.revoke_latent`` gets the others. Takes no lock of the
        inode: the kernel holds the inode's lock during some requests. ``has_mutex``: True if the caller holds
        ``mf_mutex``.
        """

    async def synced(self, ino: Ino | None = None) -> None:
        """Show stores through mappings of a file, or of all files (None), to the filesystem. Loop.

        Called at fsync(2): the kernel has written the pages of its cache back before.
        """

    def write_back_all(self) -> None:
        """As ``write_back``, for all files, before the mount ends. Worker. Raises OSError."""

    def forget_attributes(self, ino: Ino) -> None:
        """Have the kernel ask for size and times of a file at the next use. Loop; does not block."""

    async def refresh_attributes(self, ino: Ino) -> None:
        """Have the kernel ask for size and times of a file, and wait for the end of that request. Loop."""

    # -- requests that bring data into mappings or take data from mappings

    @property
    def direct_io(self) -> bool:
        """True if each open of a file is FOPEN_DIRECT_IO: no page of a file is in the page cache."""

    async def before_read(self, ino: Ino, offset: int, length: int) -> None:
        """Wait until a FUSE_READ of these bytes may be answered. Loop."""

    async def before_write(self, ino: Ino, offset: int, length: int, *, from_cache: bool) -> None:
        """Wait until a FUSE_WRITE of these bytes may be done. ``from_cache``: the kernel writes stores
        through mappings back. Loop.
        """

    async def serves_populate(
        self, access: Access, *, is_latent: bool, discover: Callable[[], object]
    ) -> bool:
        """Return True if zeros must be answered to a failed access, so that a system call that populates a
        mapping returns. The implementation revokes the zeros. Loop.

        Precondition: no page of the access is readable, or the access is to one page. ``discover`` is called
        for latent poison that the kernel itself reads.
        """

    # -- changes of a file's blocks

    def is_settled(self, ino: Ino | None = None) -> bool:
        """Return whether each mapping of a file, or of all files (None), shows the file's present blocks.
        Loop.

        An implementation that maps blocks follows the filesystem's changes of extent maps itself, and holds
        freed blocks back until no process can store to them.
        """

    async def settled(self, ino: Ino) -> None:
        """Wait until ``is_settled(ino)``. Loop. A request that changed the file awaits this."""

    def sharing(
        self, source: Ino, taken: Range, target: Ino, replaced: Range
    ) -> AbstractAsyncContextManager[None]:
        """Hold the bytes ``taken`` and ``replaced`` of two files still while blocks become shared. Loop.

        From the entry to the first await within the context: each earlier store to ``taken`` is on the media,
        no later store gets there, and no page of ``replaced`` is mapped. Before that await the caller claims
        the I/O lock, which holds FUSE requests until all blocks are shared; an implementation that serves
        page faults holds these itself, to the end of the context. Precondition: the caller holds
        ``mf_mutex``. After the context both files are settled. Raises FsError EAGAIN after a time limit.
        """

    # -- observation

    async def observe(self, observer: Observer | None) -> None:
        """Tell ``observer`` about the page faults that are no request, from now on; None: nobody. Of a file
        that the observer wants, the next load and the next store of each page are page faults. Called again
        when the observer wants other files. Loop.
        """

    # -- system calls

    def system_calls(self, hardware_error: HardwareError) -> Callable[..., Awaitable[Any]] | None:
        """Return what decides the system calls of programs under ``daxemu run`` (host.run.attached.Handle);
        None if mappings are the kernel's own. Called once. ``hardware_error`` executes madvise(2) with
        MADV_HWPOISON.
        """

    # -- life

    def connect(self, upcalls: Upcalls) -> None:
        """Set the supervisor's end. Called once, before the first request."""

    async def start(self) -> None:
        """Prepare the mount for its users. Loop; the mount answers requests meanwhile."""

    async def stop(self) -> None:
        """Release what ``start`` and later calls acquired. Loop; the mount answers no more requests."""

    def describe_held(self) -> Iterator[str]:
        """Yield a text for each access that waits here, for ``status --internals``. Loop."""
