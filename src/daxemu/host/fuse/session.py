"""The mount: the /dev/fuse descriptor, mount(2) or fusermount3, umount(2), abort of the connection.

The session opens /dev/fuse itself and passes ``/dev/fd/N`` to pyfuse3: so daxemu can write notifications with
a range to the descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import select
import shutil
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from daxemu.errors import Busy, InvalidArgument, PermissionDenied, Unsupported
from daxemu.host.proc.mountinfo import FS_TYPE, SOURCE_PREFIX, Mount, mount_at, mounts
from daxemu.host.proc.pins import copies

_libc = ctypes.CDLL(None, use_errno=True)

MS_NOSUID, MS_NODEV = 2, 4
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_FUSECTL = Path("/sys/fs/fuse/connections")


def check_mountpoint(mountpoint: Path) -> None:
    """Check a mountpoint. Raises InvalidArgument for a non-directory, Busy for a mountpoint in use,
    PermissionDenied for a directory that the caller cannot write to.
    """
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
    """One FUSE connection. ``fd``: descriptor of /dev/fuse; ``mount``: entry of /proc/self/mountinfo."""

    def __init__(self, fd: int, mount: Mount) -> None:
        self.fd = fd
        self.mount = mount

    @classmethod
    def open(cls, device: Path, mountpoint: Path) -> Session:
        """Mount: as root with mount(2), otherwise through fusermount3. Raises as :func:`check_mountpoint`,
        PermissionDenied for a refused mount, Unsupported without /dev/fuse or fusermount3, Busy for a mount
        that vanished at once.
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

    def unmount(self) -> None:
        """``umount(2)``. Raises Busy while a file on the mount is in use, InvalidArgument for another error.

        The kernel syncs first: never from the event loop.
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
        """Detach the mount (MNT_DETACH), also while in use: later opens do not find the mount."""
        mountpoint = self.mount.mountpoint
        if os.geteuid() == 0:
            _umount(self.mount, MNT_DETACH)
            return
        there = mount_at(mountpoint)
        if there is not None and is_same(there, self.mount):
            subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], capture_output=True, check=False)

    def abort(self) -> bool:
        """Cut the connection, the last resort: every waiting request gets ENOTCONN. Return whether the
        connection is cut.
        """
        return not self._is_connected() or _abort(self.mount, self._is_connected)

    def _is_connected(self) -> bool:
        """Return False once the connection is cut. A connection that is not cut keeps its device number."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return not poll.poll(0)


def _umount(mount: Mount, flags: int) -> int:
    """``umount2(2)`` of exactly this mount, also after a move of its mountpoint. Return 0 or the error
    number; ESTALE if this mount namespace lacks the mount.

    No path is walked: another user may exchange a directory above the mountpoint for a link at any moment. A
    descriptor of the directory above fixes the place, and the kernel's number of the mount at the place
    identifies the mount. A descriptor of the mount's root keeps the mount busy, so serves MNT_DETACH only.
    """
    for now in reversed(mounts()):
        if not is_same(now, mount):
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


def is_same(now: Mount, mount: Mount) -> bool:
    """Return whether ``now``, read from mountinfo, is ``mount``, perhaps moved to another path.

    The kernel reuses the mount numbers and device numbers of unmounted filesystems. The source cannot be
    reused: the supervisor holds the lock of its DEVICE.
    """
    if now.device != mount.device:
        return False
    return now.id == mount.id or (now.mountpoint, now.dev) == (mount.mountpoint, mount.dev)


def _mount_id(directory: int, name: str) -> int:
    """Return the kernel's number of the mount that holds a name in a directory, without a FUSE request."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        fields = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
    finally:
        os.close(fd)
    return int(fields[fields.index("mnt_id:") + 1])


def abort_file(mount: Mount) -> Path:
    """Return the fusectl file whose write cuts a mount's FUSE connection. Root mounts fusectl if the file
    does not exist.
    """
    control = _FUSECTL / str(os.makedev(*mount.dev)) / "abort"
    if not control.exists() and os.geteuid() == 0:
        _libc.mount(b"none", os.fsencode(_FUSECTL), b"fusectl", 0, None)
    return control


def abort_connection(mount: Mount) -> bool:
    """Cut a mount's FUSE connection. Return False if the fusectl file could not be written, or if no mount
    namespace has the mount any longer.
    """
    return _abort(mount, lambda: _is_mounted(mount))


def _abort(mount: Mount, is_there: Callable[[], bool]) -> bool:
    """Cut the connection with the device number of ``mount`` if the number still belongs to the mount.

    The kernel gives the number of an ended mount to the next mount. An open fusectl file belongs to one
    connection for good (fuse_ctl_remove_conn()). So the file is opened first; then ``is_there`` looks for the
    mount; then the name must still lead to the open file.
    """
    path = abort_file(mount)
    try:
        control = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not is_there() or not os.path.samestat(os.fstat(control), path.stat()):
            return False
        os.write(control, b"1")
    except OSError:
        return False
    finally:
        os.close(control)
    return True


def _is_mounted(mount: Mount) -> bool:
    """Return whether this or another mount namespace has ``mount``: see :func:`is_same`."""
    there = itertools.chain(mounts(), (pin.mount for pin in copies()))
    return any(is_same(now, mount) and now.dev == mount.dev for now in there)


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
    """Have fusermount3 mount; return the descriptor of /dev/fuse that fusermount3 sends over a socket."""
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
