"""Mounting and unmounting, and survival of data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mount import DaxMount

pytestmark = pytest.mark.mount

BDI = Path("/sys/class/bdi")


def test_files_survive_a_remount(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 3)
    (dax_mount.path / "d").mkdir()
    (dax_mount.path / "d" / "link").symlink_to("../f")
    before = file.read_bytes()
    dax_mount.umount()
    assert not file.exists()
    dax_mount.mount()
    assert file.read_bytes() == before
    assert (dax_mount.path / "d" / "link").read_bytes() == before


def test_open_with_o_trunc_empties_the_file(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 3)
    with open(file, "wb") as opened:
        assert opened.seek(0, 2) == 0
        opened.write(b"short")
    assert file.read_bytes() == b"short"
    dax_mount.umount()
    dax_mount.mount()
    assert file.read_bytes() == b"short"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change what the page cache does")
@pytest.mark.skipif(not list(BDI.glob("*/strict_limit")), reason="no strict_limit before Linux 6.2")
def test_the_page_cache_reads_ahead_by_whole_requests_and_may_be_dirty(dax_mount: DaxMount) -> None:
    dev = dax_mount.path.stat().st_dev
    settings = BDI / f"{os.major(dev)}:{os.minor(dev)}"
    assert (settings / "read_ahead_kb").read_text() == "1024\n"
    assert (settings / "strict_limit").read_text() == "0\n"
