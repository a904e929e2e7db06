"""Findings of daxemu doctor: on this machine, and on a machine without required parts."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from daxemu.errors import Busy, NotMounted, Unsupported
from daxemu.host import checkup, direct_needs
from daxemu.host.checkup import Finding
from daxemu.host.direct import userfaultfd
from daxemu.host.proc.mountinfo import Mount
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.proc.processes import capable
from daxemu.uapi import CAP_SYS_PTRACE
from tests.support.elsewhere import NOBODY, daxemu_as_user
from tests.support.mount import DaxMount, daxemu

Patch = pytest.MonkeyPatch


def found(check: Callable[[], Finding]) -> tuple[str, str, str]:
    finding = check()
    assert finding.verdict == "ok" or finding.mend
    return finding.verdict, finding.found, finding.mend


@pytest.mark.mount
def test_this_machine(dax_mount: DaxMount) -> None:
    shown = json.loads(daxemu("doctor", "--json"))["findings"]
    verdicts = {finding["subject"]: finding["verdict"] for finding in shown}
    wanted = [
        "FUSE",
        "mounting",
        "pyfuse3",
        "supplement",
        "victims",
        "ptrace",
        "fusectl",
        "kernel",
        "pagemap",
        "seccomp",
        "direct mappings",
        "mounts",
    ]
    assert set(wanted) <= set(verdicts)
    assert {verdicts[subject] for subject in ("FUSE", "mounting", "pyfuse3", "supplement")} == {"ok"}
    assert all(finding["mend"] for finding in shown if finding["verdict"] != "ok")


@pytest.mark.mount
def test_a_mount_whose_supervisor_is_dead(dax_mount: DaxMount) -> None:
    pid = dax_mount.json("status", dax_mount.path)["pid"]
    os.kill(pid, 9)
    shown = daxemu("doctor")
    assert f"worse   mounts: {dax_mount.path}: its supervisor is dead" in shown
    assert f"        fix: daxemu umount --force {dax_mount.path}" in shown


@pytest.mark.mount
def test_another_user_who_may_not_open_fuse(dax_mount: DaxMount) -> None:
    """Each finding other than ok names the command to run, on any machine."""
    command = [*NOBODY, *daxemu_as_user(), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode in (0, 8), done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert all(finding["mend"] for finding in findings if finding["verdict"] != "ok")
    (mounting,) = [finding for finding in findings if finding["subject"] == "mounting"]
    assert "fusermount3" in mounting["found"]
    assert not any(str(dax_mount.path) in finding["found"] for finding in findings)


def test_no_dev_fuse(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkup, "FUSE", tmp_path / "fuse")
    assert found(checkup._fuse)[0] == "missing"
    assert "modprobe fuse" in found(checkup._fuse)[2]
    assert "--device /dev/fuse" in found(checkup._fuse)[2]


@pytest.mark.parametrize(("mode", "verdict"), [(0o600, "worse"), (0o660, "worse"), (0o666, "ok")])
def test_a_node_that_is_roots_alone(tmp_path: Path, monkeypatch: Patch, mode: int, verdict: str) -> None:
    (tmp_path / "fuse").touch()
    (tmp_path / "fuse").chmod(mode)
    monkeypatch.setattr(checkup, "FUSE", tmp_path / "fuse")
    seen, says, mend = found(checkup._fuse_of_users)
    assert (seen, f"is {mode:04o}" in says) == (verdict, True)
    assert verdict == "ok" or mend.startswith("chmod 0666 /dev/fuse; docs/howto/without-root.md")


def test_root_without_the_right_to_mount(monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkup, "capable", lambda tid, capability: False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found(checkup._mounting)[2] == "in a container: --cap-add SYS_ADMIN"


def test_a_user_and_fusermount3(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(checkup._mounting) == ("missing", "no fusermount3", "apt-get install fuse3")
    helper = tmp_path / "fusermount3"
    helper.write_text("#!/bin/sh\n")
    helper.chmod(0o755)
    assert found(checkup._mounting)[2] == f"chmod u+s {helper} (as root)"
    helper.chmod(0o755 | stat.S_ISUID)
    assert found(checkup._mounting)[0] == "ok"


@pytest.mark.parametrize(
    ("scope", "capable", "verdict"),
    [("0", False, "ok"), ("1", True, "ok"), ("2", True, "ok"), ("1", False, "worse"), ("3", True, "worse")],
)
def test_ptrace_scope(tmp_path: Path, monkeypatch: Patch, scope: str, capable: bool, verdict: str) -> None:
    (tmp_path / "scope").write_text(f"{scope}\n")
    monkeypatch.setattr(checkup, "PTRACE_SCOPE", tmp_path / "scope")
    monkeypatch.setattr(checkup, "capable", lambda tid, capability: capable)
    assert found(checkup._tracing)[0] == verdict


def test_shared_memory(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkup, "SHARED", tmp_path / "nothing")
    assert found(checkup._shared_memory)[0] == "worse"
    monkeypatch.setattr(checkup, "SHARED", tmp_path)
    assert found(checkup._shared_memory)[0] == "ok"
    monkeypatch.setattr(checkup, "MIN_SHARED", 1 << 60)
    assert "--shm-size" in found(checkup._shared_memory)[2]


def test_no_fusectl(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(checkup, "CONNECTIONS", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert found(checkup._abort)[2] == f"mount -t fusectl none {tmp_path} (as root)"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found(checkup._abort)[0] == "ok"


@pytest.mark.parametrize(
    ("release", "machine", "verdict"),
    [("6.18.1-x", "x86_64", "ok"), ("5.10.0-28-amd64", "x86_64", "worse"), ("6.1.0", "aarch64", "worse")],
)
def test_kernel(monkeypatch: Patch, release: str, machine: str, verdict: str) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert found(checkup._kernel)[0] == verdict


def test_no_pagemap_scan(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Pagemap, "can_scan", lambda self: False)
    assert found(checkup._presence)[0] == "worse"


def test_what_cannot_be_imported_or_run(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert found(checkup._pyfuse3)[0] == "missing"
    assert found(checkup._seccomp)[0] == "worse"


def test_no_supplement(monkeypatch: Patch) -> None:
    monkeypatch.setattr("daxemu.host.fuse.supplement.MISSING", "it was not built")
    assert found(checkup._supplement)[1].startswith("it was not built: ")


def test_no_victims(monkeypatch: Patch) -> None:
    monkeypatch.setattr("daxemu.host.victims.MISSING", "it was not built")
    assert found(checkup._victims)[1].startswith("it was not built: ")


def test_stale_mounts(monkeypatch: Patch) -> None:
    all_of_them = [Mount(Path(name), Path("/d"), (0, 1)) for name in ("/good", "/dead", "/hangs")]
    monkeypatch.setattr(checkup, "mounts", lambda: all_of_them)

    def ask(mount: Mount) -> None:
        if mount.mountpoint == Path("/dead"):
            raise NotMounted
        if mount.mountpoint == Path("/hangs"):
            raise Busy

    findings = list(checkup._stale(ask))
    assert [finding.mend for finding in findings] == [
        "daxemu umount --force /dead",
        "daxemu umount --force /hangs",
    ]
    assert [finding.verdict for finding in checkup._stale(lambda mount: None)] == ["ok"]


def ready() -> Finding:
    return Finding("seccomp", "ok", "user notification works")


def test_direct_mappings_without_a_right_a_machine_or_a_kernel(monkeypatch: Patch) -> None:
    """Each missing need is named, with its own fix."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(direct_needs, "capable", lambda *_: True)
    monkeypatch.setattr(userfaultfd, "missing", list)
    assert found(lambda: checkup._direct(ready()))[0] == "ok"

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(userfaultfd, "missing", lambda: ["UFFD_FEATURE_POISON", "UFFD_FEATURE_EVENT_FORK"])
    verdict, what, mend = found(lambda: checkup._direct(ready()))
    assert verdict == "worse"
    assert "not on aarch64" in what
    assert "lacks UFFD_FEATURE_POISON, UFFD_FEATURE_EVENT_FORK" in what
    assert mend == "use x86_64; use Linux 6.6"
    with pytest.raises(Unsupported, match="aarch64"):
        direct_needs.check_direct()

    monkeypatch.setattr(direct_needs, "capable", lambda *_: False)
    assert "CAP_SYS_PTRACE" in found(lambda: checkup._direct(ready()))[1]


