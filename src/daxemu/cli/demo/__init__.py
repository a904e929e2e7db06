"""demo: the tour. Unmodified programs consume poison on a real mount; each promise is printed and checked."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from daxemu.cli.demo import direct
from daxemu.cli.demo.programs import Program, compile_program
from daxemu.cli.demo.tour import Tour, unmount
from daxemu.cli.output import say, say_json
from daxemu.client import Client
from daxemu.errors import DaxemuError, Unsupported
from daxemu.host.proc.mountinfo import mount_of
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.supervisor.spawn import spawn

PAGE = 4096
PATIENCE = 20.0
"""Limit in seconds of the wait for an expected event."""


@click.command()
@click.option(
    "--json", "as_json", is_flag=True, help="Print each promise, and if it was kept, as one JSON object."
)
def demo(as_json: bool) -> None:
    """Take the tour: a 6 TiB device, real programs, poison, reflinks, surprise removal, direct
    mappings. Takes less than a minute.

    Exit status 0 only if every promise was kept. Direct mappings need root: without root, one line says so.
    No file, mount or process remains.

    \b
    Example:
      daxemu demo
    """
    for tool in ("gcc", "sqlite3"):
        if shutil.which(tool) is None:
            raise Unsupported(f"the demo needs {tool}: apt-get install {tool}")
    with _mounted(as_json) as tour:
        for chapter in (_sqlite, _recovery, _reflinks, _removal, direct.chapter):
            chapter(tour)
        kept = all(check["kept"] for check in tour.checks)
        if as_json:
            say_json({"kept": kept, "checks": tour.checks})
        else:
            say("", f"{sum(bool(c['kept']) for c in tour.checks)} of {len(tour.checks)} promises kept")
    if not kept:
        raise DaxemuError("not every promise of the demo was kept: see the lines that begin with NOT")


@contextmanager
def _mounted(quiet: bool) -> Iterator[Tour]:
    with ExitStack() as undo:
        scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="daxemu-demo-")))
        shared = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else scratch)
        device = shared / scratch.name
        mountpoint = scratch / "mnt"
        mountpoint.mkdir()
        signal.signal(signal.SIGTERM, _end)
        undo.callback(shutil.rmtree, device, ignore_errors=True)
        undo.callback(unmount, mountpoint)
        tour = Tour(mountpoint, scratch, quiet)
        tour.chapter("A 6 TiB device in shared memory, and a filesystem on it")
        DeviceDir.create(device, DeviceConfig(size=6 << 40))
        tour.say(f"$ daxemu mkfs {device} --size 6T")
        spawn(device, mountpoint)
        tour.say(f"$ daxemu mount {device} {mountpoint}")
        used = int(
            subprocess.run(["du", "-k", device / "media"], capture_output=True, text=True).stdout.split()[0]
        )
        free = shutil.disk_usage(mountpoint).free
        tour.say(
            f"{free / (1 << 40):.1f} TiB free on the mount; the device takes {used / 1024:.1f} MiB of memory"
        )
        tour.check("6 TiB of device take megabytes of memory", used < 64 << 10)
        for name in ("recover", "watch"):
            compile_program(name, scratch)
        yield tour


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _sqlite(tour: Tour) -> None:
    tour.chapter("sqlite3, unmodified, with memory-mapped I/O; poison under it while it works")
    database = tour.mountpoint / "shop.db"
    with Program(["sqlite3", "-batch", str(database)]) as sqlite:
        sqlite.write("PRAGMA mmap_size=1073741824;")
        sqlite.read_line()
        sqlite.write("CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT, data BLOB);")
        sqlite.write(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<2000) "
            "INSERT INTO item SELECT i, 'item '||i, randomblob(500) FROM n;"
        )
        sqlite.write("SELECT count(*), sum(length(data)) FROM item;")
        tour.say(f"SELECT count(*), sum(length(data)) -> {sqlite.read_line()}")
        size = database.stat().st_size
        offset = size // 2 & ~(PAGE - 1)
        tour.inject(database, offset)
        tour.check("sqlite3 keeps running: the page is mapped, but was not touched since", sqlite.alive)
        sqlite.write("SELECT sum(length(data)) FROM item;")
        status = sqlite.wait()
        tour.say(f"the next query touches the page: sqlite3 ended with {_status(status)}")
        tour.check("the kernel's default for consumed poison: killed by SIGBUS", status == -signal.SIGBUS)
        sent = _signals_to(tour, sqlite.pid)
        tour.check(
            "the signal was BUS_MCEERR_AR (action required), lsb 12, in a process without a tracer before",
            [(e["code"], e["lsb"], e["result"]) for e in sent] == [(4, 12, "delivered")],
        )
    tour.say("$ daxemu damaged")
    lost = tour.request("damaged")["files"]
    tour.check(
        "the filesystem names the file and the range",
        lost == [{"ino": database.stat().st_ino, "path": "/shop.db", "offset": offset, "length": PAGE}],
    )
    again = subprocess.run(
        ["sqlite3", "-batch", database, "SELECT sum(length(data)) FROM item;"], capture_output=True, text=True
    )
    tour.say(f"sqlite3 again, this time with read(2): {again.stderr.strip()}")
    tour.check(
        "read(2) of poison fails: sqlite3 reports it and gives no sum",
        bool(again.returncode and not again.stdout),
    )
    tour.request("clear", ino=database.stat().st_ino, ranges=[[0, size]])


def _recovery(tour: Tour) -> None:
    tour.chapter("A program with a SIGBUS handler: signalled early, it rewrites the page")
    file = tour.mountpoint / "ledger"
    with tour.program("recover", file, "16") as program:
        program.read_until("all 16 pages are right")
        tour.inject(file, 5 * PAGE)
        answer = program.read_line()
        tour.say(f"the program: {answer}")
        tour.check(
            "the program gets BUS_MCEERR_AO with the address of its page",
            answer == "got BUS_MCEERR_AO page 5: rewrote it",
        )
        after = program.read_line()
        tour.say(f"the program: {after}")
        tour.check(
            "a write of the whole page cleared the poison, and the mapping works again",
            after == "all 16 pages are right",
        )
        tour.check("no bad block is left", tour.request("badblocks")["ranges"] == [])
        program.close_input()
        tour.check("the program ended well", program.wait() == 0)


def _reflinks(tour: Tour) -> None:
    tour.chapter("Two processes on two reflinks of one file: one poisoned page, both are found")
    original, clone = tour.mountpoint / "original", tour.mountpoint / "clone"
    original.write_bytes(b"".join(bytes([65 + i]) * PAGE for i in range(16)))
    clone.touch()
    tour.say(f"$ daxemu reflink {original} {clone}")
    tour.request("reflink", src=original.stat().st_ino, dst=clone.stat().st_ino)
    with (
        tour.program("watch", original, "16", "early") as one,
        tour.program("watch", clone, "16", "early") as other,
    ):
        for program in (one, other):
            program.read_until("ready")
        tour.inject(original, 3 * PAGE)
        seen = [program.read_line() for program in (one, other)]
        tour.say(f"the process that maps the original: {seen[0]}")
        tour.say(f"the process that maps the clone:    {seen[1]}")
        tour.check(
            "each is signalled with an address of its own mapping",
            seen == ["BUS_MCEERR_AO addr map+0x3000 lsb 12"] * 2,
        )
        other.write("touch 3")
        consumed = other.read_line()
        tour.say(f"the second process touches the page nevertheless: {consumed}")
        tour.check(
            "consumption is BUS_MCEERR_AR at the exact address",
            consumed == "BUS_MCEERR_AR addr map+0x3000 lsb 12",
        )
        other.write("touch 4")
        tour.check("the neighbouring page is untouched", other.read_line() == "read 'E'")
        _overwrite(original, 3 * PAGE, b"D" * PAGE)
        one.write("touch 3")
        tour.check("a write of the page clears the poison of the original", one.read_line() == "read 'D'")
        other.write("touch 3")
        tour.check("the clone keeps the poison: copy on write", other.read_line().startswith("BUS_MCEERR_AR"))


def _removal(tour: Tour) -> None:
    tour.chapter("Surprise removal: 6 TiB in one range notification")
    file = tour.mountpoint / "mapped"
    file.write_bytes(b"m" * PAGE * 4)
    with tour.program("watch", file, "4") as program:
        program.read_until("ready")
        tour.say("$ daxemu remove MOUNTPOINT     (1.6 billion pages)")
        result = tour.request("remove")
        seen = program.read_line()
        tour.say(f"the process that maps the file, without early kill: {seen}")
        tour.check(
            "each process with a page present is signalled",
            seen == "BUS_MCEERR_AO addr map+0x0 lsb 12" and result["signals"] == 1,
        )
        program.write("touch 1")
        tour.check(
            "each later touch is BUS_ADRERR", program.read_line() == "BUS_ADRERR addr map+0x1000 lsb 0"
        )
        try:
            file.read_bytes()
            error = "no error"
        except OSError as caught:
            error = os.strerror(caught.errno or 0)
        tour.say(f"read(2): {error}")
        tour.check("every system call on the filesystem is EIO", error == "Input/output error")


def _overwrite(file: Path, offset: int, data: bytes) -> None:
    fd = os.open(file, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def _signals_to(tour: Tour, pid: int) -> list[dict[str, Any]]:
    """Return the SignalSent events of a process. The event may come shortly after the death of the
    process.
    """
    with Client(mount_of(tour.mountpoint), patience=PATIENCE) as client:
        for event in client.follow():
            if event["event"] == "SignalSent" and event["pid"] == pid:
                last = _events(tour)
                return [e for e in last if e["event"] == "SignalSent" and e["pid"] == pid]
    return []


def _events(tour: Tour) -> list[dict[str, Any]]:
    """Return every event so far."""
    with Client.at(tour.mountpoint) as client:
        last = client.request("status")["events"]
    with Client.at(tour.mountpoint) as client:
        return list(itertools.islice(client.follow(), last))


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
