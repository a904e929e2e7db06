"""Ordinary users get a separate /dev/fuse; the mode of the machine's node stays."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import own_node
from tests.support.elsewhere import NOBODY
from tests.support.own_node import FUSE, fuse_for_everybody

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]

NAMESPACE = Path("/proc/self/ns/mnt")


def _opened_by_nobody() -> bool:
    done = subprocess.run([*NOBODY, "sh", "-c", f": <> {FUSE}"], capture_output=True)
    return done.returncode == 0


def test_users_may_open_it_inside_and_nothing_changes_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, namespace = FUSE.stat(), NAMESPACE.readlink()
    by_nobody = _opened_by_nobody()
    with fuse_for_everybody():
        assert _opened_by_nobody()
    assert os.path.samestat(FUSE.stat(), before)
    assert FUSE.stat().st_mode == before.st_mode
    assert _opened_by_nobody() == by_nobody
    assert NAMESPACE.readlink() == namespace
    assert Path.cwd() == tmp_path


def test_where_none_can_be_made_the_skip_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted", "fuse")

    monkeypatch.setattr(os, "mknod", refused)
    monkeypatch.setattr(own_node, "NOBODY", ("sh", "-c", "false"))
    namespace = NAMESPACE.readlink()
    with (
        pytest.raises(pytest.skip.Exception, match=r"cannot open /dev/fuse: .*Operation not permitted"),
        fuse_for_everybody(),
    ):
        raise AssertionError("entered")
    assert NAMESPACE.readlink() == namespace