def test_direct_mappings_on_a_kernel_without_userfaultfd(monkeypatch: Patch) -> None:
    def refuse() -> list[str]:
        raise Unsupported("userfaultfd: not in this kernel (CONFIG_USERFAULTFD)")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(direct_needs, "capable", lambda *_: True)
    monkeypatch.setattr(userfaultfd, "missing", refuse)
    assert "not in this kernel" in found(lambda: checkup._direct(ready()))[1]
    with pytest.raises(Unsupported, match="CONFIG_USERFAULTFD"):
        direct_needs.check_direct()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_direct_mappings_are_roots_alone() -> None:
    """Another user has none, with CAP_SYS_PTRACE."""
    pid = os.fork()
    if not pid:
        libc = ctypes.CDLL(None)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setresuid(65534, 65534, 65534)
        own = 1 << CAP_SYS_PTRACE
        libc.capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", own, own, 0, 0, 0, 0))
        try:
            assert capable("self", CAP_SYS_PTRACE)
            direct_needs.check_direct()
        except Unsupported as refused:
            os._exit(0 if "root's, also where uid 65534" in str(refused) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_direct_mappings_without_user_notification(monkeypatch: Patch) -> None:
    monkeypatch.setattr(direct_needs, "missing", lambda: iter(()))
    without = Finding("seccomp", "worse", "no user notification", "use Linux 5.19")
    verdict, what, mend = found(lambda: checkup._direct(without))
    assert (verdict, mend) == ("worse", "use Linux 5.19")
    assert "daxemu run" in what
