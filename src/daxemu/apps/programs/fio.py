"""fio with its mmap engine. fio itself verifies every block read."""

from __future__ import annotations

import time
from pathlib import Path

from daxemu.apps.application import Application, Needs, Place, ReportedError, Spot
from daxemu.apps.process import Ended, Process, TimedOut
from daxemu.apps.records import ReadBack
from daxemu.apps.situations import Part

BLOCK = 4096
BLOCKS = 1024
_MAPPINGS = ("/records", "/media")
"""Ends of the paths in /proc/PID/smaps: the file, or the media of a direct mount."""
_JOB = ("--name=records", "--ioengine=mmap", "--thread", f"--bs={BLOCK}", "--verify=crc32c")


class Fio(Application):
    """fio: reads and verifies for two seconds."""

    name = "fio"
    note = "fio checks a CRC of each block."
    about = "fio --ioengine=mmap --verify=crc32c, 4 MiB read again and again for 2 s: loads from a mapping"
    needs = Needs(debian=("fio",), programs=("fio",))

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        size = f"--size={BLOCK * BLOCKS}"
        place.make(["fio", *_JOB, self._file(place), size, "--rw=write", "--do_verify=0"])

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        block = BLOCKS // 2
        # Behind the block's header, which holds the checksum.
        return Spot(place.root / "records", block * BLOCK + 1024, 16, f"block {block}")

    def start(self, place: Place) -> Process:
        """See Application.start."""
        size = f"--size={BLOCK * BLOCKS}"
        return place.start(
            ["fio", *_JOB, self._file(place), size, "--rw=read", "--time_based", "--runtime=2"]
        )

    def warm(self, place: Place, process: Process) -> ReadBack:
        """See Application.warm: wait until fio has mapped the file, and touched a page."""
        deadline = time.monotonic() + process.limit
        while not _has_touched(process.pid):
            if process.status is not None:
                raise Ended(process.wait())
            if time.monotonic() > deadline:
                raise TimedOut(f"no page of the file is present after {process.limit:g} s")
            time.sleep(0.02)  # no event announces a page
        return ReadBack(right=BLOCKS)

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read: wait for the end; the exit status says if all blocks were right."""
        status = process.wait()
        if status < 0:
            raise Ended(status)
        if status:
            verdict = [line for line in process.output if "verify failed" in line or "verify: bad" in line]
            raise ReportedError(verdict or [line for line in process.output if "err=" in line])
        return ReadBack(right=BLOCKS)

    @staticmethod
    def _file(place: Place) -> str:
        return f"--filename={place.root / 'records'}"


def _has_touched(pid: int) -> bool:
    """Return True if a page of the file is present in a process."""
    is_ours = False
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return False  # the process has ended
    for line in lines:
        key, *values = line.split()
        if not key.endswith(":"):
            is_ours = line.endswith(_MAPPINGS)
        elif is_ours and key == "Rss:" and values[0] != "0":
            return True
    return False
