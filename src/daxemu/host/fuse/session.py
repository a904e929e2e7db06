"""The mount: the /dev/fuse descriptor, mount(2) or fusermount3, and taking pages away from the kernel by
range.

We open /dev/fuse ourselves and hand pyfuse3 ``/dev/fd/N``: only so can notifications with a range be written
to it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

from daxemu.errors import Busy, InvalidArgument, PermissionDenied, Unsupported
from daxemu.host.fuse import own_files
from daxemu.host.proc.mountinfo import FS_TYPE, SOURCE_PREFIX, Mount, mount_at, mounts
from daxemu.uapi import Ino

_libc = ctypes.CDLL(None, use_errno=True)

MS_NOSUID, MS_NODEV = 2, 4
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_SYNC_AND_WAIT = 1 | 2 | 4  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER
FUSE_NOTIFY_INVAL_INODE = 2
PAGE_CACHE = {"read_ahead_kb": "1024", "strict_limit": "0"}
"""The kernel reads ahead as much as one request can hold; and the mount may have more dirty pages than the
few that FUSE is trusted with, which would be written back all the time, and each store fault again.
"""
_BDI = Path("/sys/class/bdi")
_FUSECTL = Path("/sys/fs/fuse/connections")
_OUT_HEADER = struct.Struct("=IiQ")
_INVAL_INODE = struct.Struct("=Qqq")


def check_mountpoint(mountpoint: Path) -> None:
    """Raises InvalidArgument or Busy if nothing can be mounted there."""
    if mount_at(mountpoint) is not None:
        raise Busy(f"{mountpoint} is a daxemu mount already: daxemu umount {mountpoint}")
    if not mountpoint.is_dir():
        raise InvalidArgument(f"{mountpoint} is not a directory: make it with mkdir first")
    if os.path.ismount(mountpoint):
        raise Busy(f"{mountpoint} has another filesystem mounted on it: choose another directory")
    if not os.access(mountpoint, os.W_OK):
        raise PermissionDenied(
            f"{mountpoint} is not yours to mount on: choose a directory that you can write to"
        )


class Session:
    """One FUSE connection. ``fd`` is its /dev/fuse descriptor, ``mount`` what /proc/self/mountinfo says of
    it.
    """

    def __init__(self, fd: int, mount: Mount) -> None:
        self.fd = fd
        self.mount = mount

    @classmethod
    def open(cls, device: Path, mountpoint: Path) -> Session:
        """Mount. As root with mount(2), otherwise through fusermount3. Raises PermissionDenied, Unsupported,
        Busy.
        """
        mountpoint = Path(os.path.realpath(mountpoint))
        check_mountpoint(mountpoint)
        source = f"{SOURCE_PREFIX}{device}"
        fd = _mount_as_root(source, mountpoint) if os.geteuid() == 0 else _mount_as_user(source, mountpoint)
        mount = mount_at(mountpoint)
        if mount is None:
            os.close(fd)
            raise Busy(f"{mountpoint}: the mount vanished at once; somebody unmounted it: try again")
        return cls(fd, mount)

    # -- notifications

    def revoke(self, ino: Ino, offset: int, length: int) -> None:
        """``unmap_mapping_range()``: take the pages of the range from every process and from the page cache.

        ``length`` 0 is to the end of the file. Dirty pages are written back to us meanwhile: call this from a
        worker thread only. Neighbouring pages stay.
        """
        self._notify_inval_inode(ino, offset, length)

    def forget_attributes(self, ino: Ino) -> None:
        """Have size and times asked for anew. Does not wait for anything."""
        self._notify_inval_inode(ino, -1, 0)

    def _notify_inval_inode(self, ino: Ino, offset: int, length: int) -> None:
        body = _INVAL_INODE.pack(ino, offset, length)
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), FUSE_NOTIFY_INVAL_INODE, 0)
        try:
            os.write(self.fd, header + body)
        except OSError as error:
            # Not in the kernel's cache, or no connection any more: there is nothing to take away.
            if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV):
                raise

    # -- by way of our own mount: from a worker thread only

    def write_back(self, ino: Ino, path: bytes | None) -> bool:
        """Have the dirty pages of a file written back to us, and leave them mapped. ``path``: see
        ``own_files.open_inode``. Takes no lock of the inode, so it may serve a request during which the
        kernel holds that. Return whether the file could be opened; if not, nothing is written back.
        """
        try:
            fd = own_files.open_inode(self.mount, ino, path)
        except OSError as error:
            # The kernel has not got the inode: then no page of it, either.
            return error.errno == errno.ESTALE and os.geteuid() == 0
        try:
            _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_AND_WAIT)
        finally:
            os.close(fd)
        return True

    def refresh_attributes(self, ino: Ino, path: bytes | None) -> None:
        """Have the kernel ask for a file's size and times."""
        with suppress(OSError):
            fd = own_files.open_inode(self.mount, ino, path)
            try:
                os.fstat(fd)
            finally:
                os.close(fd)

    def tune_page_cache(self) -> bool:
        """Set PAGE_CACHE for this mount. Only root can; returns whether all of it is set."""
        settings = _BDI / "{}:{}".format(*self.mount.dev)
        try:
            os.close(own_files.open_directory(self.mount))  # waits for FUSE_INIT, whose answer sets a limit
            for name, value in PAGE_CACHE.items():
                (settings / name).write_text(value)
        except OSError:
            return False
        return True

    # -- the end

    def sync(self) -> None:
        """``syncfs(2)``: have everything dirty written back to us. From a worker thread only."""
        fd = own_files.open_directory(self.mount)
        try:
            _libc.syncfs(fd)
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """``umount(2)``. Raises Busy while anything is open on the mount. The kernel syncs first: never from
        the event loop.
        """
        mountpoint = self.mount.mountpoint
        if os.geteuid() == 0:
            if (number := _umount(self.mount, 0)) == 0:
                return
        else:
            done = subprocess.run(["fusermount3", "-u", str(mountpoint)], capture_output=True, text=True)
            if done.returncode == 0:
                return
            number = errno.EBUSY if "busy" in done.stderr.lower() else errno.EINVAL
        if number == errno.EBUSY:
            raise Busy(
                f"{mountpoint} is in use: close what is open on it, or daxemu umount --force {mountpoint}"
            )
        if mount_at(mountpoint) is not None:
            raise InvalidArgument(
                f"{mountpoint}: {os.strerror(number)}; try daxemu umount --force {mountpoint}"
            )

    def detach(self) -> None:
        """Take the mount out of the tree although it is in use; new users no longer find it."""
        mountpoint = self.mount.mountpoint
        if os.geteuid() == 0:
            _umount(self.mount, MNT_DETACH)
            return
        there = mount_at(mountpoint)
        if there is not None and _is_same(there, self.mount):
            subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], capture_output=True, check=False)

    def abort(self) -> bool:
        """Cut the connection: everything that waits for us gets ENOTCONN. The last resort. Returns whether it
        worked.
        """
        return abort_connection(self.mount)


