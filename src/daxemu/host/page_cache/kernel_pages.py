"""Pages and attributes of files in the kernel: revoke, write back, ask for attributes again.

Revokes are notifications to the kernel (host/fuse/notifications); the rest goes through files of this mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

from daxemu.host.fuse import notifications
from daxemu.host.fuse.session import Session
from daxemu.host.page_cache import own_files
from daxemu.uapi import Ino

_libc = ctypes.CDLL(None, use_errno=True)

SETTINGS = {"read_ahead_kb": "1024", "strict_limit": "0"}
"""Settings of the mount's page cache (BDI). ``read_ahead_kb``: as much as one request can hold.
``strict_limit`` 0: the mount may have more dirty pages than FUSE's low limit. With the limit, the kernel
would write pages back all the time, and each store would fault again.
"""
_SYNC_AND_WAIT = 1 | 2 | 4  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER
_BDI = Path("/sys/class/bdi")


class KernelPages:
    """Pages and attributes of one mount's files."""

    def __init__(self, session: Session) -> None:
        self._fd = session.fd
        self.mount = session.mount

    def revoke(self, ino: Ino, offset: int, length: int) -> None:
        """See ``notifications.invalidate_pages``. From a worker thread only."""
        notifications.invalidate_pages(self._fd, ino, offset, length)

    def forget_attributes(self, ino: Ino) -> None:
        """See ``notifications.invalidate_attributes``. Does not block."""
        notifications.invalidate_attributes(self._fd, ino)

    # -- through files on this mount: from a worker thread only

    def write_back(self, ino: Ino, path: bytes | None) -> bool:
        """Have the kernel write back the dirty pages of a file, which stay mapped.

        ``path``: see ``own_files.open_inode``. Takes no lock of the inode, so also for requests during which
        the kernel holds the inode's lock. Return False if the file could not be opened, so dirty pages may
        remain. As root, an inode that the kernel does not hold counts as written back.
        """
        try:
            fd = own_files.open_inode(self.mount, ino, path)
        except OSError as error:
            # ESTALE: the kernel does not hold the inode, so no page of the file, either.
            return error.errno == errno.ESTALE and os.geteuid() == 0
        try:
            _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_AND_WAIT)
        finally:
            os.close(fd)
        return True

    def write_back_all(self) -> None:
        """``syncfs(2)``: write back all dirty pages of the mount. Raises OSError."""
        fd = own_files.open_directory(self.mount)
        try:
            _libc.syncfs(fd)
        finally:
            os.close(fd)

    def refresh_attributes(self, ino: Ino, path: bytes | None) -> None:
        """Have the kernel ask for size and times of a file now."""
        with suppress(OSError):
            fd = own_files.open_inode(self.mount, ino, path)
            try:
                os.fstat(fd)
            finally:
                os.close(fd)

    def tune(self) -> bool:
        """Set SETTINGS for this mount. Return whether all settings were made; only root can."""
        settings = _BDI / "{}:{}".format(*self.mount.dev)
        try:
            os.close(own_files.open_directory(self.mount))  # waits for FUSE_INIT, whose answer sets a limit
            for name, value in SETTINGS.items():
                (settings / name).write_text(value)
        except OSError:
            return False
        return True
