"""A forked command, and its supervisor, cannot be told from those that start a Python of their own."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from pathlib import Path

import pytest

from tests.support import mount, zygote
from tests.support.mount import DAXEMU, PATIENCE, DaxMount, dax_mount_at
from tests.support.zygote import Zygote, forking_zygote, shared_zygote

COMMANDS = (
    ["--version"],
    ["mkfs", "--help"],
    ["mkfs"],
    ["mkfs", "DEVICE", "--size", "1Q"],
    ["status", "DEVICE"],
    ["fsck", "/nonexistent"],
    ["no-such-verb"],
)
STATUS = ("SigBlk", "SigIgn", "SigCgt", "Umask", "Seccomp", "NoNewPrivs")


def executed(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*DAXEMU, *arguments], capture_output=True, timeout=PATIENCE)


def forked(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return shared_zygote().daxemu(arguments, PATIENCE)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_has_the_same_status_and_output(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    once, again = executed(*arguments), forked(*arguments)
    assert (again.returncode, again.stdout, again.stderr) == (once.returncode, once.stdout, once.stderr)


def test_a_command_has_the_working_directory_the_umask_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    before = os.umask(0o027)
    try:
        assert forked("mkfs", "d", "--size", "16M").returncode == 0
        assert forked("mkfs", "--help").stdout == executed("mkfs", "--help").stdout
    finally:
        os.umask(before)
    assert (tmp_path / "d" / "device.toml").is_file()


def descriptors(pid: int) -> list[str]:
    """Return the kinds of the open descriptors, once the last connection has come or gone."""
    looks: deque[list[str]] = deque(maxlen=5)
    deadline = time.monotonic() + PATIENCE
    while len(looks) < 5 or any(look != looks[0] for look in looks):
        assert time.monotonic() < deadline, looks
        try:
            links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except FileNotFoundError:  # closed between listing and readlink(2)
            continue
        looks.append(sorted(link.partition(":[")[0] for link in links))
        time.sleep(0.02)
    return looks[0]


def process(pid: int) -> dict[str, object]:
    """Return what a supervisor inherits, or opens."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    return {
        **{name: fields[name] for name in STATUS},
        "descriptors": descriptors(pid),
        "cwd": Path(f"/proc/{pid}/cwd").readlink(),
        "leads its session": os.getsid(pid) == pid,
        "limits": Path(f"/proc/{pid}/limits").read_text(),
    }


@pytest.mark.mount
def test_a_supervisor_has_the_same_descriptors_signals_and_limits(tmp_path: Path) -> None:
    found = []
    with dax_mount_at(tmp_path, "16M", mount=False) as made:
        for run in (executed, forked):
            assert run("mount", str(made.device), str(made.path)).returncode == 0
            with made.client() as client:
                pid = client.pid
            found.append(process(pid))
            made.umount()
    assert found[0] == found[1]


def test_the_end_of_a_command_is_not_awaited_for_ever(tmp_path: Path) -> None:
    fifo = tmp_path / "plan.toml"
    os.mkfifo(fifo)
    with pytest.raises(subprocess.TimeoutExpired):
        shared_zygote().daxemu(["evaluate", str(fifo), "-o", str(tmp_path / "r")], 0.1)


def test_where_a_new_python_would_start_differently_a_command_starts_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert zygote._read_at_start() == zygote._AT_FIRST  # otherwise another test has left something behind
    assert forking_zygote() is shared_zygote()
    monkeypatch.setenv("DAXEMU_VICTIMS", "python")
    assert forking_zygote() is None
    monkeypatch.setattr(Zygote, "daxemu", None)  # not callable: a fork would be an error
    assert "daxemu, version" in mount.daxemu("--version")


def test_no_zygote_starts_in_a_changed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "_shared", [])
    monkeypatch.setenv("DAXEMU_VICTIMS", "python")
    assert forking_zygote() is None
    assert zygote._shared == []


@pytest.mark.mount
def test_a_mount_of_the_fixture_is_forked(dax_mount: DaxMount) -> None:
    with dax_mount.client() as client:
        command = Path(f"/proc/{client.pid}/cmdline").read_text()
    assert "tests.support.zygote" in command
