"""A process under the filter for direct mappings whose listener belongs to the test: there is no helper."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.forwarded import ROOT

# A process under the filter hands its listener over, waits for a byte, and maps a file.
WAITING = """
import array, mmap, os, socket, sys
from daxemu.host.run import filters, seccomp
sock = socket.socket(fileno=int(sys.argv[1]))
fd = os.open("/usr/bin/env", os.O_RDONLY)
listener = seccomp.install(filters.direct())
socket.send_fds(sock, [b"x"], [listener])
os.close(listener)
while True:
    sock.recv(1)
    try:
        mmap.mmap(fd, 4096, prot=1).close()
        sock.send(b"0")
    except OSError as error:
        sock.send(bytes([error.errno]))
"""


@contextmanager
def program() -> Iterator[tuple[socket.socket, int]]:
    """A program under the filter: a socket to it, and the listener."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT
    )
    theirs.close()
    try:
        ours.settimeout(20)
        _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
        yield ours, listener
        os.close(listener)
    finally:
        process.kill()
        process.wait()
        ours.close()
