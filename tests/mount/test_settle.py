"""``settle``, the event ``NotifyFailure``, and a long request beside a reader."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from daxemu.protocol import Settle
from daxemu.uapi import BUS_MCEERR_AR, MF_MEM_PRE_REMOVE, U64_MAX
from tests.support.mount import PATIENCE, DaxMount, dax_mount_at

pytestmark = pytest.mark.mount
SILENT = 300 << 20
ROUNDS = 5


def test_settle_is_answered_on_a_quiet_mount(dax_mount: DaxMount) -> None:
    assert dax_mount.json("settle", dax_mount.path)["seconds"] < 10
    with dax_mount.client() as client:
        assert client.ask(Settle(5.0)).seconds >= 0
        assert client.settle() >= 0


def test_each_call_to_the_holder_is_an_event(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 4)
    dax_mount.inject("f", (0, 4096), (8192, 8192))
    calls = [(e["length"], e["flags"]) for e in dax_mount.events("NotifyFailure")]
    assert calls == [(4096, 0), (8192, 0)]


def test_the_removal_of_6_tib_is_one_call(tmp_path: Path) -> None:
    with dax_mount_at(tmp_path, "6T") as mount:
        mount.make_file("f", 4)
        mount.sound = False
        mount.run("remove", mount.path)
        (call,) = mount.events("NotifyFailure")
        assert (call["offset"], call["length"], call["flags"]) == (0, U64_MAX, MF_MEM_PRE_REMOVE)


class Reader(threading.Thread):
    """Reads a file again and again, past the page cache; ``worst`` is the longest read in seconds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.over = threading.Event()
        self.worst = 0.0
        self.reads = 0

    def run(self) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            fd = os.open(self._path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.read(fd, 4096)
            os.close(fd)
            self.worst = max(self.worst, time.monotonic() - began)
            self.reads += 1


def test_silent_corruption_of_300_mib_beside_a_reader(dax_mount: DaxMount) -> None:
    """random.randbytes() cannot return so many bytes at once; the reader goes on, and the bytes follow from
    the seed.
    """
    small = dax_mount.make_file("small", 1)
    big = dax_mount.path / "big"
    with big.open("wb") as file:
        file.truncate(SILENT)
        os.posix_fallocate(file.fileno(), 0, SILENT)
    reader = Reader(small)
    reader.start()
    try:
        dax_mount.run("inject", big, "--silent", "--length", "300M", "--seed", "7")
    finally:
        reader.over.set()
        reader.join()
    print(f"silent corruption of 300 MiB: {reader.reads} reads, the longest {reader.worst * 1000:.0f} ms")
    assert reader.reads
    expected = bytes(byte or 1 for byte in random.Random(7).randbytes(3 << 20))
    with big.open("rb") as file:
        assert file.read(len(expected)) == expected


def test_the_event_of_a_deadly_signal_is_there_once_it_is_settled(dax_mount: DaxMount) -> None:
    """A new process each time, many times: the event follows the death of the process, and settle waits for
    the event.
    """
    file = dax_mount.make_file("f", ROUNDS)
    load = "import mmap, sys; f = open(sys.argv[1], 'rb'); mmap.mmap(f.fileno(), 0, prot=1)[int(sys.argv[2])]"
    with dax_mount.client() as client:
        for page in range(ROUNDS):
            dax_mount.inject("f", (page * 4096, 4096))
            victim = subprocess.Popen([sys.executable, "-c", load, str(file), str(page * 4096)])
            assert victim.wait(PATIENCE) == -signal.SIGBUS
            client.settle()
            told = [e["code"] for e in dax_mount.events("SignalSent") if e["pid"] == victim.pid]
            assert told == [BUS_MCEERR_AR]
