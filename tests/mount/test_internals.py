"""The state of a supervisor: on request, and in its log on SIGUSR1."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

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
    assert "    tasks: " in log.read_text()


def test_the_tracer_writes_to_the_new_log_after_a_rotation(dax_mount: DaxMount) -> None:
    log, rotated = dax_mount.device / "supervisor.log", dax_mount.device / "supervisor.log.1"
    dax_mount.run("set", dax_mount.path, "log_size=1M")
    with log.open("ab") as file:
        file.write(b"of before\n" * 60_000)
    with dax_mount.client() as client:
        os.kill(client.pid, signal.SIGUSR1)
        while not rotated.exists() or not log.exists():
            client.request("status")
        stderr = os.open(f"/proc/{_tracer_of(client.pid)}/fd/2", os.O_WRONLY)
        os.write(stderr, b"words of the tracer\n")
        os.close(stderr)
        while "words of the tracer" not in log.read_text():
            client.request("status")
    assert "words of the tracer" not in rotated.read_text()


def _tracer_of(supervisor: int) -> int:
    """The child process of a supervisor that is its tracer."""
    children = [
        int(pid)
        for task in Path(f"/proc/{supervisor}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    (found,) = [pid for pid in children if b"daxemu.host.tracer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found
