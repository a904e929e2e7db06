"""File handles: name_to_handle_at(2), open_by_handle_at(2), as NFS servers and backup programs use them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.mount import DaxMount
from tests.support.syscalls import name_to_handle, open_by_handle

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="open_by_handle_at(2) is for root"),
]


def content(mount: Path, handle: bytes) -> bytes:
    """Return the content of a file, opened by handle."""
    top = os.open(mount, os.O_RDONLY)
    try:
        with open(open_by_handle(top, handle, os.O_RDONLY), "rb") as file:
            return file.read()
    finally:
        os.close(top)


def test_handles_outlive_the_mount(dax_mount: DaxMount) -> None:
    """The kernel has forgotten the file after a remount and asks for the file by inode number."""
    (dax_mount.path / "d").mkdir()
    (dax_mount.path / "d" / "f").write_bytes(b"data")
    handle = name_to_handle(dax_mount.path / "d" / "f")
    for _ in range(2):
        assert content(dax_mount.path, handle) == b"data"
        dax_mount.umount()
        dax_mount.mount()


def test_of_a_file_that_is_gone(dax_mount: DaxMount) -> None:
    file = dax_mount.path / "f"
    file.write_bytes(b"data")
    handle = name_to_handle(file)
    file.unlink()
    dax_mount.umount()
    dax_mount.mount()
    file.write_bytes(b"another")
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        content(dax_mount.path, handle)
