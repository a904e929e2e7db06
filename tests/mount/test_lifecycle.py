"""Begin and end of a mount: in the foreground, by signals, by umount(8), by force, after a crash, without
root.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import daxemu as package
from daxemu.cli import mount as mount_verbs
from daxemu.cli.main import main
from daxemu.errors import Busy
from daxemu.host.proc import device_lock
from daxemu.host.proc.mountinfo import mount_at
from tests.support.actor import Actor
from tests.support.mount import DAXEMU, PATIENCE, DaxMount, clear_away, dax_mount_at, daxemu
from tests.support.own_node import fuse_for_everybody

pytestmark = pytest.mark.mount


@contextmanager
def foreground(made: DaxMount) -> Iterator[subprocess.Popen[str]]:
    """``daxemu mount --foreground``, usable."""
    argv = [*DAXEMU, "mount", "--foreground", str(made.device), str(made.path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "is mounted on" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unmounts_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    with dax_mount_at(tmp_path, mount=False) as made:
        with foreground(made) as process, Actor.spawn("p0", cwd=made.path) as actor:
            made.make_file("f", 4)
            for command in ("open 0 f rw", "mmap 0 0 0 4 shared", "tw 0 2 z"):
                actor.cmd(command)
            process.send_signal(number)
            assert process.wait(PATIENCE) == 0
            assert mount_at(made.path) is None
        made.mount()
        data = (made.path / "f").read_bytes()
        assert data[2 * 4096 : 2 * 4096 + 1] == b"z", (
            "a store that was not synced is lost although we had time"
        )
        assert data[: 2 * 4096] == b"A" * 4096 + b"B" * 4096


def test_umount_ends_a_supervisor_in_the_foreground(tmp_path: Path) -> None:
    with dax_mount_at(tmp_path, mount=False) as made, foreground(made) as process:
        made.umount()
        assert process.wait(PATIENCE) == 0


def test_umount_8_saves_too(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 2)
    pid = dax_mount.json("status", dax_mount.path)["pid"]
    handle = os.pidfd_open(pid)
    subprocess.run(["umount", dax_mount.path], check=True, timeout=PATIENCE)
    _wait_for_end(handle)
    dax_mount.mount()
    assert (dax_mount.path / "f").read_bytes() == b"A" * 4096 + b"B" * 4096


@pytest.mark.parametrize("verb", ["mount", "fsck", "mkfs"])
def test_after_umount_8_the_device_is_waited_for(
    dax_mount: DaxMount, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """umount(8) returns before the supervisor has saved: here before saving has even begun."""
    dax_mount.make_file("f", 2)
    pid = dax_mount.json("status", dax_mount.path)["pid"]
    os.kill(pid, signal.SIGSTOP)
    libc = ctypes.CDLL(None, use_errno=True)  # umount(8) itself would ask the supervisor for attributes
    assert libc.umount2(os.fsencode(dax_mount.path), 0) == 0, os.strerror(ctypes.get_errno())
    wait, waited_for = device_lock._wait, []

    def go_on_and_wait(holder: int) -> None:
        os.kill(pid, signal.SIGCONT)
        waited_for.append(holder)
        wait(holder)

    monkeypatch.setattr(device_lock, "_wait", go_on_and_wait)
    more = {"mount": [str(dax_mount.path)], "fsck": [], "mkfs": ["--size", "64M", "--force"]}[verb]
    done = CliRunner().invoke(main, [verb, str(dax_mount.device), *more])
    assert done.exit_code == 0, done.output
    assert waited_for == [pid]


def _wait_for_end(handle: int) -> None:
    ended, _, _ = select.select([handle], [], [], PATIENCE)
    os.close(handle)
    assert ended, "the supervisor lives on"


def test_umount_of_a_mount_in_use(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 1)
    with open(file, "rb") as opened:
        assert "in use" in dax_mount.run("umount", dax_mount.path, status=4)
        assert opened.read() == b"A" * 4096
        dax_mount.umount("--force")
        with pytest.raises(OSError, match=r"not connected|abort"):
            os.fsync(opened.fileno())  # cached pages could still be read
    assert mount_at(dax_mount.path) is None
    dax_mount.mount()
    assert file.read_bytes() == b"A" * 4096


def test_after_kill_9_of_the_supervisor(dax_mount: DaxMount) -> None:
    pid = dax_mount.json("status", dax_mount.path)["pid"]
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    _wait_for_end(handle)
    reports = {r["mountpoint"]: r["state"] for r in json.loads(daxemu("status", "--json"))}
    assert reports[str(dax_mount.path)] == "dead"
    assert "umount" in dax_mount.run("status", dax_mount.path, status=3)
    dax_mount.umount()
    assert mount_at(dax_mount.path) is None
    dax_mount.mount()
    (dax_mount.path / "usable").touch()


def test_log_follows_until_the_end(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 1)
    with subprocess.Popen(
        [*DAXEMU, "log", "-f", dax_mount.path], stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        assert "mounted" in follower.stdout.readline()
        dax_mount.inject("f", (0, 4096))
        assert "poison" in follower.stdout.readline()
        dax_mount.umount()
        rest = follower.stdout.read()
        assert follower.wait(PATIENCE) == 0
    assert "Recovered" in rest
    assert "unmounted" in dax_mount.run("log", dax_mount.device)


def test_log_ends_quietly_when_its_reader_ends(dax_mount: DaxMount) -> None:
    script = f"{sys.executable} -m daxemu log {dax_mount.path} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_without_root(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The whole way as an ordinary user: mount, AO, AR, umount."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None or shutil.which("fusermount3") is None:
        pytest.skip("needs /usr/bin/python3 and fusermount3")
    version = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
    )
    if version.stdout.strip() != str(sys.version_info[:2]):
        pytest.skip("/usr/bin/python3 is of another version than the tests' and cannot use their packages")
    home = Path("/dev/shm") / f"daxemu-user-{os.getpid()}"
    home.mkdir(mode=0o755)
    os.chown(home, 65534, 65534)
    site = Path(os.path.realpath(pytest.__file__)).parents[1]
    paths = f"{Path(package.__file__).parents[1]}:{site}"
    user = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "env",
        f"HOME={home}",
        f"PYTHONPATH={paths}",
    )

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [*user, python, "-m", "daxemu", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd="/",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    mountpoint = home / "mnt"
    try:
        with fuse_for_everybody():
            run("mkfs", home / "dev", "--size", "64M")
            subprocess.run([*user, "mkdir", mountpoint], check=True)
            run("mount", home / "dev", mountpoint)
            with Actor.spawn("p0", cwd=home, wrapper=user) as actor:
                actor.cmd("mcekill early")
                actor.cmd("open 0 mnt/f creat")
                actor.cmd("pwrite 0 0 32768 k")
                actor.cmd("mmap 0 0 0 8 shared")
                actor.cmd("tr 0 3")
                run("inject", mountpoint / "f", "--offset", "12K")
                told = actor.wait_signal()
                assert (told.code, told.addr, told.lsb) == ("BUS_MCEERR_AO", "m0+0x3000", 12)
                assert actor.cmd("tr 0 3").faulted
                consumed = actor.wait_signal()
                assert (consumed.code, consumed.addr, consumed.lsb) == ("BUS_MCEERR_AR", "m0+0x3000", 12)
            run("umount", mountpoint)
    finally:
        clear_away(mountpoint)
        shutil.rmtree(home, ignore_errors=True)


def test_a_hanging_supervisor_delays_no_other_command(
    dax_mount: DaxMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped supervisor answers no request: status shows the other mounts, umount --force ends the stopped
    one.
    """
    monkeypatch.setattr(mount_verbs, "STATUS_PATIENCE", 0.2)
    monkeypatch.setattr(mount_verbs, "PATIENCE", 0.5)
    pid = dax_mount.json("status", dax_mount.path)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        run = CliRunner()
        shown = json.loads(run.invoke(mount_verbs.status, ["--json"]).stdout)
        states = {report["mountpoint"]: report["state"] for report in shown}
        assert states[str(dax_mount.path)] == "dead"
        refused = run.invoke(mount_verbs.umount, [str(dax_mount.path)])
        assert isinstance(refused.exception, Busy)
        assert mount_at(dax_mount.path) is not None
        assert run.invoke(mount_verbs.umount, ["--force", str(dax_mount.path)]).exit_code == 0
        assert mount_at(dax_mount.path) is None
    finally:
        os.kill(pid, signal.SIGCONT)
