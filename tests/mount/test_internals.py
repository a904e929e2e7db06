"""Internal state of a supervisor: on request, and in its log on SIGUSR1."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxemu.internals_report import InternalsReport
from daxemu.protocol import Inject, Internals, Reflink
from tests.support.mount import DaxMount
from tests.support.quick import quick_mount_at
from tests.support.zygote import Zygote

pytestmark = pytest.mark.mount


def test_status_internals_names_tasks_and_layouts(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 4)
    assert file.read_bytes()
    found = dax_mount.json("status", dax_mount.path, "--internals")
    names = "\n".join(found["tasks"])
    for task in ("daxemu.host.fuse.watchdog.Watchdog.beat", "ControlSocket"):
        assert task in names
    assert (found["turns"], found["held"], found["armed"]) == ([], [], [])
    assert found["layouts"] >= 1
    shown = dax_mount.run("status", dax_mount.path, "--internals").splitlines()
    assert shown[-1] == f"layouts out: {found['layouts']} files"
    assert "daxemu status MOUNTPOINT" in dax_mount.run("status", "--internals", status=2)


def test_sigusr1_writes_it_into_the_log(dax_mount: DaxMount) -> None:
    with dax_mount.client() as client:
        os.kill(client.pid, signal.SIGUSR1)
        # A task of the event loop handles the signal: after a further request the report is written soon.
        log = dax_mount.device / "supervisor.log"
        while "layouts out" not in log.read_text():
            assert json.dumps(client.request("status"))
    assert "    tasks: " in log.read_text()


@contextmanager
def stopped_mapper(file: Path) -> Iterator[int]:
    """Start a process in SIGSTOP with the first page of a file present; return the pid."""
    code = (
        "import mmap, os, signal, sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=1); m[0]; "
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, file], cwd="/")
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def look_until(mount: DaxMount, *titles: str) -> InternalsReport:
    """Return the report, once each of the named lists has an entry."""
    with mount.client() as client:
        while True:
            found = client.ask(Internals())
            if all(getattr(found, title) for title in titles):
                return found


def logged(mount: DaxMount, report: InternalsReport) -> None:
    """SIGUSR1 writes the same into the log, but for the places of tasks."""
    wanted = report.lines()[1 + len(report.tasks) :]
    with mount.client() as client:
        os.kill(client.pid, signal.SIGUSR1)
        log = mount.device / "supervisor.log"
        while "layouts out" not in log.read_text():
            client.request("status")
    lines = log.read_text().splitlines()
    assert f"    {report.lines()[0].partition(':')[0]}: " in "\n".join(lines)
    assert [line.removeprefix("    ") for line in lines[-len(wanted) :]] == wanted


def test_a_failure_under_way_a_pending_signal_and_a_layout(tmp_path: Path, zygote: Zygote) -> None:
    signs = tmp_path / "signs"
    signs.mkdir()
    (signs / "stopped").touch()  # not at the first failure
    with quick_mount_at(tmp_path, zygote, mount=False) as mount:
        mount.mount("stop_in_failure", str(signs), "before")
        mount.run("set", mount.path, "early_kill=1")
        victim, file, other = (mount.make_file(name, 4) for name in ("victim", "f", "other"))
        with stopped_mapper(victim) as pid, mount.client() as first, mount.client() as second:
            first.ask(Inject([(0, 4096)], ino=victim.stat().st_ino))
            (signs / "stopped").unlink()
            ino = file.stat().st_ino
            with ThreadPoolExecutor() as threads:
                try:
                    stopped = threads.submit(first.ask, Inject([(0, 4096)], ino=ino))
                    look_until(mount, "turns")
                    waiting = threads.submit(second.ask, Inject([(8192, 4096)], ino=ino))
                    while len(found := look_until(mount, "turns", "armed").turns) < 2:
                        pass
                    other.read_bytes()
                    report = look_until(mount, "turns", "armed")
                    assert [turn.partition(": ")[2] for turn in found] == [
                        "collects and unmaps",
                        "waits for mf_mutex",
                    ]
                    assert report.armed[0].endswith(f"thread {pid}")
                    assert report.layouts >= 1
                    logged(mount, report)
                finally:
                    (signs / "go").touch()
                stopped.result()
                waiting.result()
            assert first.settle() >= 0
            report = first.ask(Internals())
            assert report.turns == []


def test_a_request_that_waits_for_a_clone(tmp_path: Path, zygote: Zygote) -> None:
    signs = tmp_path / "signs"
    signs.mkdir()
    with quick_mount_at(tmp_path, zygote, mount=False) as mount:
        mount.mount("wait_in_clone", str(signs))
        source, target = mount.make_file("source", 4), mount.make_file("target", 4)
        ino = target.stat().st_ino
        with mount.client() as client, mount.client() as cloning, ThreadPoolExecutor() as threads:
            try:
                clone = threads.submit(cloning.ask, Reflink(source.stat().st_ino, ino))
                while not (signs / "stopped").exists():
                    client.request("status")
                reading = threads.submit(target.read_bytes)
                report = look_until(mount, "held")
                assert report.held == [f"read of inode {ino}, bytes 0x0+0x4000"]
                logged(mount, report)
            finally:
                (signs / "go").touch()
            clone.result()
            assert reading.result() == source.read_bytes()
            assert client.ask(Internals()).held == []


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
    """Return the tracer among the child processes of a supervisor."""
    children = [
        int(pid)
        for task in Path(f"/proc/{supervisor}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    (found,) = [
        pid for pid in children if b"daxemu.host.tracer.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found
