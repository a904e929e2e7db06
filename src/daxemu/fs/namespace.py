"""Namespace: inodes, directories, names and extended attributes; everything except the bytes of files.

Verbs raise FsError with the errno of the system call. The kernel checks permissions
(``default_permissions``). The checks that the kernel leaves to a filesystem, sticky bits and setgid
inheritance, are in this module.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable

from daxemu.errors import FsError
from daxemu.fs import inode_flags, posix_acl
from daxemu.fs.extents import ExtentMap
from daxemu.fs.inode import (
    ENTRY_COST,
    LINK_MAX,
    ROOT_INO,
    SUPERUSER,
    Credentials,
    Inode,
    timestamp_truncate,
)
from daxemu.fs.inode_table import InodeTable
from daxemu.fs.privs import setattr_should_drop_suidgid
from daxemu.fs.rmap import Rmap
from daxemu.fs.xattr import check_name
from daxemu.uapi import (
    NAME_MAX,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    SYMLINK_MAX,
    XATTR_CREATE,
    XATTR_REPLACE,
    XATTR_SIZE_MAX,
    Ino,
)


class Namespace(InodeTable):
    """Tree of names. Precondition of all verbs: inode numbers come from a lookup."""

    @classmethod
    def new(
        cls, rmap: Rmap, uid: int, gid: int, on_change: Callable[[Ino], None] = lambda ino: None
    ) -> Namespace:
        """Make an empty tree; its root belongs to ``uid`` and ``gid``."""
        namespace = cls(rmap, on_change)
        root = Inode(ROOT_INO, stat.S_IFDIR | 0o755, uid, gid, nlink=2, parent=ROOT_INO, entries={})
        root.atime = root.mtime = root.ctime = time.time_ns()
        namespace._inodes[ROOT_INO] = root
        namespace.dirty_inodes.add(ROOT_INO)
        return namespace

    # -- looking

    def lookup(self, parent: Ino, name: bytes) -> Inode:
        """Find a name in a directory (``->lookup``). The name "." works for any inode, for file handles
        (``fuse_get_dentry``).

        Raises FsError ENOENT.
        """
        if name == b".":
            return self.get(parent)
        inode, entries = self.directory(parent)
        if name == b"..":
            return self.get(inode.parent)
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG)
        child = entries.get(name)
        if child is None:
            raise FsError(errno.ENOENT)
        return self.get(child)

    # -- making

    def _room_for(self, parent: Ino, name: bytes) -> tuple[Inode, dict[bytes, Ino]]:
        inode, entries = self.directory(parent)
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG)
        if name in entries:
            raise FsError(errno.EEXIST)
        if inode.nlink == 0:
            raise FsError(errno.ENOENT)
        inode_flags.may_write(inode)
        return inode, entries

    def _new_inode(self, parent: Inode, mode: int, cred: Credentials) -> Inode:
        """Make an inode (``posix_acl_create()``, ``inode_init_owner()``). The default access list of the
        directory replaces the umask.
        """
        xattrs = {}
        default = None if stat.S_ISLNK(mode) else parent.xattrs.get(posix_acl.DEFAULT)
        if default is not None:
            acl, mode = posix_acl.inherited(posix_acl.decode(default), mode)
            if not posix_acl.is_only_mode(acl):
                xattrs[posix_acl.ACCESS] = posix_acl.encode(acl)
            if stat.S_ISDIR(mode):
                xattrs[posix_acl.DEFAULT] = default
        elif not stat.S_ISLNK(mode):
            mode &= ~cred.umask
        gid = cred.gid
        if parent.mode & stat.S_ISGID:
            gid = parent.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        inode = Inode(self._next_ino, mode, cred.uid, gid, xattrs=xattrs)
        self.name_bytes += self._own_bytes(inode)
        inode.atime = inode.mtime = inode.ctime = time.time_ns()
        self._next_ino += 1
        self._inodes[inode.ino] = inode
        return inode

    def _enter(self, parent: Inode, entries: dict[bytes, Ino], name: bytes, child: Inode) -> None:
        entries[name] = child.ino
        self._listings.entered(parent.ino, name)
        self.dirty_entries.add((parent.ino, name))
        self.dirty_inodes.add(child.ino)
        child.parent, child.name = parent.ino, name
        self.name_bytes += len(name) + ENTRY_COST
        self.touch(parent, modified=True)

    def mknod(self, parent: Ino, name: bytes, mode: int, rdev: int, cred: Credentials) -> Inode:
        """Make a regular file, device node, fifo or socket (``->create``, ``->mknod``)."""
        directory, entries = self._room_for(parent, name)
        inode = self._new_inode(directory, mode, cred)
        if stat.S_ISREG(mode):
            inode.extents = ExtentMap(inode.ino, self._rmap)
        else:
            inode.rdev = rdev
        self._enter(directory, entries, name, inode)
        return inode

    def tmpfile(self, parent: Ino, mode: int, cred: Credentials) -> Inode:
        """Make a regular file without a name (``->tmpfile``). :meth:`link` can give the file one."""
        directory = self.directory(parent)[0]
        inode_flags.may_write(directory)
        inode = self._new_inode(directory, mode, cred)
        inode.extents, inode.nlink = ExtentMap(inode.ino, self._rmap), 0
        self.linkable.add(inode.ino)
        return inode

    def mkdir(self, parent: Ino, name: bytes, mode: int, cred: Credentials) -> Inode:
        """Make a directory (``->mkdir``). Raises FsError EMLINK if the parent has the maximum number of
        links.
        """
        directory, entries = self._room_for(parent, name)
        if directory.nlink >= LINK_MAX:
            raise FsError(errno.EMLINK)
        inode = self._new_inode(directory, stat.S_IFDIR | stat.S_IMODE(mode), cred)
        inode.entries, inode.nlink = {}, 2
        directory.nlink += 1
        self._enter(directory, entries, name, inode)
        return inode

    def symlink(self, parent: Ino, name: bytes, target: bytes, cred: Credentials) -> Inode:
        """Make a symlink (``->symlink``). Raises FsError ENAMETOOLONG for a target of 4096 bytes or more."""
        directory, entries = self._room_for(parent, name)
        if len(target) > SYMLINK_MAX:
            raise FsError(errno.ENAMETOOLONG)
        inode = self._new_inode(directory, stat.S_IFLNK | 0o777, cred)
        inode.target, inode.size = target, len(target)
        self.name_bytes += len(target)
        self._enter(directory, entries, name, inode)
        return inode

    def link(self, ino: Ino, parent: Ino, name: bytes) -> Inode:
        """Add a name (``->link``). Raises FsError EPERM for a directory, ENOENT for an unlinked file."""
        inode = self.get(ino)
        if inode.is_dir:
            raise FsError(errno.EPERM)
        if inode.nlink == 0 and ino not in self.linkable:
            raise FsError(errno.ENOENT)
        if inode.nlink >= LINK_MAX:
            raise FsError(errno.EMLINK)
        directory, entries = self._room_for(parent, name)
        inode_flags.may_change(inode)
        if inode.nlink == 0:
            self.linkable.remove(ino)
        inode.nlink += 1
        self.touch(inode, modified=False)
        self._enter(directory, entries, name, inode)
        return inode

    # -- taking away

    def _leave(self, parent: Inode, entries: dict[bytes, Ino], name: bytes) -> None:
        del entries[name]
        self._listings.left(parent.ino, name)
        self.dirty_entries.add((parent.ino, name))
        self.name_bytes -= len(name) + ENTRY_COST
        self.touch(parent, modified=True)

    def unlink(self, parent: Ino, name: bytes) -> Inode:
        """Remove a name (``->unlink``). Return the inode, possibly without a name now. Raises FsError
        EISDIR.
        """
        directory, entries = self.directory(parent)
        inode = self.lookup(parent, name)
        inode_flags.may_delete(directory, inode)
        if inode.is_dir:
            raise FsError(errno.EISDIR)
        self._leave(directory, entries, name)
        inode.nlink -= 1
        self.touch(inode, modified=False)
        return inode

    def rmdir(self, parent: Ino, name: bytes) -> Inode:
        """Remove an empty directory (``->rmdir``). Return the directory, without links now. Raises FsError
        ENOTDIR, ENOTEMPTY.
        """
        directory, entries = self.directory(parent)
        inode = self.lookup(parent, name)
        inode_flags.may_delete(directory, inode)
        if inode.entries is None:
            raise FsError(errno.ENOTDIR)
        if inode.entries:
            raise FsError(errno.ENOTEMPTY)
        self._leave(directory, entries, name)
        directory.nlink -= 1
        inode.nlink = 0
        self.touch(inode, modified=False)
        return inode

    def rename(
        self,
        old_parent: Ino,
        old: bytes,
        new_parent: Ino,
        new: bytes,
        flags: int,
        cred: Credentials = SUPERUSER,
    ) -> Inode | None:
        """Rename (``->rename``), with flags. Return the replaced inode, if any. ``cred`` owns the whiteout of
        RENAME_WHITEOUT under the old name.
        """
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT):
            raise FsError(errno.EINVAL)
        if flags & RENAME_EXCHANGE and flags != RENAME_EXCHANGE:
            raise FsError(errno.EINVAL)
        source_dir, source_entries = self.directory(old_parent)
        target_dir, target_entries = self.directory(new_parent)
        moved = self.lookup(old_parent, old)
        if len(new) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG)
        if target_dir.nlink == 0:
            raise FsError(errno.ENOENT)
        present = target_entries.get(new)
        there = self.get(present) if present is not None else None
        if flags & RENAME_EXCHANGE and there is None:
            raise FsError(errno.ENOENT)
        if flags & RENAME_NOREPLACE and there is not None:
            raise FsError(errno.EEXIST)
        if moved.is_dir and self._is_inside(new_parent, moved.ino):
            raise FsError(errno.EINVAL)
        if there is not moved:
            self._may_rename(source_dir, moved, target_dir, there)
        if flags & RENAME_EXCHANGE and there is not None:
            if there.is_dir and self._is_inside(old_parent, there.ino):
                raise FsError(errno.EINVAL)
            self._exchange(source_dir, source_entries, old, moved, target_dir, target_entries, new, there)
            return None
        if there is moved:
            return None
        if there is not None:
            self._replaceable(moved, there)
            (self.rmdir if there.is_dir else self.unlink)(new_parent, new)
        self._leave(source_dir, source_entries, old)
        self._enter(target_dir, target_entries, new, moved)
        if moved.is_dir and source_dir is not target_dir:
            source_dir.nlink -= 1
            target_dir.nlink += 1
            self.dirty_inodes |= {source_dir.ino, target_dir.ino}
        self.touch(moved, modified=False)
        if flags & RENAME_WHITEOUT:
            self._enter(source_dir, source_entries, old, self._new_inode(source_dir, stat.S_IFCHR, cred))
        return there

    @staticmethod
    def _may_rename(source_dir: Inode, moved: Inode, target_dir: Inode, there: Inode | None) -> None:
        inode_flags.may_delete(source_dir, moved)
        if there is None:
            inode_flags.may_write(target_dir)
        else:
            inode_flags.may_delete(target_dir, there)

    @staticmethod
    def _replaceable(moved: Inode, there: Inode) -> None:
        if there.is_dir and not moved.is_dir:
            raise FsError(errno.EISDIR)
        if moved.is_dir and not there.is_dir:
            raise FsError(errno.ENOTDIR)
        if there.entries:
            raise FsError(errno.ENOTEMPTY)

    def _exchange(
        self,
        source_dir: Inode,
        source_entries: dict[bytes, Ino],
        old: bytes,
        moved: Inode,
        target_dir: Inode,
        target_entries: dict[bytes, Ino],
        new: bytes,
        there: Inode,
    ) -> None:
        source_entries[old], target_entries[new] = there.ino, moved.ino
        self.dirty_entries |= {(source_dir.ino, old), (target_dir.ino, new)}
        moved.parent, moved.name, there.parent, there.name = target_dir.ino, new, source_dir.ino, old
        for inode, before, after in ((moved, source_dir, target_dir), (there, target_dir, source_dir)):
            if inode.is_dir:
                before.nlink -= 1
                after.nlink += 1
            self.touch(inode, modified=False)
        self.touch(source_dir, modified=True)
        self.touch(target_dir, modified=True)

    def _is_inside(self, ino: Ino, ancestor: Ino) -> bool:
        """Return True if directory ``ino`` is ``ancestor`` or a descendant of ``ancestor``."""
        while True:
            if ino == ancestor:
                return True
            if ino == ROOT_INO:
                return False
            ino = self.get(ino).parent

    # -- attributes

    def setattr(
        self,
        ino: Ino,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
    ) -> Inode:
        """Set attributes except the size (``->setattr``). ``mode``: permission bits. None changes nothing."""
        inode = self.get(ino)
        if mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(mode)
            if (access := inode.xattrs.get(posix_acl.ACCESS)) is not None:
                inode.xattrs[posix_acl.ACCESS] = posix_acl.encode(
                    posix_acl.with_mode(posix_acl.decode(access), mode)
                )
        inode.uid = inode.uid if uid is None else uid
        inode.gid = inode.gid if gid is None else gid
        self.touch(inode, modified=False)
        inode.atime = inode.atime if atime is None else timestamp_truncate(atime)
        inode.mtime = inode.mtime if mtime is None else timestamp_truncate(mtime)
        return inode

    def file_remove_privs(self, inode: Inode, in_group_or_capable: Callable[[int], bool]) -> bool:
        """Remove the set-id bits (``file_remove_privs()``). Return True if any bit was set. See
        setattr_should_drop_suidgid().
        """
        drop = setattr_should_drop_suidgid(inode, in_group_or_capable)
        if drop:
            inode.mode &= ~drop
            self.touch(inode, modified=False)
        return bool(drop)

    def set_flags(self, ino: Ino, flags: int) -> None:
        """Set the inode flags of a file or directory (FS_*_FL, fs/inode_flags.py)."""
        inode = self.get(ino)
        self.name_bytes -= self._own_bytes(inode)
        if flags:
            inode.xattrs[inode_flags.KEY] = inode_flags.encode(flags)
        else:
            inode.xattrs.pop(inode_flags.KEY, None)
        self.name_bytes += self._own_bytes(inode)
        self.touch(inode, modified=False)

    # -- extended attributes

    def setxattr(
        self, ino: Ino, name: bytes, value: bytes, flags: int, *, acl_kill_sgid: bool = False
    ) -> None:
        """Set an extended attribute (``setxattr(2)``). ``acl_kill_sgid``: an access list clears S_ISGID
        (FUSE_SETXATTR_ACL_KILL_SGID).

        Raises FsError EOPNOTSUPP or EINVAL for an unsupported name, EEXIST or ENODATA according to the flags,
        E2BIG for a large value.
        """
        inode = self.get(ino)
        inode_flags.may_change(inode)
        self._check_xattr(inode, name)
        if len(value) > XATTR_SIZE_MAX:
            raise FsError(errno.E2BIG)
        if name in (posix_acl.ACCESS, posix_acl.DEFAULT) and not self._set_acl(
            inode, name, value, acl_kill_sgid
        ):
            return
        if flags & XATTR_CREATE and name in inode.xattrs:
            raise FsError(errno.EEXIST)
        if flags & XATTR_REPLACE and name not in inode.xattrs:
            raise FsError(errno.ENODATA)
        self.name_bytes += len(value) - len(inode.xattrs.get(name, b""))
        self.name_bytes += 0 if name in inode.xattrs else len(name) + ENTRY_COST
        inode.xattrs[name] = value
        self.touch(inode, modified=False)

    def _set_acl(self, inode: Inode, name: bytes, value: bytes, kill_sgid: bool) -> bool:
        """Update the mode from an access list. Return True if a list is left to store.

        Raises FsError EACCES for a default list of any type other than a directory.
        """
        acl = posix_acl.decode(value)
        if name == posix_acl.DEFAULT:
            if not inode.is_dir:
                raise FsError(errno.EACCES)
            return True
        inode.mode = inode.mode & ~0o777 | posix_acl.mode_of(acl)
        if kill_sgid:
            inode.mode &= ~stat.S_ISGID
        self.touch(inode, modified=False)
        if posix_acl.is_only_mode(acl):
            if name in inode.xattrs:
                self.removexattr(inode.ino, name)
            return False
        return True

    @staticmethod
    def _check_xattr(inode: Inode, name: bytes) -> None:
        # A device may hold names that earlier releases accepted.
        if name not in inode.xattrs or name == inode_flags.KEY:
            check_name(name)

    def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """Return an extended attribute (``getxattr(2)``). Raises FsError ENODATA."""
        inode = self.get(ino)
        self._check_xattr(inode, name)
        value = inode.xattrs.get(name)
        if value is None:
            raise FsError(errno.ENODATA)
        return value

    def listxattr(self, ino: Ino) -> list[bytes]:
        """Return the names of all extended attributes (``listxattr(2)``), without a check of permissions."""
        return [name for name in self.get(ino).xattrs if name != inode_flags.KEY]

    def removexattr(self, ino: Ino, name: bytes) -> None:
        """Remove an extended attribute (``removexattr(2)``). Raises FsError ENODATA."""
        inode = self.get(ino)
        inode_flags.may_change(inode)
        self._check_xattr(inode, name)
        if name not in inode.xattrs:
            raise FsError(errno.ENODATA)
        self.name_bytes -= len(name) + len(inode.xattrs.pop(name)) + ENTRY_COST
        self.touch(inode, modified=False)
