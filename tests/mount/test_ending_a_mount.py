"""A mount can always be ended: the processes that pin the mount are named, and --force needs no help of the
supervisor.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest
from click.testing import CliRunner

from daxemu.cli.mount import FORCE_PATIENCE, umount
from daxemu.client.connection import state_of
from daxemu.errors import Busy, DaxemuError
from daxemu.host.fuse.session import _mount_as_root, abort_connection
from daxemu.host.proc.mountinfo import Mount, mount_at, mount_of
from daxemu.host.proc.pins import pins_of
from tests.support.forwarded import eventually
from tests.support.mount import DAXEMU, PATIENCE, DaxMount
from tests.support.quick import quick_mount_at
from tests.support.zygote import Zygote, wait_for_end

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount namespace"),
]


@contextmanager
def namespace_with_a_copy(kept: Path) -> Iterator[int]:
    """Start a process in a separate mount namespace, with a copy of the mount ``kept``; return the pid.

    The copies of other daxemu mounts go: tests beside this one unmount these.
    """
    others = f"""awk '$3 == "fuse.daxemu" && $2 != "{kept}" {{ print $2 }}' /proc/mounts"""
    ready = f'{others} | while read -r path; do umount -l "$path" 2>&-; done; echo; exec cat'
    process = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", ready],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(PATIENCE)
        process.stdout.close()


def test_processes_that_pin_an_unmounted_device_are_named_and_force_cuts_it(dax_mount: DaxMount) -> None:
    (dax_mount.path / "f").write_bytes(b"kept")
    with namespace_with_a_copy(dax_mount.path) as pid:
        said = dax_mount.run("umount", dax_mount.path, status=4)
        assert f"pid {pid} " in said
        listed = {each["device"]: each for each in dax_mount.json("status")}
        assert listed[str(dax_mount.device)]["state"] == "elsewhere"
        assert f"pid {pid} " in dax_mount.run("umount", dax_mount.device, status=4)
        assert f"pid {pid} " in dax_mount.run("mount", dax_mount.device, dax_mount.path, status=4)
        dax_mount.run("umount", "--force", dax_mount.device)
        dax_mount.mount()
        assert (dax_mount.path / "f").read_bytes() == b"kept"


def test_force_ends_a_mount_that_is_pinned(dax_mount: DaxMount) -> None:
    (dax_mount.path / "f").write_bytes(b"kept")
    with namespace_with_a_copy(dax_mount.path):
        dax_mount.umount("--force")
        dax_mount.mount()
        assert (dax_mount.path / "f").read_bytes() == b"kept"


def test_a_mount_has_no_pins_but_copies(dax_mount: DaxMount) -> None:
    with dax_mount.client() as client, namespace_with_a_copy(dax_mount.path) as pid:
        assert pid in [pin.pid for pin in pins_of(client.mount)]


def test_a_stopped_supervisor_holds_up_no_verb(dax_mount: DaxMount) -> None:
    (dax_mount.path / "f").write_bytes(b"kept")
    with dax_mount.client() as client:
        pid = client.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        verbs = ("status", "damaged", "inject", "settle", "umount")
        with ThreadPoolExecutor() as threads:  # each waits for its whole patience
            every = threads.submit(_status)
            for said in threads.map(lambda verb: dax_mount.run(verb, dax_mount.path, status=4), verbs):
                assert f"kill -CONT {pid}" in said
        states = {each["mountpoint"]: each["state"] for each in json.loads(every.result())}
        assert states[str(dax_mount.path)] == "dead"
        dax_mount.umount("--force")
        assert state_of(pid) in ("", "Z")
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    dax_mount.mount()
    assert (dax_mount.path / "f").read_bytes() == b"kept"


@pytest.mark.parametrize("how", ["C", "D"])
def test_force_ends_a_supervisor_that_is_stuck(tmp_path: Path, zygote: Zygote, how: str) -> None:
    with quick_mount_at(tmp_path, zygote, mount=False) as mount:
        mark = tmp_path / "stuck"
        mount.mount("stick_in_badblocks", how, str(mark))
        with (mount.path / "f").open("wb") as file:
            file.write(b"kept")
            file.flush()
            os.fsync(file.fileno())
        with mount.client() as client, ThreadPoolExecutor() as threads:
            asking = threads.submit(client.request, "badblocks")
            assert eventually(mark.exists)
            mount.run("umount", "--force", mount.path)
            assert isinstance(asking.exception(), DaxemuError)
        wait_for_end(mount.pid)
        assert not mount.path.is_mount()
        mount.mount()
        assert (mount.path / "f").read_bytes() == b"kept"


@pytest.mark.parametrize("use", ["its working directory", "thousands of open files"])
def test_force_ends_a_mount_that_a_process_uses(dax_mount: DaxMount, use: str) -> None:
    (dax_mount.path / "f").write_bytes(b"kept")
    code = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)); "
        "files = [os.open(sys.argv[1], os.O_RDWR) for _ in range(int(sys.argv[2]))]; "
        "print(flush=True); input()"
    )
    count, cwd = (3000, Path("/")) if "files" in use else (0, dax_mount.path)
    process = subprocess.Popen(
        [sys.executable, "-c", code, dax_mount.path / "f", str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=cwd,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        assert "in use" in dax_mount.run("umount", dax_mount.path, status=4)
        dax_mount.umount("--force")
        assert not dax_mount.path.is_mount()
        assert process.poll() is None
        dax_mount.mount()
        assert (dax_mount.path / "f").read_bytes() == b"kept"
    finally:
        process.kill()
        process.communicate()


class FakeTime:
    """Clock moved only by waiting: every wait takes the full timeout."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def select(self, *arguments: Any) -> tuple[list[int], list[int], list[int]]:
        self.now += arguments[3]
        return [], [], []


