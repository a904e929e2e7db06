"""fio with its mmap engine. fio itself verifies every block read."""

from __future__ import annotations

import time

from daxemu.apps.application import Application, Needs, Place, ReportedError, Spot
from daxemu.apps.process import Ended, Process, TimedOut
from daxemu.apps.records import ReadBack
from daxemu.apps.situations import Part
from daxemu.client import Client
from daxemu.protocol import WhoMaps

BLOCK = 4096
BLOCKS = 1024
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
        """See Application.warm: wait until fio has mapped the file."""
        deadline = time.monotonic() + process.limit
        with Client.at(place.root) as client:
            while not any(each.pid == process.pid for each in client.ask(WhoMaps()).mapped):
                if process.status is not None:
                    raise Ended(process.wait())
                if time.monotonic() > deadline:
                    raise TimedOut(f"the file is not mapped after {process.limit:g} s")
                time.sleep(0.02)  # no event announces a new mapping
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
