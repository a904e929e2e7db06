"""Names that are no UTF-8, or more than a line, through the whole command line: found, and shown as text."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from daxemu.host.mountinfo import printable
from tests.support.mount import DAXEMU, PATIENCE
from tests.support.quick import QuickMount
from tests.support.scene import PAGE

pytestmark = pytest.mark.mount

NAMES = [
    b"\xff\xfe",
    b"caf\xe9",
    b"two\nlines",
    b"tab\tand \x1b[31mred",
    b"'quote\" \\ $x",
    "ünï".encode(),
    b" -x",
]


def daxemu(*arguments: str | bytes | Path, status: int = 0) -> bytes:
    """Run it; what it printed."""
    done = subprocess.run([*DAXEMU, *arguments], capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
    return done.stderr if status else done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_verb(quick_mount: QuickMount, name: bytes) -> None:
    top = os.fsencode(quick_mount.path)
    directory, path = top + b"/d" + name, top + b"/d" + name + b"/" + name
    Path(os.fsdecode(directory)).mkdir()
    Path(os.fsdecode(path)).write_bytes(b"x" * 4 * PAGE)
    shown = printable(Path(os.fsdecode(b"/d" + name + b"/" + name)))

    injected = json.loads(daxemu("inject", path, "--offset", "4096", "--length", "4096", "--json"))
    assert injected["ranges"][0]["outcome"] == "Recovered"
    (damaged,) = json.loads(daxemu("damaged", quick_mount.path, "--json"))["files"]
    assert (damaged["path"], damaged["offset"]) == (shown, PAGE)
    mapped = json.loads(daxemu("map", path, "--json"))
    assert mapped["path"] == shown
    assert [e["length"] for e in mapped["extents"]] == [4 * PAGE]
    daxemu("reflink", path, path + b".clone")
    assert len(json.loads(daxemu("damaged", quick_mount.path, "--json"))["files"]) == 2
    events = [json.loads(line) for line in daxemu("log", quick_mount.path, "--json").splitlines()]
    assert [e["path"] for e in events if e["event"] == "FileDamaged"] == [shown]
    for verb in ("damaged", "log"):
        text = daxemu(verb, quick_mount.path).decode()  # strictly: for people it is text
        assert "\x1b" not in text
    assert daxemu("clear", path, "--offset", "4096", "--length", "4096")
    assert json.loads(daxemu("damaged", quick_mount.path, "--json"))["files"] == []
    Path(os.fsdecode(path)).unlink()
    assert b"\x1b" not in daxemu("map", path, status=2)


@pytest.mark.parametrize("name", NAMES)
def test_as_device_and_mountpoint(tmp_path: Path, name: bytes) -> None:
    device = b"/dev/shm/daxemu-odd-%d-" % os.getpid() + name
    mountpoint = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(mountpoint)).mkdir()
    daxemu("mkfs", device, "--size", "16M")
    try:
        daxemu("mount", device, mountpoint)
        try:
            Path(os.fsdecode(mountpoint + b"/f")).write_bytes(b"x")
            shown = json.loads(daxemu("status", mountpoint, "--json"))
            assert shown["device"] == printable(Path(os.fsdecode(device)))
            assert shown["mountpoint"] == printable(Path(os.fsdecode(mountpoint)))
            assert b"mounted" in daxemu("status")
        finally:
            daxemu("umount", mountpoint)
        daxemu("fsck", device)
    finally:
        subprocess.run(["rm", "-rf", b"--", device], check=True)