class SlowClient:
    """Client of a supervisor that uses the full time limit of the steps in ``slow``, and fails in the step
    ``fails``.
    """

    time: FakeTime
    fails: str
    slow: tuple[str, ...] = ("connect", "status", "unmount")

    def __init__(self, mount: Mount, *, patience: float) -> None:
        self.pid = 0
        self.set_patience(patience)
        self._step("connect")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def set_patience(self, seconds: float) -> None:
        self._patience = seconds

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        self._step(op)
        return {"pid": os.getpid()}

    def _step(self, name: str) -> None:
        if name == self.fails:
            self.time.now += self._patience
            raise Busy(name)
        self.time.now += self._patience / 2


@pytest.mark.parametrize("fails", ["connect", "status", "unmount", "end"])
def test_force_has_one_deadline_for_all_of_its_steps(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait takes the full time limit: the last wait ends at the deadline, not after."""
    clock = FakeTime()
    mount = Mount(Path("/mnt"), Path("/device"), (0, 999), os.geteuid())
    sent: list[int] = []
    client = type("Client", (SlowClient,), {"time": clock, "fails": fails})
    for module in ("cli.mount", "host.deadline"):
        monkeypatch.setattr(f"daxemu.{module}.time", clock)
    for module in ("cli.mount", "host.proc.device_lock"):
        monkeypatch.setattr(f"daxemu.{module}.select", clock)
    monkeypatch.setattr("daxemu.cli.mount.Client", client)
    monkeypatch.setattr("daxemu.cli.mount.mount_at", lambda path: mount)
    monkeypatch.setattr("daxemu.cli.mount.pins_of", lambda mount: [])
    monkeypatch.setattr("daxemu.host.fuse.session.abort_connection", lambda mount: True)
    monkeypatch.setattr("daxemu.host.fuse.session.Session.detach", lambda session: None)
    monkeypatch.setattr("daxemu.host.proc.device_lock.holder_of", lambda device: os.getpid())
    monkeypatch.setattr(
        "daxemu.host.proc.device_lock.signal.pidfd_send_signal", lambda process, number: sent.append(number)
    )
    done = CliRunner().invoke(umount, ["/mnt", "--force"])
    assert isinstance(done.exception, Busy)
    assert "does not end" in str(done.exception)
    assert sent == [signal.SIGTERM, signal.SIGCONT, signal.SIGKILL]
    assert clock.now == pytest.approx(1000 + FORCE_PATIENCE)
    assert FORCE_PATIENCE == 10


def test_force_ends_in_time_where_the_device_itself_hangs(tmp_path: Path) -> None:
    """A filesystem that answers no request is mounted over the device: no lookup of its lock ends."""
    place = tmp_path / "place"
    mount = DaxMount(place / "device", tmp_path / "mnt")
    for directory in (place, mount.path):
        directory.mkdir()
    mount.run("mkfs", mount.device, "--size", "64M")
    mount.mount()
    pid = mount.client().request("status")["pid"]
    os.kill(pid, signal.SIGSTOP)
    silent = _mount_as_root("silent", place)
    try:
        command = [*DAXEMU, "umount", "--force", str(mount.path)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=2 * FORCE_PATIENCE, check=False
        )
    finally:
        os.close(silent)
        subprocess.run(["umount", "-l", place], check=True)
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 4, done
    assert "does not answer" in done.stderr
    assert mount_at(mount.path) is None
    wait_for_end(pid)


def test_only_the_mount_itself_is_cut_not_the_next_with_its_number(
    dax_mount: DaxMount, tmp_path: Path, zygote: Zygote
) -> None:
    """The kernel gives the device number of an ended mount to the next mount."""
    (tmp_path / "other").mkdir()
    with quick_mount_at(tmp_path / "other", zygote) as other:
        (other.path / "f").write_bytes(b"kept")
        ended, there = mount_of(dax_mount.path), mount_of(other.path)
        dax_mount.umount()
        assert not abort_connection(ended._replace(dev=there.dev))
        assert not abort_connection(ended._replace(dev=there.dev, id=there.id))
        assert (other.path / "f").read_bytes() == b"kept"
        assert abort_connection(there)
        with pytest.raises(OSError, match="not connected"):
            os.listdir(other.path)
        other.sound = False


def _status() -> bytes:
    done = subprocess.run([*DAXEMU, "status", "--json"], capture_output=True, timeout=PATIENCE, check=True)
    return done.stdout
