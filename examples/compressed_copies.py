"""A repair strategy in one file: a compressed copy of every block, beside the device.

daxemu mount /dev/shm/pmem0 /tmp/pmem --repair examples/compressed_copies.py:level=1
"""

import dbm
import zlib

from daxemu.ranges import Range
from daxemu.repair.strategy import Failure, Options, Strategy, Verdict
from daxemu.uapi import PAGE_SIZE


class CompressedOptions(Options, frozen=True):
    level: int = 6


class Compressed(Strategy):
    name = "compressed"
    Options = CompressedOptions
    watches = True

    def __init__(self, volume, options):
        super().__init__(volume, options)
        volume.directory.mkdir(parents=True, exist_ok=True)
        self.level = options.level
        self.copies = dbm.open(str(volume.directory / "copies"), "c")  # noqa: SIM115

    def mounted(self, *, after_crash):
        for piece in self.volume.walk(256):  # files are used in between
            self.store_done(self.volume.in_use(piece), None)
            yield piece

    def store_done(self, blocks, origin):
        for run in blocks:
            for block in range(*run):
                data, bad = self.volume.salvage(Range(block, block + 1))
                if not bad:
                    self.copies[str(block)] = zlib.compress(data, self.level)

    def freed(self, blocks):
        for block in range(*blocks):
            if str(block) in self.copies:
                del self.copies[str(block)]

    def failed(self, failure: Failure) -> Verdict:
        verdict = Verdict()
        for run in failure.blocks:
            for block in range(*run):
                if block in failure.stale or block in failure.unseen:
                    verdict.reason = "a program may have stored to it unseen"
                elif (copy := self.copies.get(str(block))) is None:
                    verdict.reason = "there is no copy"
                else:
                    self.volume.rewrite(block * PAGE_SIZE, zlib.decompress(copy))
                    verdict.recovered.add(block, block + 1)
        return verdict

    def unmounting(self):
        self.copies.close()
