#!/usr/bin/env python3
"""Device memory without struct pages: a driver registers pfns, pfns fail, and every process with a mapping is
signalled.

    examples/device_memory_without_struct_pages.py

The case of nvgrace-gpu in Linux 6.19: programs map the memory of an accelerator, but the kernel has no struct
pages for the memory. Here the memory is a file in shared memory, the driver is the class below, and the
program with the mapping is a child of this process: plain Python, without knowledge of daxemu.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from daxemu.errors import NoDevice
from daxemu.events import Event
from daxemu.host.pfn_mappings import collect
from daxemu.host.tracer.link import TracerLink
from daxemu.mm.memory_failure import FileId, MemoryFailures, PfnMapping
from daxemu.mm.pfn_space import PfnAddressSpace
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE

BASE_PFN = 0x8000000
PAGES = 256
BAD = Range(BASE_PFN + 16, BASE_PFN + 18)

PROGRAM = """
import mmap, signal, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
memory[16 * 4096] = 1
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
print("ready", flush=True)
info = signal.sigwaitinfo({signal.SIGBUS})
print("the program got signal", info.si_signo, "code", info.si_code, flush=True)
"""


class Accelerator:
    """Driver; the memory is the file ``path``, page for page from BASE_PFN on."""

    def __init__(self, path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(PAGES * PAGE_SIZE)
        found = path.stat()
        self.file = FileId((os.major(found.st_dev), os.minor(found.st_dev)), found.st_ino)
        self.retired = RangeSet()

    def failure(self, space: PfnAddressSpace, pfn: int, nr_pages: int) -> None:
        """Stop handing these pages out."""
        self.retired.add(pfn, pfn + nr_pages)

    def pfn_to_pgoff(self, space: PfnAddressSpace, pfn: int, nr_pages: int) -> Sequence[PfnMapping]:
        """Return the page offset of a pfn in the file."""
        return [PfnMapping(self.file, pfn - space.pages.start, nr_pages, pfn)]


def log(event: Event) -> None:
    print(event.dmesg() or event.summary())


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        memory = Path(scratch, "accelerator")
        driver = Accelerator(memory)
        mm = MemoryFailures(log)
        mm.pfn_spaces.register(PfnAddressSpace("accelerator", Range(BASE_PFN, BASE_PFN + PAGES), driver))
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(memory)], stdout=subprocess.PIPE, text=True
        ) as program:
            assert program.stdout is not None
            print("the program is", program.stdout.readline().strip())
            trio.run(fail, mm)
            print(program.stdout.read().strip())
        print(f"retired: {driver.retired.total} pages")
        try:
            mm.memory_failure(BASE_PFN + PAGES, 1, 0)
        except NoDevice as error:
            print(f"refused: {error}")


async def fail(mm: MemoryFailures) -> None:
    """Call memory_failure(), and carry out the actions returned."""
    incident = mm.memory_failure(BAD.start, BAD.length, 0)
    async with TracerLink.open() as tracer:
        to_kill = await trio.to_thread.run_sync(
            lambda: collect(incident.pfn_mappings, early_kill=mm.sysctl_early_kill)
        )
        for victim in to_kill:
            pending = await tracer.send_ao(victim.task.pid, victim.tid, victim.address, victim.shift)
            print(f"pfn {victim.pfn:#x}: {await pending.wait(5)}")
    mm.action_result(incident, len(to_kill))


if __name__ == "__main__":
    main()
