"""Each use of direct mappings at a limit: answered right, and no step of the event loop does too much.

Counted as in tests/mount/test_limits.py. In addition: system calls of agents, areas added to the table, and
page tables looked into.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_limits import MOST
from tests.support.mount import DAXEMU
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.zygote import Zygote

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="direct mounts need root"),
    pytest.mark.timeout(150),
]
PAGE = 4096
EXTENTS = 12_000
"""Extents of a file that is mapped whole by mmap(2): docs/direct.md, "Speed"."""
PAGES = 2 * EXTENTS - 1
"""Pages of the file: each second page is a hole."""
MAPPINGS, PROCESSES = 1_000, 200
MOST_DIRECT = MOST | {"calls": 1200, "areas": 1200, "page tables": 600}
"""Units of work of one step of the event loop."""
LIMIT = 120.0

PROGRAM = """
import ctypes, mmap, os, signal, sys
path, pages = sys.argv[1], int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
file = open(path, "r+b")
for line in sys.stdin:
    match line.split():
        case ["map"]:
            view = mmap.mmap(file.fileno(), pages * 4096)
            said = "".join(map(chr, {view[page * 4096] for page in range(0, pages, 1009)}))
        case ["maps", count]:
            views = [mmap.mmap(file.fileno(), 4096, offset=8192 * (n % 7)) for n in range(int(count))]
            said = len({view[0] for view in views})
        case ["fork"]:
            if not (child := os.fork()):
                views[-1][1:2] = b"c"
                os._exit(0)
            said = os.waitpid(child, 0)[1]
        case ["load", at]:
            said = chr(view[int(at)])
        case ["size"]:
            said = view.size()
        case ["family", count]:
            signal.signal(signal.SIGBUS, signal.SIG_IGN)  # a removal signals this process, too
            told, ready = os.pipe(), os.pipe()
            family = []
            for _ in range(int(count)):
                if not (child := os.fork()):
                    signal.signal(signal.SIGBUS, lambda *_: os.write(told[1], b"s"))
                    libc.prctl(33, 1, 1, 0, 0)  # PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY
                    view[0]
                    os.write(ready[1], b"r")
                    while True:
                        signal.pause()
                family.append(child)
            for _ in family:
                os.read(ready[0], 1)
            said = len(family)
        case ["signals"]:
            got = 0
            while got < len(family):
                got += len(os.read(told[0], 4096))
            said = got
        case ["end"]:
            for child in family:
                os.kill(child, signal.SIGKILL)
            said = len([os.wait() for _ in family])
    print(said, flush=True)
"""


class Program:
    """A program under ``daxemu run``, which answers each line of input with one line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, line: str) -> str:
        """Send a line, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the program ended at {line!r}"
        return answer.removesuffix("\n")


@contextmanager
def program(mount: QuickMount, path: Path, pages: int) -> Iterator[Program]:
    """Start a program that maps pages of a file."""
    argv = [*DAXEMU, "run", str(mount.path), "--", sys.executable, "-c", PROGRAM, str(path), str(pages)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    try:
        yield Program(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def measured(tmp_path: Path, zygote: Zygote) -> Iterator[QuickMount]:
    """A direct mount of 1 GiB whose supervisor writes its longest step to ``steps``."""
    with quick_mount_at(tmp_path, zygote, mount=False, direct=True) as mount:
        mount.mount("measure_steps", str(tmp_path / "steps"))
        yield mount


def _of_many_extents(mount: QuickMount) -> Path:
    path = mount.path / "extents"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for number in range(EXTENTS):
        os.pwrite(fd, b"x", number * 2 * PAGE)
    os.ftruncate(fd, PAGES * PAGE)
    os.close(fd)
    return path


def map_many_extents(mount: QuickMount) -> None:
    """A file of many extents mapped."""
    with program(mount, _of_many_extents(mount), PAGES) as mapper:
        assert mapper.ask("map") in ("x\0", "\0x")


def map_many_shared_extents(mount: QuickMount) -> None:
    """A file of many extents mapped, each of which another file has as well."""
    path = _of_many_extents(mount)
    mount.run("reflink", path, mount.path / "clone")
    with program(mount, path, PAGES) as mapper:
        assert mapper.ask("map") in ("x\0", "\0x")


def truncate_many_extents(mount: QuickMount) -> None:
    """A mapped file of many extents cut to the first, and made longer again."""
    path = _of_many_extents(mount)
    with program(mount, path, PAGES) as mapper:
        mapper.ask("map")
        assert mapper.ask(f"load {8 * PAGE}") == "x"
        os.truncate(path, 1)
        os.truncate(path, PAGES * PAGE)
        assert mapper.ask("load 0") == "x"
        assert mapper.ask(f"load {8 * PAGE}") == "\0"


def clone_many_extents(mount: QuickMount) -> None:
    """A mapped file of many extents cloned: each store makes a copy from then on."""
    path = _of_many_extents(mount)
    with program(mount, path, PAGES) as mapper:
        mapper.ask("map")
        mount.run("reflink", path, mount.path / "clone")
        assert mapper.ask(f"load {8 * PAGE}") == "x"


def fork_with_many_mappings(mount: QuickMount) -> None:
    """A fork of a program with many mappings."""
    with program(mount, mount.make_file("f", 16), 16) as mapper:
        assert mapper.ask(f"maps {MAPPINGS}") == "7"
        assert mapper.ask("fork") == "0"


def poison_a_page_of_many_processes(mount: QuickMount) -> None:
    """Poison of a page that many processes have present: each gets its signal."""
    path = mount.make_file("f", 16)
    with program(mount, path, 16) as family:
        family.ask("map")
        assert family.ask(f"family {PROCESSES}") == str(PROCESSES)
        mount.inject("f", (0, PAGE))
        assert family.ask("signals") == str(PROCESSES)
        assert family.ask("end") == str(PROCESSES)


def remove_with_many_processes(mount: QuickMount) -> None:
    """Removal of a device that many processes map."""
    path = mount.make_file("f", 16)
    with program(mount, path, 16) as family:
        family.ask("map")
        family.ask(f"family {PROCESSES}")
        mount.run("remove", mount.path)
        assert family.ask("signals") == str(PROCESSES)
        assert family.ask("end") == str(PROCESSES)


CASES = [
    map_many_extents,
    map_many_shared_extents,
    truncate_many_extents,
    clone_many_extents,
    fork_with_many_mappings,
    poison_a_page_of_many_processes,
    remove_with_many_processes,
]


@pytest.mark.parametrize("use_at_its_limit", CASES, ids=lambda case: case.__name__)
def test_no_step_of_the_event_loop_does_too_much(
    measured: QuickMount,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    use_at_its_limit: Callable[[QuickMount], None],
) -> None:
    use_at_its_limit(measured)
    steps = json.loads((tmp_path / "steps").read_text())
    longest: dict[str, Any] = steps["longest"]
    record_property("longest step, ms of CPU", round(longest["cpu_ms"]))
    print(f"longest step {longest['cpu_ms']:.0f} ms of CPU: {longest}; most of one step: {steps['most']}")
    assert {unit: most for unit, most in steps["most"].items() if most > MOST_DIRECT[unit]} == {}
    assert measured.events("LoopStalled") == []
