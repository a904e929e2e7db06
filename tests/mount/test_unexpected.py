"""An unexpected exception costs a FUSE request EIO; an endless step is named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from daxemu.errors import NotMounted
from tests.support.mount import clear_away
from tests.support.quick import quick_mount_at
from tests.support.zygote import Zygote, wait_for_end

pytestmark = pytest.mark.mount


def test_an_exception_in_a_handler_is_eio_for_one_request(tmp_path: Path, zygote: Zygote) -> None:
    with quick_mount_at(tmp_path, zygote, mount=False) as mount:
        mount.mount("fail_at_reading", "cursed")
        (mount.path / "cursed").write_bytes(b"c" * 4096)
        (mount.path / "sound").write_bytes(b"s" * 4096)
        for _ in range(3):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.stat(mount.path / "cursed-name")  # noqa: PTH116 - not the cached name
        assert (mount.path / "sound").read_bytes() == b"s" * 4096
        events = map(json.loads, (mount.device / "events.jsonl").read_bytes().splitlines())
        failed = [(e["where"], e["error"]) for e in events if e["event"] == "UnexpectedError"]
        assert failed == [("FUSE lookup", "ZeroDivisionError: sabotage")] * 3


def test_the_watchdog_names_the_step_and_the_request_is_no_success(tmp_path: Path, zygote: Zygote) -> None:
    with quick_mount_at(tmp_path, zygote, mount=False) as mount:
        mount.sound = False  # the supervisor may not have ended yet
        mount.mount("stand_still_in_badblocks", 1.0)
        with mount.client() as client, pytest.raises(NotMounted, match="stood still"):
            client.request("badblocks")
        wait_for_end(mount.pid)
        events = [json.loads(line) for line in (mount.device / "events.jsonl").read_bytes().splitlines()]
        (stalled,) = [e for e in events if e["event"] == "LoopStalled"]
        assert stalled["step"] == "stand_still"
        assert "_handle" in stalled["task"]
        clear_away(mount.path)
