"""Requests to attach a run, right and wrong, to a real supervisor: clear errors, no descriptor left."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from daxemu.client import Client
from daxemu.errors import Busy, DaxemuError, PermissionDenied
from daxemu.host.run import zone
from tests.support.forwarded import eventually, helper_of
from tests.support.mount import DAXEMU, PATIENCE, DaxMount
from tests.support.under_filter import program

pytestmark = pytest.mark.mount

Packets = tuple[socket.socket, socket.socket]


def supervisor_of(mount: DaxMount) -> int:
    with mount.client() as client:
        return int(client.request("status")["pid"])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def nothing_left(mount: DaxMount) -> Iterator[int]:
    """Check that the supervisor has no more descriptors afterwards, no run, and no unexpected error.

    Yields its pid.
    """
    pid = supervisor_of(mount)
    before = descriptors(pid)
    yield pid
    assert eventually(lambda: descriptors(pid) <= before)
    assert runs(mount) == 0
    assert mount.events("UnexpectedError") == []


def runs(mount: DaxMount) -> int:
    """Return the number of runs that the supervisor knows."""
    with mount.client() as client:
        held = client.request("internals")["held"]
    return sum(int(line.rpartition(" ")[2]) for line in held if line.startswith("runs of daxemu run"))


def packets() -> Packets:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def offer(listener: int, sock: int, ino: int, part: range = zone.SLICES[0], pid: int | None = None) -> Any:
    return {
        "op": "attach",
        "pid": os.getpid() if pid is None else pid,
        "descriptors": [listener, sock, ino],
        "zone": [part.start, part.stop],
    }


def ask(client: Client, request: dict[str, Any]) -> None:
    client.request(**request)


def ino_of(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def test_the_same_run_again_is_refused(dax_mount: DaxMount) -> None:
    """By the listener: the same socket, another one, another descriptor, another slice."""
    with nothing_left(dax_mount), program() as (sock, listener), dax_mount.client() as client:
        (ours, theirs), (other, theirs_too) = packets(), packets()
        ask(client, offer(listener, theirs.fileno(), ino_of(theirs)))
        copy = os.dup(listener)
        for number, end in ((listener, theirs), (listener, theirs_too), (copy, theirs_too)):
            for part in zone.SLICES[:2]:
                with pytest.raises(PermissionDenied, match="attached already"):
                    ask(client, offer(number, end.fileno(), ino_of(end), part))
        ours.close()  # the helper has ended: another one may take its place
        ask(client, offer(copy, theirs_too.fileno(), ino_of(theirs_too)))
        os.close(copy)
        for each in (theirs, other, theirs_too):
            each.close()
        sock.send(b"m")


def test_a_run_ends_with_its_last_process(dax_mount: DaxMount) -> None:
    """Also where another process keeps the socket and the listener open."""
    with ExitStack() as kept, nothing_left(dax_mount), dax_mount.client() as client:
        for _ in range(3):
            with program() as (_, listener):
                ours, theirs = (kept.enter_context(end) for end in packets())
                kept.callback(os.close, os.dup(listener))
                ask(client, offer(listener, theirs.fileno(), ino_of(theirs)))
                assert ours.fileno() >= 0


def test_wrong_offers(dax_mount: DaxMount) -> None:
    with ExitStack() as kept, nothing_left(dax_mount) as pid, program() as (_, listener):
        ours, theirs = (kept.enter_context(end) for end in packets())
        stream, _peer = (kept.enter_context(end) for end in socket.socketpair())
        alone, listening = (
            kept.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(2)
        )
        listening.bind(b"")
        listening.listen()
        good, ino = theirs.fileno(), ino_of(theirs)
        wrong = [
            offer(good, good, ino),
            offer(listener, listener, ino),
            offer(listener, good, ino + 1),
            offer(listener, stream.fileno(), ino_of(stream)),
            offer(listener, alone.fileno(), ino_of(alone)),
            offer(listener, listening.fileno(), ino_of(listening)),
            offer(listener, 9999, ino),
            offer(listener, -1, ino),
            offer(2**32 + listener, 2**32 + good, ino),
            offer(2**64, 2**80, ino),
            offer(listener, good, ino, range(2**40)),
            offer(listener, good, ino, zone.ARENAS),
            offer(listener, good, ino, range(zone.START, zone.START + 1)),
            offer(listener, good, ino, range(-1, 2**64)),
            offer(listener, good, ino, pid=1),
            offer(listener, good, ino, pid=pid),
            offer(listener, good, ino, pid=-1),
            offer(listener, good, ino, pid=2**64),
        ]
        with dax_mount.client() as client:
            for request in wrong:
                with pytest.raises(PermissionDenied) as raised:
                    ask(client, request)
                assert "Traceback" not in str(raised.value)
            for request in (
                {**wrong[0], "descriptors": [listener, good]},
                {**wrong[0], "descriptors": [listener, good, "x"]},
                {**wrong[0], "descriptors": [None] * 3},
                {**wrong[0], "zone": []},
                {**wrong[0], "pid": None},
            ):
                with pytest.raises(DaxemuError, match="not a request: "):
                    ask(client, request)
        assert ours.fileno() >= 0


def test_a_dead_process_has_nothing_to_offer(dax_mount: DaxMount) -> None:
    """The connection of a process that has ended, used by its parent."""
    with nothing_left(dax_mount), program() as (_, listener):
        ours, theirs = packets()
        line, end = socket.socketpair()
        child = os.fork()
        if not child:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(dax_mount.device / "control.sock"))
                socket.send_fds(end, [b"x"], [connection.fileno()])
            os._exit(0)
        _, (fd,), _, _ = socket.recv_fds(line, 1, 1)
        for reaped in (False, True):
            os.waitid(os.P_PID, child, os.WEXITED | (0 if reaped else os.WNOWAIT))
            request = offer(listener, theirs.fileno(), ino_of(theirs), pid=child)
            os.write(fd, json.dumps(request).encode() + b"\n")
            answer = json.loads(os.read(fd, 4096))
            assert answer["error"] == "PermissionDenied"
            assert f"process {child}" in answer["message"]
        os.close(fd)
        for each in (ours, theirs, line, end):
            each.close()


def test_connections_closed_at_each_step(dax_mount: DaxMount) -> None:
    """The request cut off at each byte, and the peer gone before the reply."""
    with nothing_left(dax_mount), program() as (_, listener):
        for step in range(0, 220, 3):
            ours, theirs = packets()
            line = json.dumps(offer(listener, theirs.fileno(), ino_of(theirs))).encode() + b"\n"
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(dax_mount.device / "control.sock"))
                connection.sendall(line[:step])
            ours.close()
            theirs.close()
        assert step > len(line)


def test_packets_of_any_kind(dax_mount: DaxMount) -> None:
    """Nonsense on the socket of an attached run: the run goes on, and the mount serves others."""
    dax_mount.make_file("f", 1)
    with nothing_left(dax_mount), program() as (sock, listener), dax_mount.client() as client:
        ours, theirs = packets()
        ask(client, offer(listener, theirs.fileno(), ino_of(theirs)))
        ours.settimeout(PATIENCE)
        for size in (1, 79, 81, 4096, 65536):
            ours.send(b"\xff" * size)
        for _ in range(1000):
            ours.send(os.urandom(80))
        assert mapped(dax_mount) == "A"
        sock.send(b"m")
        ours.close()
        theirs.close()


def mapped(mount: DaxMount) -> str:
    """Return the first byte of the file f, as a program under ``daxemu run`` maps it."""
    code = "import mmap; f = open('f', 'r+b'); print(chr(mmap.mmap(f.fileno(), 4096)[0]))"
    argv = [*DAXEMU, "run", str(mount.path), "--", sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=mount.path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_HOLDS = """
