"""The worked example of docs/worked-example.md: one page, two files, two processes, drawn after each event.

Everything drawn is read from a real mount at that moment: the control socket (media, badblocks, links), each
process's own /proc/self/pagemap (page tables) and signal handler (signals). ``python -m
tests.support.worked_example`` prints all drawings.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.actor import Actor
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.scene import PAGE, Scene, ask, present, signals_of
from tests.support.zygote import Zygote

FILES = ("db", "snap")
CODES = {"BUS_MCEERR_AO": "AO", "BUS_MCEERR_AR": "AR"}
PATIENCE = 20.0


class Drawing(NamedTuple):
    """State after ``event``."""

    event: str
    text: str


class Example:
    """The files ``db`` and ``snap`` (its clone) of one page, mapped by p0 and p1."""

    def __init__(self, mount: QuickMount, scene: Scene) -> None:
        self._mount = mount
        mount.make_file("db", 1)
        mount.run("reflink", mount.path / "db", mount.path / "snap")
        self.p0 = self._process(scene, "p0", "db", "mcekill early")
        self.p1 = self._process(scene, "p1", "snap", "mcekill late")
        self._signals: dict[str, list[str]] = {"p0": [], "p1": []}
        self._pages: dict[int, str] = {}
        self._collected = ""
        """The processes that the failure under way has collected."""

    def _process(self, scene: Scene, name: str, file: str, policy: str) -> Actor:
        actor = scene.actor(name)
        for command in (policy, f"open 0 {file} rw", "mmap 0 0 0 1 shared"):
            ask(actor, command)
        assert actor.cmd("tr 0 0").ok == "A"
        return actor

    def draw(self, event: str) -> Drawing:
        """Read the state from the mount and the processes."""
        with self._mount.client() as client:
            maps = [client.request("map", ino=(self._mount.path / name).stat().st_ino) for name in FILES]
            sectors = client.request("badblocks")["sectors"]
            turns = client.request("internals")["turns"]
            damaged = [lost["path"].removeprefix("/") for lost in client.request("damaged")["files"]]
        extents = [found["extents"][0] for found in maps]
        for extent in extents:
            self._pages.setdefault(extent["device_offset"], chr(ord("A") + len(self._pages)))
        links = [self._link(name, extent) for name, extent in zip(FILES, extents, strict=True)]
        processes = [self._tables("p0", self.p0, "db"), self._tables("p1", self.p1, "snap")]
        signals = [f"{name}: {', '.join(got) or 'no signal'}" for name, got in self._signals.items()]
        lines = [
            f"media        {'   '.join(self._media(extents))}",
            f"badblocks    {sectors} sectors",
            *_aligned("links", links),
            f"damaged      {', '.join(damaged) or 'none'}",
            f"incident     {'under way' + self._collected if turns else 'none'}",
            f"page tables  {'   '.join(processes)}",
            f"processes    {'   '.join(signals)}",
        ]
        return Drawing(event, "\n".join(lines) + "\n")

    def _media(self, extents: list[dict[str, Any]]) -> Iterator[str]:
        poisoned = {self._pages[extent["device_offset"]]: extent["poisoned"] for extent in extents}
        for page in sorted(poisoned):
            yield f"page {page}: {'poison' if poisoned[page] else 'readable'}"

    def _link(self, name: str, extent: dict[str, Any]) -> str:
        shared = f"proxy ({extent['shared_by']} links) ── " if extent["shared_by"] > 1 else ""
        return f"{name}, page 0 ── {shared}page {self._pages[extent['device_offset']]}"

    def _tables(self, name: str, actor: Actor, file: str) -> str:
        return f"{name}: {file} {'present' if present(actor, 0, 0) else 'not present'}"

    def name_collected(self, tasks: Path) -> None:
        """Read the processes found by collect."""
        names = {self.p0.pid: "p0", self.p1.pid: "p1"}
        files = {(self._mount.path / name).stat().st_ino: name for name in FILES}
        lines = [map(int, line.split()) for line in tasks.read_text().splitlines()]
        found = sorted(f"{names[pid]} ({files[ino]}, page {index})" for pid, ino, index in lines)
        self._collected = f", collected {', '.join(found)}"

    def take_signals(self) -> None:
        """Make each process report the signals received since the last call."""
        for name, actor in (("p0", self.p0), ("p1", self.p1)):
            for signal in signals_of(actor):
                assert (signal["addr"], signal["lsb"]) == ("m0+0x0", 12)
                self._signals[name].append(CODES[signal["code"]])


def _aligned(title: str, lines: list[str]) -> list[str]:
    return [f"{title if number == 0 else '':13}{line}" for number, line in enumerate(lines)]


def play(directory: Path, zygote: Zygote) -> Iterator[Drawing]:
    """Play the example on a mount below ``directory``; yield the state after each event."""
    steps = {name: directory / name for name in ("poison", "collect", "revoke")}
    for step in steps.values():
        step.mkdir()
    with quick_mount_at(directory, zygote, 1 << 26, mount=False) as mount:
        mount.mount("stop_at_each_step", str(directory))
        with Scene(mount) as scene, ThreadPoolExecutor(1) as pool:
            example = Example(mount, scene)
            yield example.draw("start")
            injecting = pool.submit(mount.inject, "db", (0, PAGE))
            for name, step in steps.items():
                _wait_for(step / "stopped")
                if name == "collect":
                    example.name_collected(step / "tasks")
                yield example.draw(name)
                (step / "go").touch()
            assert injecting.result(PATIENCE)["ranges"][0]["outcome"] == "Recovered"
            mount.run("settle", mount.path)
            example.take_signals()
            yield example.draw("signal")
            assert example.p1.cmd("tr 0 0").faulted
            example.take_signals()
            yield example.draw("consume")
            ask(example.p0, f"pwrite 0 0 {PAGE} Z")
            assert example.p0.cmd("tr 0 0").ok == "Z"
            yield example.draw("rewrite")
            mount.run("clear", mount.path / "snap")
            assert example.p1.cmd("tr 0 0").ok == "0"
            example.take_signals()
            yield example.draw("clear")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def main() -> None:
    """Print every drawing."""
    with tempfile.TemporaryDirectory() as scratch, Zygote() as zygote:
        for event, text in play(Path(scratch), zygote):
            sys.stdout.write(f"{event}\n{text}\n")


if __name__ == "__main__":
    main()
