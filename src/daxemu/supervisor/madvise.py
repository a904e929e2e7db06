"""madvise(2) with MADV_HWPOISON or MADV_SOFT_OFFLINE, asked for by ``daxemu run``: mm/madvise.c.

The thread waits in the system call meanwhile. ``host/run/runner`` found its pages and faulted them in. The
kernel's injection is always simulated (MF_SW_SIMULATED): the bytes stay readable. Here the media goes bad,
unless that is asked for.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from daxemu import protocol as p
from daxemu.events import MadviseInjected, PoisonInjected
from daxemu.host.proc.processes import process_of
from daxemu.pmem.inject import inject
from daxemu.uapi import MF_ACTION_REQUIRED, MF_SW_SIMULATED, PAGE_SIZE

if TYPE_CHECKING:
    from daxemu.supervisor.machine import Machine


async def madvise_inject_error(machine: Machine, request: p.Madvise) -> p.Advised:
    """``madvise_inject_error()``: a memory failure for each page, up to the first that returns an error.

    Page by page, as there: each is logged and counted, and the first is what the caller's one signal is of.
    Raises NoDevice after a removal, InvalidArgument if ``ino`` is no regular file.
    """
    machine.check_present()
    if machine.pmem.pgmap is None:
        return p.Advised(errno.EFAULT)  # get_user_pages() gets no page of a VM_PFNMAP mapping
    pid = process_of(request.tid)
    machine.failures.new_call(request.tid)
    for done in range(0, request.length, PAGE_SIZE):
        error = await _one_page(machine, request, pid, done)
        if error:
            return p.Advised(error)
    return p.Advised(0)


async def _one_page(machine: Machine, request: p.Madvise, pid: int, done: int) -> int:
    at = await machine.device_page(request.ino, request.offset + done)
    if at is None:
        return errno.EBUSY  # a hole is mapped by the zero page, which memory_failure() does not touch
    pfn, address = machine.pmem.pfn_of(at), request.address + done
    machine.log.emit(MadviseInjected(pid=pid, tid=request.tid, address=address, pfn=pfn, soft=request.soft))
    if request.soft:
        return errno.EIO  # soft_offline_page(): no online page, for it is ZONE_DEVICE's
    flags = MF_ACTION_REQUIRED
    if request.simulated:
        flags |= MF_SW_SIMULATED
    else:
        bad = inject(machine.pmem, at, PAGE_SIZE)
        machine.log.emit(PoisonInjected(offset=bad.start, length=bad.length))
    incident = machine.mm.memory_failure(pfn, 1, flags)
    await machine.failures.handle(incident, request.tid)
    return incident.error.errno if incident.error is not None else 0
