"""The simplest possible memory filesystem in pyfuse3, to compare with: ``python -m tests.bench.memory_fs
MOUNTPOINT``. No durability, no reflinks, no poison; one bytearray a file.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
from collections.abc import Sequence

import pyfuse3
import trio

LONG = 1e6


class Node:
    """A file or a directory."""

    def __init__(self, ino: int, mode: int) -> None:
        self.ino = ino
        self.mode = mode
        self.data = bytearray()
        self.names: dict[bytes, int] = {}
        self.nlink = 1


class MemoryFs(pyfuse3.Operations):
    """Files in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self._nodes = {1: Node(1, stat.S_IFDIR | 0o755)}
        self._inos = itertools.count(2)

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(node.ino)
        entry.st_mode = pyfuse3.ModeT(node.mode)
        entry.st_nlink = node.nlink
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = len(node.data)
        entry.st_blocks = -(-len(node.data) // 512)
        entry.entry_timeout = entry.attr_timeout = LONG
        return entry

    def _make(self, parent: int, name: bytes, mode: int) -> Node:
        node = Node(next(self._inos), mode)
        self._nodes[node.ino] = node
        self._nodes[parent].names[name] = node.ino
        return node

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        ino = self._nodes[parent_inode].names.get(name)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(self._nodes[ino])

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._nodes[inode])

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._nodes[inode]
        if fields.update_size:
            del node.data[attr.st_size :]
            node.data.extend(bytes(attr.st_size - len(node.data)))
        if fields.update_mode:
            node.mode = attr.st_mode
        return self._attributes(node)

    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode)))

    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        self._nodes[self._nodes[parent_inode].names.pop(name)].nlink -= 1

    rmdir = unlink

    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self._nodes[new_parent_inode].names[new_name] = inode
        self._nodes[inode].nlink += 1
        return self._attributes(self._nodes[inode])

    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._nodes[parent_inode_new].names[name_new] = self._nodes[parent_inode_old].names.pop(name_old)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for ino, _ in inode_list:
            if self._nodes[ino].nlink == 0:
                del self._nodes[ino]

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for position, (name, ino) in enumerate(list(self._nodes[fh].names.items())[start_id:], start_id + 1):
            attributes = self._attributes(self._nodes[ino])
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), attributes, position):
                return

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self._nodes[inode].data.clear()
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        node = self._make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode))
        info = pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(node.ino), keep_cache=True)
        return info, self._attributes(node)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return bytes(self._nodes[fh].data[off : off + size])

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        data = self._nodes[fh].data
        data.extend(bytes(max(0, off - len(data))))
        data[off : off + len(buf)] = buf
        return len(buf)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        pass

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        pass

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        pass


if __name__ == "__main__":
    pyfuse3.init(MemoryFs(), sys.argv[1], {*pyfuse3.default_options, "allow_other"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)
