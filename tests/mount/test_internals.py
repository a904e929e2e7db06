"""The state of a supervisor: on request, and in its log on SIGUSR1."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.support.mount import DaxMount

pytestmark = pytest.mark.mount


def test_status_internals_names_tasks_and_layouts(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 4)
    assert file.read_bytes()
    found = dax_mount.json("status", dax_mount.path, "--internals")
    names = "\n".join(found["tasks"])
    for task in ("daxemu.host.watchdog.Watchdog.beat", "ControlSocket"):
        assert task in names
    assert (found["turns"], found["held"], found["armed"]) == ([], [], [])
    assert found["layouts"] >= 1
    shown = dax_mount.run("status", dax_mount.path, "--internals").splitlines()
    assert shown[-1] == f"layouts out: {found['layouts']} files"
    assert "daxemu status MOUNTPOINT" in dax_mount.run("status", "--internals", status=2)


def test_sigusr1_writes_it_into_the_log(dax_mount: DaxMount) -> None:
    with dax_mount.client() as client:
        os.kill(client.pid, signal.SIGUSR1)
        # The signal is handled by a task of the event loop: a request later that is done, or soon will be.
        log = dax_mount.device / "supervisor.log"
        while "layouts out" not in log.read_text():
            assert json.dumps(client.request("status"))
    assert "internals: tasks: " in log.read_text()