def _umount(mount: Mount, flags: int) -> int:
    """``umount2(2)`` of exactly this mount, wherever its mountpoint is by now. Returns 0 or the error number;
    ESTALE if the mount is not found in this mount namespace.

    No path is walked: another user may exchange a directory above the mountpoint for a link at any moment. A
    descriptor of the directory above fixes the place, and the kernel's number of the mount there says that it
    is the right one. A descriptor of the mount's root would do for MNT_DETACH alone: it keeps the mount busy.
    """
    for now in reversed(mounts()):
        if not _is_same(now, mount):
            continue
        with suppress(OSError):
            above = os.open(now.mountpoint.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _mount_id(above, now.mountpoint.name) != now.id:
                    continue
                path = f"/proc/self/fd/{above}/".encode() + os.fsencode(now.mountpoint.name)
                done = _libc.umount2(path, flags | UMOUNT_NOFOLLOW)
                return ctypes.get_errno() if done else 0
            finally:
                os.close(above)
    return errno.ESTALE


def _is_same(now: Mount, mount: Mount) -> bool:
    """Whether ``now``, read from mountinfo, is ``mount``, perhaps moved to another path.

    The kernel gives the number of a mount, and the device number, to the next mount once they are free. The
    source cannot be reused: the supervisor holds the lock of its DEVICE.
    """
    if now.device != mount.device:
        return False
    return now.id == mount.id or (now.mountpoint, now.dev) == (mount.mountpoint, mount.dev)


def _mount_id(directory: int, name: str) -> int:
    """The kernel's number of the mount that a name in a directory is on. Asks no filesystem for anything."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        fields = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
    finally:
        os.close(fd)
    return int(fields[fields.index("mnt_id:") + 1])


def abort_file(mount: Mount) -> Path:
    """The file that cuts a mount's FUSE connection when it is written to; mounts its filesystem if it must
    and may.
    """
    control = _FUSECTL / str(os.makedev(*mount.dev)) / "abort"
    if not control.exists() and os.geteuid() == 0:
        _libc.mount(b"none", os.fsencode(_FUSECTL), b"fusectl", 0, None)
    return control


def abort_connection(mount: Mount) -> bool:
    """Cut a mount's FUSE connection. Returns whether that was possible."""
    try:
        abort_file(mount).write_text("1")
    except OSError:
        return False
    return True


def _mount_as_root(source: str, mountpoint: Path) -> int:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unsupported(f"/dev/fuse: {error.strerror}; see daxemu doctor") from error
    options = (
        f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions,allow_other"
    )
    done = _libc.mount(
        os.fsencode(source), os.fsencode(mountpoint), FS_TYPE.encode(), MS_NOSUID | MS_NODEV, options.encode()
    )
    if done != 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise PermissionDenied(f"cannot mount on {mountpoint}: {os.strerror(number)}; see daxemu doctor")
    return fd


def _mount_as_user(source: str, mountpoint: Path) -> int:
    """fusermount3 mounts for us and sends the descriptor back over a socket."""
    if shutil.which("fusermount3") is None:
        raise Unsupported("mounting without root needs fusermount3: install the package fuse3")
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"fsname={escaped},subtype=daxemu,default_permissions"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            ["fusermount3", "-o", options, "--", str(mountpoint)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise PermissionDenied(f"cannot mount on {mountpoint}: {done.stderr.strip()}; see daxemu doctor")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise Unsupported("fusermount3 sent no descriptor: see daxemu doctor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
