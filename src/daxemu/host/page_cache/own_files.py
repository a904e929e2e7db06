"""Open files of the supervisor's own mount: by file handle, or by a path beneath the mount.

Users of the mount rename directories and make links and FIFOs as they like, and must not choose the files
that a supervisor, possibly root's, opens. A file handle (open_by_handle_at(2), root only) names an inode
without a path; unlinked files are found too. Another user's supervisor walks a path with openat2(2), which
follows no link and enters no other filesystem, and opens nothing but the intended regular file. From worker
threads only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

from daxemu.host.proc.mountinfo import Mount
from daxemu.host.proc.procfs import read_lines
from daxemu.uapi import Ino

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# struct file_handle: bytes that follow, FILEID_INO64_GEN; then fuse_encode_fh(): two halves of the node id,
# and the generation (0 for each inode).
_HANDLE = struct.Struct("=Ii3I")
_FILEID_INO64_GEN = 0x81
_OPEN_HOW = struct.Struct("=3Q")  # flags, mode, resolve
_NR_OPENAT2 = 437  # of every architecture
_BENEATH = 0x01 | 0x02 | 0x04 | 0x08  # RESOLVE_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH
_QUIETLY = os.O_CLOEXEC | os.O_NONBLOCK


def open_root(mount: Mount) -> int:
    """Open the mount's root (O_PATH). Raises OSError; ESTALE if the mountpoint shows another filesystem."""
    fd = os.open(mount.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if _device_of(fd) == mount.dev:
        return fd
    os.close(fd)
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(mount.mountpoint))


def open_directory(mount: Mount) -> int:
    """Open the mount's root for reading. Raises as :func:`open_root`."""
    root = open_root(mount)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | _QUIETLY, dir_fd=root)
    finally:
        os.close(root)


def open_inode(mount: Mount, ino: Ino, path: bytes | None, flags: int = os.O_RDONLY) -> int:
    """Open the regular file ``ino``. ``path``, from the mount's root, serves where file handles are not
    permitted; None for a file without a name. Raises OSError; ESTALE if the kernel does not hold the inode.
    """
    try:
        return _by_handle(mount, ino, flags)
    except PermissionError:
        if path is None:
            raise
        return _beneath(mount, ino, path, flags)


def _by_handle(mount: Mount, ino: Ino, flags: int) -> int:
    handle = _HANDLE.pack(12, _FILEID_INO64_GEN, ino >> 32, ino & 0xFFFFFFFF, 0)
    root = open_directory(mount)
    try:
        fd: int = _libc.open_by_handle_at(root, handle, flags | _QUIETLY)
    finally:
        os.close(root)
    return _checked(fd)


def _beneath(mount: Mount, ino: Ino, path: bytes, flags: int) -> int:
    how = _OPEN_HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, _BENEATH)
    root = open_root(mount)
    try:
        found = _checked(_libc.syscall(_NR_OPENAT2, root, path.lstrip(b"/"), how, _OPEN_HOW.size))
    finally:
        os.close(root)
    try:
        status = os.fstat(found)
        if status.st_ino != ino or not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return os.open(f"/proc/self/fd/{found}", flags | _QUIETLY)
    finally:
        os.close(found)


def _checked(fd: int) -> int:
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def _device_of(fd: int) -> tuple[int, int] | None:
    """Return the device (major, minor) of a descriptor's mount, from /proc alone: the filesystem may hang."""
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
    wanted = facts["mnt_id"].strip()
    for line in read_lines("/proc/self/mountinfo"):
        fields = line.split(" ", 3)
        if fields[0] == wanted:
            major, minor = fields[2].split(":")
            return int(major), int(minor)
    return None
