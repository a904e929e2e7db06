"""pyfuse3.Operations over the filesystem's verbs: translates, decides nothing.

File handles are inode numbers (below 2**38; host/fuse/supplement.py explains the bits above). Directories are
listed in the order of fs/listing.py: a reader sees each lasting entry once, whatever other entries do.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from daxemu.errors import DaxemuError, MediaError
from daxemu.fs import inode_flags, posix_acl
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import Credentials, Inode
from daxemu.fs.listing import DOT, DOT_DOT
from daxemu.fs.privs import is_sxid
from daxemu.fs.xattr import TRUSTED
from daxemu.host.fuse import supplement
from daxemu.host.fuse.gates import Gates
from daxemu.host.fuse.handlers import contained, in_pieces, translated
from daxemu.host.fuse.layouts import FOREVER
from daxemu.host.fuse.observed import DESCRIBED, observed
from daxemu.host.fuse.open_files import OpenFiles
from daxemu.host.fuse.pyfuse3_internals import HANDLERS
from daxemu.host.fuse.setattr import is_chown, may_setattr
from daxemu.host.fuse.supplement import Caller, kill_suidgid, pack, unpack
from daxemu.host.mappings import Access, Answer, Mappings
from daxemu.host.observer import Observer
from daxemu.host.proc.processes import capable, in_group_or_capable
from daxemu.host.unexpected import Unexpected
from daxemu.uapi import CAP_FSETID, CAP_SYS_ADMIN, PAGE_SIZE, XATTR_NAME_CAPS, Ino

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)


LISTING_STEP = 2000
"""Names ordered in one step (5 ms); other requests are served between two steps."""
TMPFILE = b"/"
"""Name in a request for a file without a name (host/fuse/killpriv.c, ``slash_name`` in fs/dcache.c)."""


class Operations(pyfuse3.Operations):
    """Answers the kernel's requests. ``on_access`` is awaited before a read is answered EIO.
    ``on_poisoned_write`` is awaited before a write to poison is answered EIO, and returns whether to try the
    write again.
    """

    supports_dot_lookup = True
    enable_acl = True

    def __init__(
        self,
        fs: Filesystem,
        on_access: Callable[[Access], Awaitable[Answer]],
        on_poisoned_write: Callable[[MediaError], Awaitable[bool]],
        mappings: Mappings,
        open_files: OpenFiles,
        gates: Gates,
    ) -> None:
        super().__init__()
        self._fs = fs
        self._names = fs.names
        self._on_access = on_access
        self._on_poisoned_write = on_poisoned_write
        self._mappings = mappings
        self._open_files = open_files
        self._gates = gates
        self._directories: dict[int, Ino] = {}
        self._directory_handles = itertools.count(1)
        self._served: dict[str, Callable[..., Any]] = {}

    def contain(self, unexpected: Unexpected) -> None:
        """Wrap all handlers: an unexpected exception is reported, and its request gets EIO."""
        for name in HANDLERS & vars(type(self)).keys():
            setattr(self, name, contained(name, getattr(self, name), unexpected))
        self._served = {name: getattr(self, name) for name in DESCRIBED}

    def observe(self, observer: Observer | None) -> None:
        """Tell ``observer`` about each operation from now on; None: nobody. Precondition: contain() was
        called.
        """
        for name, served in self._served.items():
            setattr(self, name, served if observer is None else observed(served, DESCRIBED[name], observer))

    # -- attributes

    def _attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode.ino)
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = FOREVER
        entry.st_mode = pyfuse3.ModeT(inode.mode)
        entry.st_nlink = inode.nlink
        entry.st_uid, entry.st_gid, entry.st_rdev = inode.uid, inode.gid, inode.rdev
        entry.st_size = inode.size
        entry.st_blksize = PAGE_SIZE
        entry.st_blocks = inode.sectors
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = inode.atime, inode.mtime, inode.ctime
        return entry

    def _entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """Return attributes for an answer that counts as a lookup: pins the inode until forget()."""
        self._fs.pin(inode)
        return self._attributes(inode)

    def _new_entry(self, parent: Ino, inode: Inode) -> pyfuse3.EntryAttributes:
        """Return :meth:`_entry` of an inode just made in directory ``parent``."""
        self._will_ask(parent)
        return self._entry(inode)

    def _will_ask(self, ino: Ino) -> None:
        """Have C answer the next GETATTR, or GETXATTR of the capabilities, of an inode.

        The kernel drops the attributes of a changed directory, and asks for the attributes before the next
        change. Before a write(2), the kernel asks for the capabilities of the file.
        """
        self._fs.layouts.grant_attributes(self._names.get(ino))

    @translated
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._fs.check_alive()
        try:
            return self._entry(self._names.lookup(parent_inode, name))
        except DaxemuError as error:
            if error.errno != errno.ENOENT:
                raise
            # A negative entry: the kernel need not ask again until the name is made.
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = pyfuse3.InodeT(0)
            missing.entry_timeout = FOREVER
            return missing

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for ino, count in inode_list:
            self.forgot(ino, count)

    def forgot(self, ino: Ino, count: int) -> None:
        """See ``layouts.Deeds``."""
        self._fs.unpin(ino, count)

    def wrote(self, ino: Ino, time_ns: int) -> None:
        """See ``layouts.Deeds``."""
        self._fs.wrote(ino, time_ns)

    def grew(self, ino: Ino, size: int) -> None:
        """See ``layouts.Deeds``."""
        self._fs.grew(ino, size)

    @translated
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        found = self._names.get(inode)
        self._fs.layouts.grant_attributes(found)
        return self._attributes(found)

    @translated
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        removes_privs = (fields.update_size and kill_suidgid()) or (
            not fields.update_mode and is_chown(fields)
        )
        may_setattr(self._names.get(inode), fields)
        if fields.update_mtime and self._open_files.mappable[inode]:
            # Linux takes the time of a mapped store at its fault. Here the store gets its time when the page
            # is written back, so pages that are dirty now are written back before the time is set.
            await self._mappings.write_back(inode)
        found = self._names.get(inode)
        if removes_privs:
            self._names.file_remove_privs(found, functools.partial(in_group_or_capable, ctx.pid))
        if fields.update_size:
            async with self._gates.io_lock.claim(inode):
                await in_pieces(self._fs.set_size_in_pieces(inode, attr.st_size))
            await self._mappings.settled(inode)
        node = self._fs.setattr(
            inode,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._attributes(node)

    def _file_remove_privs(self, ino: Ino, tid: int) -> None:
        """Call ``Namespace.file_remove_privs``; invalidate the mode in the kernel's cache after a change."""
        if self._names.file_remove_privs(self._names.get(ino), functools.partial(in_group_or_capable, tid)):
            self._mappings.forget_attributes(ino)

    def file_modified(self, ino: Ino, tid: int) -> None:
        """``file_modified()``, for requests without a flag of the kernel for the removal of set-id bits."""
        if is_sxid(self._names.get(ino).mode) and not capable(tid, CAP_FSETID):
            self._file_remove_privs(ino, tid)

    @translated
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        # Blocks of unlinked files count as free (xfs_fs_statfs() pushes xfs_inodegc, too).
        while self._fs.inactivate():
            await trio.lowlevel.checkpoint()
        usage = self._fs.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = PAGE_SIZE
        data.f_blocks, data.f_bfree, data.f_bavail = usage.blocks, usage.free, usage.available
        data.f_files = usage.files + usage.available
        data.f_ffree = data.f_favail = usage.available
        data.f_namemax = usage.name_max
        return data

    # -- names

    @staticmethod
    def _cred(ctx: pyfuse3.RequestContext) -> Credentials:
        return Credentials(ctx.uid, ctx.gid, ctx.umask)

    @translated
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        self._fs.check_alive()
        target = self._names.get(inode).target
        if target is None:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return pyfuse3.FileNameT(target)

    @translated
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        made = self._fs.mknod(parent_inode, name, mode, rdev, self._cred(ctx))
        return self._new_entry(parent_inode, made)

    @translated
    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._new_entry(parent_inode, self._fs.mkdir(parent_inode, name, mode, self._cred(ctx)))

    @translated
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._new_entry(parent_inode, self._fs.symlink(parent_inode, name, target, self._cred(ctx)))

    @translated
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._fs.link(inode, new_parent_inode, new_name))

    @translated
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        self._fs.unlink(parent_inode, name)
        self._will_ask(parent_inode)

    @translated
    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        self._fs.rmdir(parent_inode, name)
        self._will_ask(parent_inode)

    @translated
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        cred = self._cred(ctx)
        self._fs.rename((parent_inode_old, name_old), (parent_inode_new, name_new), flags, cred)

    # -- directories

    @translated
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        self._fs.check_alive()
        self._names.directory(inode)
        handle = next(self._directory_handles)
        self._directories[handle] = inode
        return pyfuse3.FileHandleT(handle)

    @translated
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._directories[fh]
        node, entries = self._names.directory(directory)
        while not self._names.listing(directory).build(LISTING_STEP, entries.__contains__):
            await trio.lowlevel.checkpoint()
        self._fs.check_alive()
        dots = ((DOT, b".", node.ino), (DOT_DOT, b"..", node.parent))
        listed = self._names.listing(directory).after(max(start_id, DOT_DOT))
        rest = ((cookie, name, entries[name]) for cookie, name in listed)
        for cookie, name, ino in itertools.chain((dot for dot in dots if dot[0] > start_id), rest):
            inode = self._names.get(ino)
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self._attributes(inode), cookie):
                return
            if cookie > DOT_DOT:
                self._fs.pin(inode)

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        del self._directories[fh]

    @translated
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        self._fs.fsync()

    # -- files

    def _opened(self, inode: Inode, flags: int) -> pyfuse3.FileInfo:
        self._fs.open(inode)
        fh = pack(inode.ino, flags)
        self._open_files.opened(fh)
        direct_io = self._mappings.direct_io
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), direct_io=direct_io, keep_cache=not direct_io)

    @translated
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        self._fs.check_alive()
        inode_flags.may_open(self._names.get(inode), flags)
        if flags & os.O_TRUNC:
            if kill_suidgid():
                self._file_remove_privs(inode, ctx.pid)
            # libfuse asks the kernel to leave the truncation to the filesystem (ATOMIC_O_TRUNC).
            async with self._gates.io_lock.claim(inode):
                await in_pieces(self._fs.set_size_in_pieces(inode, 0))
            await self._mappings.settled(inode)
        return self._opened(self._names.get(inode), flags)

    @translated
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        mode = pyfuse3.ModeT(stat.S_IFREG | stat.S_IMODE(mode))
        if name == TMPFILE:
            inode = self._fs.tmpfile(parent_inode, mode, self._cred(ctx))
        else:
            inode = self._fs.mknod(parent_inode, name, mode, 0, self._cred(ctx))
        entry = self._new_entry(parent_inode, inode)
        self._will_ask(inode.ino)
        return self._opened(inode, flags), entry

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self.released(fh)

    def released(self, fh: int) -> None:
        """See ``layouts.Deeds``."""
        self._open_files.released(fh)
        self._fs.release(unpack(fh).ino)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        caller = unpack(fh)
        if self._gates.freeze is not None:
            await self._gates.freeze.wait(caller.tid)
        await self._mappings.before_read(caller.ino, off, size)
        await self._gates.io_lock.before_read(caller.ino)
        try:
            # pyfuse3 takes any buffer: a view of the media goes to the kernel without a copy in Python.
            return self._fs.read(caller.ino, off, size)  # type: ignore[return-value]
        except DaxemuError as error:
            answer = Answer.ERROR
            if error.errno == errno.EIO:
                answer = await self._on_access(Access(caller.ino, off, size, caller.tid, error))
            if answer is Answer.ZEROS:
                return bytes(size)
            if answer is Answer.ERROR:
                raise pyfuse3.FUSEError(error.errno) from None
            await self._gates.io_lock.before_read(caller.ino)
        try:
            return self._fs.read(caller.ino, off, size)  # type: ignore[return-value]
        except DaxemuError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        caller = unpack(fh)
        if kill_suidgid():
            self._file_remove_privs(caller.ino, caller.tid)
        return await self._write(caller, off, buf)

    async def _write(self, caller: Caller, off: int, buf: bytes) -> int:
        if self._gates.freeze is not None and not caller.from_cache and supplement.MISSING is None:
            await self._gates.freeze.wait(caller.tid)
        unknown = supplement.MISSING is not None  # then any write may be a write-back
        await self._mappings.before_write(caller.ino, off, len(buf), from_cache=caller.from_cache or unknown)
        await self._gates.io_lock.before_write(caller.ino)
        try:
            written = self._fs.write(caller.ino, off, buf, from_cache=caller.from_cache)
            await self._mappings.settled(caller.ino)
            return written
        except MediaError as error:
            if not await self._on_poisoned_write(error):
                raise pyfuse3.FUSEError(error.errno) from None
            return await self._write(caller, off, buf)
        except DaxemuError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        finally:
            if caller.from_cache:
                # The kernel does not know that a page written back changes the times.
                self._mappings.forget_attributes(caller.ino)

    @translated
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self._mappings.synced(unpack(fh).ino)
        self._fs.fsync(datasync=datasync)

    # -- extended attributes

    @translated
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        # pyfuse3 itself handles XATTR_CREATE and XATTR_REPLACE.
        self._fs.check_alive()
        found = self._names.get(inode)
        # The kernel's flag (FUSE_SETXATTR_ACL_KILL_SGID) does not come through libfuse.
        kill_sgid = (
            name == posix_acl.ACCESS
            and bool(found.mode & stat.S_ISGID)
            and not in_group_or_capable(ctx.pid, found.gid)
        )
        self._fs.setxattr(inode, name, value, 0, acl_kill_sgid=kill_sgid)

    @translated
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        self._fs.check_alive()
        if name == XATTR_NAME_CAPS:
            self._will_ask(inode)
        return self._names.getxattr(inode, name)

    @translated
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        self._fs.check_alive()
        names = self._names.listxattr(inode)
        hides = any(name.startswith(TRUSTED) for name in names) and not capable(ctx.pid, CAP_SYS_ADMIN)
        return [pyfuse3.XAttrNameT(name) for name in names if not (hides and name.startswith(TRUSTED))]

    @translated
    async def removexattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        self._fs.removexattr(inode, name)