import mmap, sys
file = open("f", "r+b")
at = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.readline()
"""


def test_finished_runs_are_forgotten(dax_mount: DaxMount) -> None:
    """A run counts until its programs have ended, also without its helper."""
    dax_mount.make_file("f", 1)
    argv = [*DAXEMU, "run", str(dax_mount.path), "--", sys.executable, "-c", _HOLDS]
    with nothing_left(dax_mount) as pid:
        before = descriptors(pid)
        for _ in range(6):
            mapped(dax_mount)
        assert eventually(lambda: runs(dax_mount) == 0)
        assert eventually(lambda: descriptors(pid) <= before)
        process = subprocess.Popen(
            argv, cwd=dax_mount.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        mapped(dax_mount)
        assert eventually(lambda: runs(dax_mount) == 1)
        os.kill(helper_of(process), signal.SIGKILL)
        assert eventually(lambda: not seccomp_listeners(pid))
        assert runs(dax_mount) == 1
        process.communicate("\n", timeout=PATIENCE)
        assert eventually(lambda: runs(dax_mount) == 0)


def seccomp_listeners(pid: int) -> list[str]:
    """Return the descriptors of a process that are listeners of seccomp(2)."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()) == "anon_inode:seccomp notify":
                found.append(entry.name)
        except FileNotFoundError:
            continue
    return found


def test_a_supervisor_without_a_free_descriptor_says_so(dax_mount: DaxMount) -> None:
    with nothing_left(dax_mount) as pid, program() as (_, listener), dax_mount.client() as client:
        client.request("status")
        for free in range(5):
            ours, theirs = packets()
            with free_descriptors(pid, free), pytest.raises(Busy, match="no free descriptor"):
                ask(client, offer(listener, theirs.fileno(), ino_of(theirs)))
            ours.close()
            theirs.close()


@contextmanager
def free_descriptors(pid: int, count: int) -> Iterator[None]:
    """Set the limit of a process so that ``count`` descriptors are free, during the context."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    most = [number for number in range(len(used) + count + 1) if number not in used][count]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


_FORKS = """
import mmap, os, sys
file = open("f", "r+b")
at = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
for line in sys.stdin:
    try:
        if not (pid := os.fork()):
            at[1] = at[0]
            os._exit(at[0] != 65)
        print(os.wait()[1], flush=True)
    except OSError as error:
        print("errno", error.errno, flush=True)
"""


def test_a_fork_without_a_free_descriptor_fails(dax_mount: DaxMount) -> None:
    """No child runs whose mappings do not follow; a later fork works."""
    dax_mount.make_file("f", 1)
    argv = [*DAXEMU, "run", str(dax_mount.path), "--", sys.executable, "-c", _FORKS]
    process = subprocess.Popen(
        argv, cwd=dax_mount.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "mapped\n"
    pid = supervisor_of(dax_mount)
    for free in range(8):
        with free_descriptors(pid, free):
            process.stdin.write("fork\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"errno {errno.EAGAIN}\n"
    process.stdin.write("fork\n")
    process.stdin.flush()
    assert process.stdout.readline() == "0\n"
    process.stdin.close()
    assert process.wait(PATIENCE) == 0
    process.stdout.close()
    assert "its memory is not protected" not in (dax_mount.device / "supervisor.log").read_text()
