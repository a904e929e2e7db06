"""Mounts that claim to be daxemu's, with a foreign socket: no client hangs, crashes or believes the mount."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from daxemu.client import AsyncClient, Client
from daxemu.errors import Busy, DaxemuError, NotASupervisor
from daxemu.host.fuse.session import MNT_DETACH
from daxemu.host.proc.mountinfo import FS_TYPE, SOURCE_PREFIX, mount_at
from tests.support.mount import DAXEMU, PATIENCE
from tests.support.quick import QuickMount

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts on behalf of another user"),
]
_libc = ctypes.CDLL(None, use_errno=True)
Peer = Callable[[socket.socket], object]


@contextmanager
def claimed_mount(directory: Path, uid: int) -> Iterator[Path]:
    """A FUSE mount of ``uid`` without a server; the source names ``directory``."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id={uid},group_id={uid}".encode()
    source = f"{SOURCE_PREFIX}{directory}".encode()
    assert _libc.mount(source, os.fsencode(mountpoint), FS_TYPE.encode(), 0, options) == 0
    try:
        yield mountpoint
    finally:
        os.close(fuse)
        _libc.umount2(os.fsencode(mountpoint), MNT_DETACH)


@contextmanager
def listening(directory: Path, peer: Peer) -> Iterator[list[bytes]]:
    """Control socket with ``peer`` serving each connection; yields the first bytes received on each
    connection.
    """
    received: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "control.sock"))
    listener.listen(8)

    def serve() -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            with connected:
                try:
                    received.append(connected.recv(4096))
                    peer(connected)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE)


def _until_hung_up(connected: socket.socket) -> None:
    while connected.recv(4096):
        pass


def _drip(connected: socket.socket) -> None:
    connected.settimeout(0.1)
    while True:
        connected.sendall(b"{")
        try:
            if not connected.recv(1):
                return
        except TimeoutError:
            continue


def _flood(connected: socket.socket) -> None:
    while True:
        connected.sendall(b"x" * (1 << 20))


def _says(line: bytes) -> Peer:
    def peer(connected: socket.socket) -> None:
        connected.sendall(line)
        _until_hung_up(connected)

    return peer


NONSENSE = [
    b"\n",
    b"hello\n",
    b"[" * 100_000 + b"\n",
    b"[]\n",
    b"null\n",
    b'{"ok":true}\n',
    b'{"ok":true,"result":[]}\n',
    b'{"ok":true,"result":{"pid":"x"}}\n',
    b'{"ok":false}\n',
    b'{"ok":false,"error":[],"message":5}\n',
    b"\xff\xfe\n",
]


@pytest.mark.parametrize("peer", [_until_hung_up, _drip, _flood], ids=["silent", "drip", "flood"])
def test_an_exchange_has_one_deadline_and_a_limit(
    tmp_path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daxemu.client.connection.MAX_REPLY", 64 << 20)
    with claimed_mount(tmp_path, 0) as mountpoint, listening(tmp_path, peer):
        expected = NotASupervisor if peer is _flood else Busy
        # The flood ends at its limit: the patience is longer than any machine needs for 64 MiB.
        with (
            pytest.raises(expected),
            Client.at(mountpoint, patience=PATIENCE if peer is _flood else 1.0) as client,
        ):
            client.request("status")


def test_connecting_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full backlog connect(2) blocks."""
    monkeypatch.setattr("daxemu.client.connection.CONNECT_PATIENCE", 0.5)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen(0)
    with socket.socket(socket.AF_UNIX) as first, listener, claimed_mount(tmp_path, 0) as mountpoint:
        first.connect(str(tmp_path / "control.sock"))
        with pytest.raises(Busy):
            Client.at(mountpoint)

        async def main() -> None:
            async with AsyncClient.at(mountpoint):
                pass

        with pytest.raises(Busy):
            trio.run(main)
        with pytest.raises(Busy):
            asyncio.run(main())


def test_nothing_is_sent_to_the_socket_of_another_user(tmp_path: Path) -> None:
    with claimed_mount(tmp_path, 1000) as mountpoint, listening(tmp_path, _until_hung_up) as received:
        with pytest.raises(NotASupervisor, match="uid 0, but uid 1000"):
            Client.at(mountpoint)

        async def main() -> None:
            async with AsyncClient.at(mountpoint):
                pass

        with pytest.raises(NotASupervisor):
            trio.run(main)
    assert set(received) <= {b""}


@pytest.mark.parametrize("line", NONSENSE, ids=lambda line: repr(line[:24]))
def test_nonsense_is_one_error(tmp_path: Path, line: bytes) -> None:
    with claimed_mount(tmp_path, 0) as mountpoint, listening(tmp_path, _says(line)):
        done = subprocess.run(
            [*DAXEMU, "status", mountpoint], capture_output=True, timeout=PATIENCE, text=True
        )
        assert done.returncode == 3, done.stderr
        assert done.stderr.count("\n") == 1

        async def main() -> None:
            async with AsyncClient.at(mountpoint) as client:
                await client.request("status")
                raise NotASupervisor("the types are the caller's to check")

        with pytest.raises(DaxemuError):
            trio.run(main)


def test_the_other_mounts_are_listed_and_nothing_of_it_reaches_the_terminal_raw(
    tmp_path: Path, quick_mount: QuickMount
) -> None:
    hostile = b'{"ok":false,"error":"Busy","message":"\\u001b[31mgone\\nmounted"}\n'
    claimed = tmp_path / "claimed"
    claimed.mkdir()
    with claimed_mount(claimed, 0) as mountpoint, listening(claimed, _says(hostile)):
        shown = subprocess.run([*DAXEMU, "status"], capture_output=True, timeout=PATIENCE)
        assert shown.returncode == 0
        assert b"\x1b" not in shown.stdout
        assert b"\\x1b[31mgone\\nmounted" in shown.stdout
        listed = subprocess.run([*DAXEMU, "status", "--json"], capture_output=True, timeout=PATIENCE)
        states = {each["mountpoint"]: each["state"] for each in json.loads(listed.stdout)}
        assert (states[str(mountpoint)], states[str(quick_mount.path)]) == ("dead", "mounted")
        found = mount_at(mountpoint)
        assert found is not None
        assert found.owner == 0
