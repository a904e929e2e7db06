"""Holder of direct mappings that checks the reports of the filesystem (fs.fault.MappingOps)."""

from __future__ import annotations

from collections.abc import Iterator

from daxemu.fs.fault import FaultKind, FileRun
from daxemu.fs.filesystem import Filesystem
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino

BEYOND = 2
"""Blocks looked at beyond the end of a file."""

Shown = tuple[FaultKind, int, bool]
"""What a mapping shows at a block: kind, device block, and whether the block is shared."""


class Followed:
    """Records the blocks reported by ``fs``, by inode."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self.seen: dict[Ino, set[int]] = {}
        self._before: dict[Ino, dict[int, Shown]] = {}
        fs.follow(self)

    def changed(self, ino: Ino, blocks: Range) -> None:
        """See MappingOps."""
        self.seen.setdefault(ino, set()).update(range(blocks.start, min(blocks.end, 1 << 20)))

    def stored_to(self) -> Iterator[tuple[Ino, Range]]:
        """See MappingOps."""
        return iter(())

    def since(self, ino: Ino) -> set[int]:
        """Return the blocks of a file reported since the last call, and forget all reports."""
        found = self.seen.get(ino, set())
        self.seen.clear()
        return found

    def unreported(self, files: list[Ino]) -> list[str]:
        """Return the blocks of ``files`` that a mapping must show in another way than at the last call, and
        that were not reported. Forget all reports.
        """
        wrong = []
        now = {ino: self._shown(ino) for ino in files}
        for ino, before in self._before.items():
            for block, old in before.items() if ino in now else ():
                new = now[ino].get(block, (FaultKind.BEYOND_EOF, 0, False))
                gained = new[:2] == old[:2] and old[2] and not new[2]
                if new != old and not gained and block not in self.seen.get(ino, ()):
                    wrong.append(f"block {block} of inode {ino}: {old} is {new}")
        self._before = now
        self.seen.clear()
        return wrong

    def _shown(self, ino: Ino) -> dict[int, Shown]:
        inode, extents = self._fs.names.regular(ino)
        blocks = Range(0, -(-inode.size // PAGE_SIZE) + BEYOND)
        runs = list(self._fs._faults.runs(inode, extents, blocks))
        assert [run.file_block for run in runs] == [0, *(run.file_end for run in runs[:-1])]
        assert runs[-1].file_end == blocks.end
        return {run.file_block + i: _at(run, i) for run in runs for i in range(run.length)}


def _at(run: FileRun, index: int) -> Shown:
    return run.kind, run.dev_block + index if run.kind is FaultKind.MAPPED else 0, run.is_shared
