"""Holder of layouts with the behaviour of host/fuse/answers.c; each layout is checked against the file."""

from __future__ import annotations

import time

from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import Inode
from daxemu.fs.layouts import Layout
from daxemu.uapi import PAGE_SIZE, Ino


class Holder:
    """Holds the layouts of ``fs``."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.runs: dict[Ino, list[Layout]] = {}
        self.attributes: dict[Ino, tuple[object, ...]] = {}
        fs.layouts.hold(self)

    # -- LayoutOps

    def grant(self, layout: Layout) -> None:
        known = self.runs.setdefault(layout.ino, [])
        known[:] = [run for run in known if run.end <= layout.start or layout.end <= run.start]
        known.append(layout)

    def grant_attributes(self, inode: Inode) -> None:
        self.attributes[inode.ino] = _attributes(inode)

    def break_attributes(self, ino: Ino) -> None:
        self.attributes.pop(ino, None)

    def break_layout(self, ino: Ino) -> None:
        self.runs.pop(ino, None)
        self.attributes.pop(ino, None)

    def break_all(self) -> None:
        self.runs.clear()
        self.attributes.clear()

    # -- use of the layouts

    def store(self, ino: Ino, offset: int, data: bytes) -> bool:
        """Store without a request, if a run allows the store; return False otherwise."""
        for run in self.runs.get(ino, []):
            end = offset + len(data)
            if run.may_write and run.start <= offset and end <= run.end:
                self.fs.dax.direct_access(run.device + offset - run.start, len(data))[:] = data
                self.attributes.pop(ino, None)
                self.fs.wrote(ino, time.time_ns())
                if end > run.size:
                    self.fs.grew(ino, end)
                    self.runs[ino] = [run._replace(size=end) for run in self.runs[ino]]
                return True
        return False

    def wrong(self) -> list[str]:
        """Return the layouts held that are not true."""
        return [
            *(f"{run}: {why}" for runs in self.runs.values() for run in runs for why in self._wrong(run)),
            *(
                f"attributes of {ino}"
                for ino, said in self.attributes.items()
                if said != _attributes(self.fs.names.get(ino))
            ),
        ]

    def _wrong(self, run: Layout) -> list[str]:
        inode, extents = self.fs.names.regular(run.ino)
        found = []
        if inode.size != run.size:
            found.append(f"the size is {inode.size}")
        if self.fs.dax.is_poisoned(run.device, run.end - run.start):
            found.append("poison")
        for part in extents.lookup(run.start // PAGE_SIZE, run.end // PAGE_SIZE):
            if part.link is None:
                found.append("a hole")
            elif part.dev_block * PAGE_SIZE - run.device != part.file_block * PAGE_SIZE - run.start:
                found.append("elsewhere")
            elif run.may_write and part.link.proxy is not None:
                found.append("shared")
        return found


def _attributes(inode: Inode) -> tuple[object, ...]:
    times = (inode.atime, inode.mtime, inode.ctime)
    return (inode.mode, inode.uid, inode.gid, inode.nlink, inode.size, inode.sectors, *times)
