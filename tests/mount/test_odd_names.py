"""Names outside of UTF-8, or of several lines, through the whole command line: found, and shown as text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daxemu.host.proc.mountinfo import printable
from daxemu.text import for_people, name_bytes
from tests.support.mount import PATIENCE, finished
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
    b"<script>\xe2\x80\xae",
]


def daxemu(*arguments: str | bytes | Path, status: int = 0) -> bytes:
    """Run a command; return the output."""
    done = finished(*arguments)
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
            # By force: a test beside this one may have copied the mount into its namespace.
            daxemu("umount", "--force", mountpoint)
        daxemu("fsck", device)
    finally:
        subprocess.run(["rm", "-rf", b"--", device], check=True)


HOSTILE = b"\x1b[31m\nforged \xff <script>\xe2\x80\xae\r\\"
COMM = b"\x1b[31m\n\xff<b>\\\xc2\x9b"
"""A process name: 15 bytes at most."""
LOAD = (
    "import mmap, os, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); m[0]; "
    "fd = os.open('/proc/self/comm', os.O_WRONLY); os.write(fd, bytes.fromhex(sys.argv[2])); "
    "print(flush=True); input(); m[0]"
)


def harmless(*arguments: str | bytes | Path, status: int = 0) -> str:
    """Run a command. The output, in lines of its own, must not act on a terminal. Return stdout."""
    done = finished(*arguments)
    assert done.returncode == status, done.stdout + done.stderr
    for text in (done.stdout.decode(), done.stderr.decode()):
        assert for_people(text.replace("\n", "")) == text.replace("\n", ""), text
        assert not [line for line in text.splitlines() if line.startswith("forged")]
    return done.stdout.decode()


def test_hostile_names_in_every_verb_that_prints_names(tmp_path: Path) -> None:
    """No name of a DEVICE, mountpoint, file, process or setting acts on a terminal, forges a line or
    is HTML.
    """
    device = b"/dev/shm/daxemu-odd-%d-" % os.getpid() + HOSTILE
    mnt = os.fsencode(tmp_path) + b"/" + HOSTILE
    file = mnt + b"/" + HOSTILE
    Path(os.fsdecode(mnt)).mkdir()
    harmless("mkfs", device, "--size", "16M")
    try:
        harmless("mkfs", device, "--size", "16M", status=4)
        harmless("mount", device, mnt)
        try:
            Path(os.fsdecode(file)).write_bytes(b"x" * 4 * PAGE)
            victim = subprocess.Popen(
                [sys.executable, "-c", LOAD, file, COMM.hex()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert victim.stdout is not None
            victim.stdout.readline()
            harmless("set", mnt, "early_kill=1")
            harmless("status")
            harmless("status", mnt)
            harmless("map", file)
            harmless("reflink", file, file + b"2")
            harmless("inject", file)
            victim.wait(PATIENCE)
            harmless("settle", mnt)
            for verb in (
                ["damaged", mnt],
                ["log", mnt],
                ["log", mnt, "--dmesg"],
                ["watch", mnt, "--json"],
                ["status", mnt, "--internals"],
                ["scrub", mnt],
                ["badblocks", mnt],
                ["repair", mnt],
                ["page-types", device],
                ["doctor"],
            ):
                harmless(*verb)
            refused: list[list[str | bytes]] = [
                ["map", file + b"3"],
                ["set", mnt, b"no=" + HOSTILE],
                ["set", mnt, HOSTILE],
                ["mount", device, mnt],
                [HOSTILE],
                ["status", b"--" + HOSTILE],
            ]
            for command in refused:
                said = finished(*command)
                harmless(*command, status=said.returncode)
                assert said.returncode
            (signal_sent,) = [
                event
                for event in map(json.loads, harmless("log", mnt, "--json").splitlines())
                if event["event"] == "SignalSent"
            ]
            assert name_bytes(signal_sent["comm"]) == COMM
            output = tmp_path / "report.html"
            harmless("report", mnt, "-o", output)
            shown = output.read_text(encoding="utf-8")
            assert "&lt;script&gt;" in shown
            assert "<script>" not in shown
            assert not [char for char in "\x1b\x9b\u202e\r" if char in shown]
            harmless("clear", file)
        finally:
            harmless("umount", mnt)
        harmless("fsck", device)
        harmless("log", device)
        log = Path(os.fsdecode(device + b"/supervisor.log")).read_bytes().decode()
        assert for_people(log.replace("\n", "")) == log.replace("\n", "")
    finally:
        subprocess.run(["rm", "-rf", b"--", device], check=True)
