"""A mount can always be ended: whoever pins it is named, and --force needs no help of the supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from daxemu.client.connection import state_of
from daxemu.host.pins import pins_of
from tests.support.mount import DAXEMU, PATIENCE, DaxMount

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount namespace"),
]


@contextmanager
def namespace_with_a_copy() -> Iterator[int]:
    """A process in a mount namespace of its own, with a copy of every mount; its pid."""
    ready = "echo; exec cat"
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


def test_who_pins_an_unmounted_device_is_named_and_force_cuts_it(dax_mount: DaxMount) -> None:
    (dax_mount.path / "f").write_bytes(b"kept")
    with namespace_with_a_copy() as pid:
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
    with namespace_with_a_copy():
        dax_mount.umount("--force")
        dax_mount.mount()
        assert (dax_mount.path / "f").read_bytes() == b"kept"


def test_a_mount_has_no_pins_but_copies(dax_mount: DaxMount) -> None:
    with dax_mount.client() as client, namespace_with_a_copy() as pid:
        assert pid in [pin.pid for pin in pins_of(client.mount)]


def test_a_stopped_supervisor_holds_up_no_verb(dax_mount: DaxMount) -> None:
    (dax_mount.path / "f").write_bytes(b"kept")
    with dax_mount.client() as client:
        pid = client.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        for verb in (["status"], ["damaged"], ["inject"], ["settle"], ["umount"]):
            said = dax_mount.run(*verb, dax_mount.path, status=4)
            assert f"kill -CONT {pid}" in said
        states = {each["mountpoint"]: each["state"] for each in json.loads(_status())}
        assert states[str(dax_mount.path)] == "dead"
        dax_mount.umount("--force")
        assert state_of(pid) in ("", "Z")
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    dax_mount.mount()
    assert (dax_mount.path / "f").read_bytes() == b"kept"


def _status() -> bytes:
    done = subprocess.run([*DAXEMU, "status", "--json"], capture_output=True, timeout=PATIENCE, check=True)
    return done.stdout
