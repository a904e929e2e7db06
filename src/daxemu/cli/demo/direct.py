"""The chapter of the tour about direct mappings, on a mount of its own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from daxemu.cli.demo.programs import Program, compile_program
from daxemu.cli.demo.tour import Tour, unmount
from daxemu.client import Client
from daxemu.host.checkup import direct_mappings
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.private_path import PrivatePath
from daxemu.supervisor.settings import MountOptions
from daxemu.supervisor.spawn import spawn
from daxemu.uapi import PAGE_SIZE

_PAGES = 4


def chapter(tour: Tour) -> None:
    """Show a direct mapping. On a machine without direct mappings, one line says why."""
    tour.chapter("Direct mappings: a program under daxemu run maps the media itself")
    if (why_not := _obstacle()) is not None:
        tour.say(f"left out: {why_not}")
        return
    with _direct_mount(tour) as (device, mountpoint):
        _show(tour, device, mountpoint)


def _obstacle() -> str | None:
    """Return the reason why no program here can have a direct mapping, with a fix; None if one can."""
    if os.geteuid() != 0:
        return "direct mappings need root: run this as root"
    finding = direct_mappings()
    return None if finding.verdict == "ok" else f"{finding.found}: {finding.mend}"


@contextmanager
def _direct_mount(tour: Tour) -> Iterator[tuple[Path, Path]]:
    """Yield a new device, and the mountpoint of its direct mount."""
    with ExitStack() as undo:
        shared = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tour.scratch)
        device, mountpoint = shared / f"{tour.scratch.name}-direct", tour.scratch / "direct-mnt"
        mountpoint.mkdir()
        undo.callback(shutil.rmtree, device, ignore_errors=True)
        undo.callback(unmount, mountpoint)
        DeviceDir.create(device, DeviceConfig(size=64 << 20))
        spawn(device, mountpoint, MountOptions(direct=True))
        tour.say(f"$ daxemu mount --direct {device} {mountpoint}")
        compile_program("direct", tour.scratch)
        yield device, mountpoint


def _show(tour: Tour, device: Path, mountpoint: Path) -> None:
    original, clone = mountpoint / "original", mountpoint / "clone"
    original.write_bytes(b"o" * PAGE_SIZE * _PAGES)
    clone.touch()
    with Client.at(mountpoint) as client:
        client.request("reflink", src=original.stat().st_ino, dst=clone.stat().st_ino)
        tour.say(f"$ daxemu reflink {original} {clone}")
        tour.say(f"$ daxemu run {mountpoint} -- ./direct original clone")
        run = [sys.executable, "-m", "daxemu", "run", str(mountpoint), "--"]
        with Program([*run, str(tour.scratch / "direct"), str(original), str(clone)]) as program:
            _play(tour, program, client, device, original)


def _play(tour: Tour, program: Program, client: Client, device: Path, original: Path) -> None:
    def ask(order: str) -> str:
        program.write(order)
        return program.read_line()

    tour.check("mmap(2) with MAP_SYNC is accepted", program.read_line() == "mapped with MAP_SYNC")
    tour.check("the two reflinks share each page frame", ask("frames") == "one page frame")
    ask("store")
    (first, *_) = client.request("map", ino=original.stat().st_ino)["extents"]
    with (
        closing(PrivatePath.at(device, reading=True)) as root,
        open((root / "media").open(os.O_RDONLY), "rb") as media,
    ):
        on_media = os.pread(media.fileno(), 1, first["device_offset"])
    tour.say(f"the program stores 'S' into the original; the media holds {on_media.decode()!r}")
    tour.check("a store is on the media at once, without msync(2)", on_media == b"S")
    frames, clone = ask("frames"), ask("clone")
    tour.say(f"afterwards: {frames}; the clone reads {clone}")
    tour.check("the store copied the page first", (frames, clone) == ("two page frames", "'o'"))
    client.request("inject", ino=original.stat().st_ino, ranges=[[PAGE_SIZE, PAGE_SIZE]])
    tour.say(f"$ daxemu inject {original} --offset {PAGE_SIZE:#x}")
    consumed = ask("load")
    tour.say(f"the program loads byte 0x1123: {consumed}")
    tour.check(
        "poison is BUS_MCEERR_AR at the exact address", consumed == "BUS_MCEERR_AR addr map+0x1123 lsb 12"
    )
