"""madvise(2) with MADV_HWPOISON or MADV_SOFT_OFFLINE, for programs under ``daxemu run``: mm/madvise.c.

The thread waits in the system call meanwhile. ``host/run/runner`` has found the pages of the thread and
faulted the pages in. In the kernel such an injection is always simulated (MF_SW_SIMULATED): the bytes stay
readable. In daxemu the media is poisoned, unless the request is for a simulated failure.
"""

from __future__ import annotations

import errno

from daxemu import protocol as p
from daxemu.errors import DaxemuError
from daxemu.events import Emit, MadviseInjected, PoisonInjected
from daxemu.fs.filesystem import Filesystem
from daxemu.host.mappings import Mappings
from daxemu.host.proc.processes import process_of
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.inject import inject
from daxemu.pmem.pmem import Pmem
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.signals import Signals
from daxemu.supervisor.verbs.device_ranges import check_present, device_page
from daxemu.uapi import MF_ACTION_REQUIRED, MF_SW_SIMULATED, PAGE_SIZE, Ino


class MadviseInjection:
    """Injects for threads that wait in madvise(2). Belongs to the trio thread."""

    def __init__(
        self,
        pmem: Pmem,
        mm: MemoryFailures,
        fs: Filesystem,
        mappings: Mappings,
        failures: Failures,
        signals: Signals,
        emit: Emit,
    ) -> None:
        self._pmem = pmem
        self._mm = mm
        self._fs = fs
        self._mappings = mappings
        self._failures = failures
        self._signals = signals
        self._emit = emit

    async def madvise_inject_error(self, request: p.Madvise) -> p.Advised:
        """Handle a memory failure for each page, up to the first page with an error. Return the errno or 0.

        As ``madvise_inject_error()`` in the kernel, each page is a separate failure, logged and counted. The
        calling thread gets one signal, for the first page. Raises NoDevice after a removal, InvalidArgument
        if ``ino`` is not a regular file.
        """
        check_present(self._pmem)
        if self._pmem.pgmap is None:
            return p.Advised(errno.EFAULT)  # get_user_pages() gets no page of a VM_PFNMAP mapping
        pid = process_of(request.tid)
        self._signals.new_call(request.tid)
        for done in range(0, request.length, PAGE_SIZE):
            error = await self._one_page(request, pid, done)
            if error:
                return p.Advised(error)
        return p.Advised(0)

    async def of_call(
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
        """See host.mappings.HardwareError."""
        where = {"tid": tid, "address": address, "ino": ino, "offset": offset, "length": length}
        try:
            request = p.Madvise(**where, soft=soft, simulated=simulated)
            return (await self.madvise_inject_error(request)).errno
        except DaxemuError as error:
            return error.errno

    async def _one_page(self, request: p.Madvise, pid: int, done: int) -> int:
        at = await device_page(self._fs, self._mappings, request.ino, request.offset + done)
        if at is None:
            return errno.EBUSY  # a hole is mapped by the zero page, which memory_failure() does not touch
        pfn, address = self._pmem.pfn_of(at), request.address + done
        self._emit(MadviseInjected(pid=pid, tid=request.tid, address=address, pfn=pfn, soft=request.soft))
        if request.soft:
            return errno.EIO  # soft_offline_page(): a ZONE_DEVICE page is no online page
        flags = MF_ACTION_REQUIRED
        if request.simulated:
            flags |= MF_SW_SIMULATED
        else:
            poisoned = inject(self._pmem, at, PAGE_SIZE)
            self._emit(PoisonInjected(offset=poisoned.start, length=poisoned.length))
        incident = self._mm.memory_failure(pfn, 1, flags)
        error = (await self._failures.handle(incident, request.tid)).error
        return error.errno if error is not None else 0
