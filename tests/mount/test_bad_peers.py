"""Control socket: a peer that breaks the protocol loses its own connection, and no other connection
suffers.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.mount import PATIENCE, DaxMount
from tests.support.words import library_words

pytestmark = pytest.mark.mount

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
_STRANGER = """
import socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
try:
    peer.sendall(b'{"op": "remove"}\\n')
except BrokenPipeError:
    pass  # refused before it asked
print(peer.makefile().readline())
"""


@contextmanager
def peer(mount: DaxMount) -> Iterator[socket.socket]:
    """Open a connection of the test's own."""
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(PATIENCE)
        connected.connect(str(mount.device / "control.sock"))
        yield connected


def answer(connected: socket.socket) -> dict[str, object]:
    """Return the next line of the supervisor, which must be a reply."""
    with connected.makefile("rb") as lines:
        reply = json.loads(lines.readline())
    assert isinstance(reply, dict)
    return reply


def works(mount: DaxMount) -> None:
    """Check the mount and the control socket: both serve on, and the device has not changed."""
    assert mount.json("status", mount.path)["state"] == "mounted"
    assert [e["event"] for e in mount.events()] == ["Mounted"]
    file = mount.path / "probe"
    file.write_bytes(b"p" * 4096)
    assert file.read_bytes() == b"p" * 4096
    file.unlink()


def drained(connected: socket.socket) -> bytes:
    """Return all bytes until the supervisor hangs up."""
    said = b""
    try:
        while chunk := connected.recv(1 << 16):
            said += chunk
    except ConnectionResetError:
        pass
    return said


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'"status"',
        b'{"op": "format"}',
        b'{"op": 7}',
        b'{"op": "status", "extra": 1}',
        b'{"op": "inject"}',
        b'{"op": "inject", "ranges": "all"}',
        b'{"op": "inject", "ranges": []}',
        b'{"op": "inject", "ranges": [[0]]}',
        b'{"op": "inject", "ranges": [[0, 4096, 1]]}',
        b'{"op": "inject", "ranges": [["0", "4096"]]}',
        b'{"op": "inject", "ranges": [[0, 1.5]]}',
        b'{"op": "inject", "ranges": [[-4096, 4096]]}',
        b'{"op": "inject", "ranges": [[0, 99999999999999999999999999]]}',
        b'{"op": "inject", "ino": 999999, "ranges": [[0, 4096]]}',
        b'{"op": "inject", "ino": -1, "ranges": [[0, 4096]]}',
        b'{"op": "inject", "ino": 1, "ranges": [[0, 4096]]}',
        b'{"op": "clear", "ino": 0, "ranges": [[0, 4096]]}',
        b'{"op": "map", "ino": 0}',
        b'{"op": "map", "ino": "f"}',
        b'{"op": "reflink", "src": 12345, "dst": 54321}',
        b'{"op": "reflink", "src": 1, "dst": 1}',
        b'{"op": "set", "name": "early_kill", "value": 1}',
        b'{"op": "set", "name": "\\u0000", "value": ""}',
        b'{"op": "unmount", "force": "yes"}',
        b'{"op": "follow", "after": "yesterday"}',
        b"\xff\xfe\x00",
        b"[" * 100000,
    ],
)
def test_a_line_that_is_no_request(dax_mount: DaxMount, line: bytes) -> None:
    """A malformed line is refused, and the connection goes on."""
    with peer(dax_mount) as connected:
        for _ in range(2):
            connected.sendall(line + b"\n")
            reply = answer(connected)
            assert reply["ok"] is False
            assert reply["error"] == "InvalidArgument"
            assert reply["message"]
            assert "\n" not in str(reply["message"])
            assert library_words(str(reply["message"])) is None
        connected.sendall(b'\n  \n{"op": "status"}\n')
        assert answer(connected)["ok"] is True
    works(dax_mount)


def test_random_bytes(dax_mount: DaxMount) -> None:
    noise = random.Random(1)
    for _ in range(20):
        with peer(dax_mount) as connected:
            connected.sendall(noise.randbytes(noise.randrange(1, 5000)) + b"\n")
            connected.shutdown(socket.SHUT_WR)
            for line in drained(connected).splitlines():
                assert json.loads(line)["ok"] is False
    works(dax_mount)


def test_a_line_without_end(dax_mount: DaxMount) -> None:
    with peer(dax_mount) as connected:
        try:
            for _ in range(8):
                connected.sendall(b"x" * (1 << 20))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the supervisor has hung up
        said = drained(connected)
    if said:
        assert json.loads(said)["error"] == "InvalidArgument"
    works(dax_mount)


def test_a_peer_that_hangs(dax_mount: DaxMount) -> None:
    """Any number of peers may hang: silent, in the middle of a line, or without reading replies."""
    with peer(dax_mount), peer(dax_mount) as half, peer(dax_mount) as deaf:
        half.sendall(b'{"op": "sta')
        deaf.setblocking(False)
        asked = 0
        try:
            while asked < 1 << 24:
                asked += deaf.send(b'{"op": "status"}\n' * 100)
        except BlockingIOError:
            pass
        works(dax_mount)
        half.sendall(b'tus"}\n')
        assert answer(half)["ok"] is True
    works(dax_mount)


def test_a_peer_that_is_half_closed(dax_mount: DaxMount) -> None:
    with peer(dax_mount) as connected:
        connected.sendall(b'{"op": "status"}\n{"op": "badbl')
        connected.shutdown(socket.SHUT_WR)
        replies = drained(connected).splitlines()
        assert json.loads(replies[0])["ok"] is True
        assert len(replies) == 1
    works(dax_mount)


def test_a_peer_that_goes_away_at_once(dax_mount: DaxMount) -> None:
    for line in (b"", b'{"op": "status"}\n', b'{"op": "follow"}\n', b'{"op": "scrub"}\n' * 50):
        for _ in range(5):
            with peer(dax_mount) as connected:
                connected.sendall(line)
    works(dax_mount)


def test_more_peers_than_it_waits_for(dax_mount: DaxMount) -> None:
    held = [socket.socket(socket.AF_UNIX) for _ in range(200)]
    try:
        for connected in held:
            connected.connect(str(dax_mount.device / "control.sock"))
            connected.settimeout(PATIENCE)
        held[-1].sendall(b'{"op": "status"}\n')
        assert answer(held[-1])["ok"] is True
        works(dax_mount)
    finally:
        for connected in held:
            connected.close()
    dax_mount.umount()
    dax_mount.mount()


def stranger(mount: DaxMount) -> subprocess.CompletedProcess[str]:
    argv = [*NOBODY, "/usr/bin/python3", "-c", _STRANGER, str(mount.device / "control.sock")]
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)


def test_another_user_cannot_connect(dax_mount: DaxMount) -> None:
    done = stranger(dax_mount)
    assert done.returncode != 0
    assert "PermissionError" in done.stderr
    works(dax_mount)


def test_another_user_is_refused_even_if_the_socket_lets_him(dax_mount: DaxMount) -> None:
    os.chmod(dax_mount.device / "control.sock", 0o666)  # noqa: PTH101
    dax_mount.device.chmod(0o711)
    done = stranger(dax_mount)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert (reply["ok"], reply["error"]) == (False, "PermissionDenied")
    works(dax_mount)
