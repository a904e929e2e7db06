"""Filesystems under comparison, all mounted at the same time, and the measurement of one line."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.report import Line, interleaved, record
from tests.support.mount import dax_mount_at

OURS, PASSTHROUGH, TMPFS, PYFUSE3 = "daxemu", "passthrough_ll", "tmpfs", "pyfuse3 memory"
SECTION = "Filesystem"
SHM = Path("/dev/shm")
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
PASSTHROUGH_MODES = (
    ("never", "cache=never"),
    ("auto", "cache=auto"),
    ("always", "cache=always"),
    ("writeback", "cache=always,writeback"),
    ("never -s", "cache=never"),
    ("auto -s", "cache=auto"),
    ("always -s", "cache=always"),
    ("writeback -s", "cache=always,writeback"),
)
"""Options to try for each line; ``-s`` is one thread. libfuse splices its requests by default."""
PATIENCE = 10.0
PROGRAM_PATIENCE = 300.0


def compiled(source: Path, directory: Path, *flags: str) -> Path:
    """The binary of one C file."""
    binary = directory / source.stem
    subprocess.run(["gcc", "-O2", "-o", binary, source, *flags], check=True)
    return binary


@dataclass
class Contender:
    """Filesystem at ``path``. ``mode``: name of the set-up, where several are possible."""

    name: str
    path: Path
    mode: str = ""


@dataclass
class Work:
    """Line of the table. ``measure`` is called with a directory of the contender, and returns a figure in
    ``unit``; ``prepare`` is called once for each contender before. ``target`` is the least ratio to
    ``against``. ``maps``: the line needs shared mappings, which a mount without a cache does not offer.
    """

    name: str
    unit: str
    measure: Callable[[Path], float]
    prepare: Callable[[Path], object] = lambda directory: None
    more_is_better: bool = False
    target: float | None = None
    against: str = PASSTHROUGH
    rounds: int = 7
    maps: bool = False


class Contest:
    """Resources of all lines: the contenders, and the program that puts load on them."""

    def __init__(self, load: Path, contenders: list[Contender]) -> None:
        self._load = load
        self._contenders = contenders

    def race(self, work: Work, *others: Contender, notes: dict[str, str] | None = None) -> None:
        """Measure a line, and record the figures; ``others`` replaces the contest's contenders other than
        daxemu.

        Of several modes of a contender, one trial selects the best mode for the line.
        """
        rivals = list(others) if others or notes else self._contenders[1:]
        by_name: dict[str, list[tuple[Contender, Path]]] = {}
        for contender in [self._contenders[0], *rivals]:
            if work.maps and contender.mode.startswith("never"):
                continue
            directory = contender.path / "work"
            directory.mkdir()
            by_name.setdefault(contender.name, []).append((contender, directory))
        sides = {}
        notes = dict(notes or {})
        for name, modes in by_name.items():
            for _, directory in modes:
                work.prepare(directory)
            best, directory = modes[0]
            if len(modes) > 1:
                trials = [(work.measure(directory), index) for index, (_, directory) in enumerate(modes)]
                best, directory = modes[(max if work.more_is_better else min)(trials)[1]]
                notes[name] = best.mode
            sides[name] = partial(work.measure, directory)
        figures = interleaved(sides, work.rounds)
        record(
            Line(
                SECTION, work.name, work.unit, figures, work.more_is_better, work.against, work.target, notes
            )
        )
        for modes in by_name.values():
            for _, directory in modes:
                shutil.rmtree(directory)

    def load(self, verb: str, *arguments: str | Path | int) -> float:
        """Return the seconds that tests/bench/load.c reports for a piece of work."""
        done = subprocess.run(
            [self._load, verb, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PROGRAM_PATIENCE,
        )
        assert done.returncode == 0, f"load {verb} {arguments}: {done.stderr}"
        return float(done.stdout)


@contextmanager
def contest() -> Iterator[Contest]:
    """All contenders, mounted; unmounted and deleted afterwards."""
    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="daxemu-bench-", dir=SHM))
        stack.callback(shutil.rmtree, scratch)
        mounts = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="daxemu-bench-")))
        made = stack.enter_context(dax_mount_at(mounts, "8G"))
        found = [Contender(OURS, made.path)]
        passthrough = _passthrough(mounts)
        for mode, options in PASSTHROUGH_MODES:
            single = ["-s"] if mode.endswith("-s") else []
            source = scratch / mode
            source.mkdir()
            command: list[str | Path] = [passthrough, "-f", *single, "-o"]
            command.append(f"source={source},{options},allow_other")
            path = stack.enter_context(_served(mounts / mode, command))
            found.append(Contender(PASSTHROUGH, path, mode))
        memory = [sys.executable, "-m", "tests.bench.memory_fs"]
        found.append(Contender(PYFUSE3, stack.enter_context(_served(mounts / "memory", memory))))
        plain = scratch / "tmpfs"
        plain.mkdir()
        found.append(Contender(TMPFS, plain))
        yield Contest(compiled(Path(__file__).with_name("load.c"), mounts), found)


def _passthrough(directory: Path) -> Path:
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True
    )
    return compiled(EXAMPLES / "passthrough_ll.c", directory, *flags.stdout.split())


def _more_files() -> None:
    """passthrough_ll keeps a descriptor for each file that the kernel knows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _served(path: Path, command: Sequence[str | Path]) -> Iterator[Path]:
    """A FUSE server, mounted at ``path``."""
    path.mkdir()
    server = subprocess.Popen([*command, path], preexec_fn=_more_files)
    try:
        deadline = time.monotonic() + PATIENCE
        while not os.path.ismount(path):
            assert server.poll() is None, f"{command} ended with {server.returncode}"
            assert time.monotonic() < deadline, f"{command} does not mount"
            time.sleep(0.01)
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False)
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.send_signal(signal.SIGKILL)
            server.wait()
