"""Report of the data dropped by a power failure."""

from __future__ import annotations

import os

import pytest

from tests.support.mount import DaxMount

pytestmark = pytest.mark.mount


def test_powerfail_reports_the_dropped_data(dax_mount: DaxMount) -> None:
    """sync(2) makes no data durable here; fsync(2) does. Data committed by the timer is not dropped."""
    top = os.open(dax_mount.path, os.O_RDONLY)
    os.fsync(top)
    for name in "abc":
        (dax_mount.path / name).write_text("x")
    os.sync()
    os.close(top)
    answer = dax_mount.json("powerfail", dax_mount.path)
    dax_mount.mount()
    kept = len(os.listdir(dax_mount.path))
    assert answer["dropped"] >= 3 - kept
    assert (answer["oldest"] is None) == (answer["dropped"] == 0)


def test_after_fsync_nothing_is(dax_mount: DaxMount) -> None:
    (dax_mount.path / "a").write_text("x")
    top = os.open(dax_mount.path, os.O_RDONLY)
    os.fsync(top)
    os.close(top)
    assert dax_mount.run("powerfail", dax_mount.path) == f"{dax_mount.path} lost power\n"
    dax_mount.mount()
    assert os.listdir(dax_mount.path) == ["a"]
