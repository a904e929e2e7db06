"""Seeded workload of single system calls, and the tree after each call.

Everything follows from the seed. The crash loop computes the history; another process executes the history
and counts, in a file outside of the mount, the calls made and the calls promised by fsync.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support.syscalls import (
    KEEP_SIZE,
    PUNCH_HOLE,
    RENAME_EXCHANGE,
    ZERO_RANGE,
    clone_range,
    fallocate,
    renameat2,
)

PAGE = 4096
MOST = 24 * PAGE
"""Largest size of a file, in bytes."""
COUNTERS = struct.Struct("=QQ")
"""Number of operations begun; the number at the last fsync that returned."""
DIRECTORY = None
Shape = dict[str, tuple[str, int] | None]
"""Of each name: the first of all names of the same file, and its size; None for a directory."""
VERBS = {
    "create": 6, "write": 14, "append": 8, "mapped": 3, "truncate": 6, "punch": 4, "zero": 3,
    "allocate": 3, "clone": 6, "copy": 3, "rename": 4, "exchange": 2, "link": 3, "unlink": 4, "mkdir": 1,
    "fsync": 9, "fsyncdir": 2,
}  # fmt: skip
"""Weight of each operation. A further one, "stored" (through a mapping), is done by other processes."""


class Op(NamedTuple):
    """One system call, or a system call with the fsync after it. ``b`` and ``c``: arguments."""

    verb: str
    name: str
    other: str = ""
    b: int = 0
    c: int = 0
    seed: int = 0

    def data(self) -> bytes:
        """Return the bytes to write."""
        return random.Random(self.seed).randbytes(self.c)


@dataclass
class State:
    """``names``: file numbers, or DIRECTORY. ``files``: the bytes of each."""

    names: dict[str, int | None] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> State:
        """Return a copy for independent changes; bytes are never changed in place."""
        return State(dict(self.names), dict(self.files))

    def shape(self) -> Shape:
        """Return the part of the tree visible without reading files."""
        return shape(
            self.names, {name: len(self.files[n]) for name, n in self.names.items() if n is not DIRECTORY}
        )


def shape(numbers: Mapping[str, int | None], sizes: Mapping[str, int]) -> Shape:
    """Return the shape of a tree whose names stand for the files with these ``numbers``; any numbers are
    allowed.
    """
    first: dict[int, str] = {}
    for name, number in sorted(numbers.items()):
        if number is not DIRECTORY:
            first.setdefault(number, name)
    return {name: None if n is DIRECTORY else (first[n], sizes[name]) for name, n in numbers.items()}


def history(seed: int, length: int) -> tuple[list[Op], list[State]]:
    """The operations, and the states: ``states[i]`` is before operation i."""
    rng, state = random.Random(seed), State()
    ops: list[Op] = []
    states = [state]
    while len(ops) < length:
        op = _choose(rng, state)
        state = after(state, op, len(ops))
        ops.append(op)
        states.append(state)
    return ops, states


def _choose(rng: random.Random, state: State) -> Op:
    files = sorted(name for name, number in state.names.items() if number is not DIRECTORY)
    directories = ["", *sorted(name + "/" for name, n in state.names.items() if n is DIRECTORY)]
    if len(files) < 3:
        return Op("create", f"{rng.choice(directories)}f{rng.randrange(1 << 30):x}")
    if len(files) > 24:
        return Op("unlink", rng.choice(files))
    (verb,) = rng.choices([*VERBS], [*VERBS.values()])
    name, other = rng.choice(files), rng.choice(files)
    size = len(state.files[state.names[name] or 0])
    at, length = rng.randrange(size + PAGE), rng.randrange(1, 3 * PAGE)
    if rng.random() < 0.4:
        at, length = at // PAGE * PAGE, -(-length // PAGE) * PAGE
    fresh = f"{rng.choice(directories)}{rng.randrange(1 << 30):x}"
    if verb == "mapped" and not size:
        verb = "append"
    if verb == "append":
        at = size
    if verb in ("clone", "copy") and state.names[name] == state.names[other]:
        verb = "write"
    match verb:
        case "create" | "mkdir" | "fsyncdir":
            return Op(verb, fresh if verb != "fsyncdir" else rng.choice(directories).rstrip("/"))
        case "write" | "append" | "punch" | "zero" | "allocate":
            at = min(at, MOST - 1)
            return Op(verb, name, b=at, c=min(length, MOST - at), seed=rng.randrange(1 << 30))
        case "mapped":
            return Op(verb, name, b=rng.randrange(size), c=length, seed=rng.randrange(1 << 30))
        case "truncate":
            return Op(verb, name, b=rng.choice([0, at % (size + 1), min(at + length, MOST)]))
        case "clone" | "copy" | "exchange":
            return Op(verb, name, other)
        case "rename":
            return Op(verb, name, rng.choice([other, fresh]))
        case "link":
            return Op(verb, name, fresh)
    return Op(verb, name)


def after(state: State, op: Op, number: int) -> State:
    """The state after operation ``number`` was done whole."""
    then = state.copy()
    names, files = then.names, then.files
    target = names.get(op.name)
    old = files[target] if target is not None else b""

    def put(at: int, data: bytes, size: int | None = None) -> None:
        whole = bytearray(old.ljust(max(len(old), at + len(data)), b"\0"))
        whole[at : at + len(data)] = data
        files[target or 0] = bytes(whole[:size])

    match op.verb:
        case "create":
            names[op.name] = number + 1
            files[number + 1] = b""
        case "mkdir":
            names[op.name] = DIRECTORY
        case "write" | "append":
            put(op.b, op.data())
        case "mapped" | "stored":
            put(op.b, op.data()[: len(old) - op.b])
        case "punch":
            put(op.b, bytes(op.c), len(old))
        case "zero":
            put(op.b, bytes(op.c))
        case "allocate":
            files[target or 0] = old.ljust(op.b + op.c, b"\0")
        case "truncate":
            files[target or 0] = old[: op.b].ljust(op.b, b"\0")
        case "clone" | "copy":
            data = files[names[op.other] or 0]
            files[target or 0] = data + old[len(data) :]
        case "rename" if names[op.name] != names.get(op.other):
            names[op.other] = names.pop(op.name)
        case "exchange":
            names[op.name], names[op.other] = names[op.other], names[op.name]
        case "link":
            names[op.other] = names[op.name]
        case "unlink":
            del names[op.name]
    return then


# -- in the other process


@contextmanager
def _opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def do(top: Path, op: Op) -> bool:
    """Apply an operation; return True if the operation promises everything before."""
    path, other = top / op.name, top / op.other
    match op.verb:
        case "mkdir":
            path.mkdir()
        case "unlink":
            path.unlink()
        case "rename":
            path.rename(other)
        case "exchange":
            renameat2(path, other, RENAME_EXCHANGE)
        case "link":
            other.hardlink_to(path)
        case "truncate":
            os.truncate(path, op.b)
        case "fsyncdir":
            with _opened(path, os.O_RDONLY) as fd:
                os.fsync(fd)
            return True
        case _:
            with _opened(path, os.O_RDWR | os.O_CREAT * (op.verb == "create")) as fd:
                return _do_open(fd, other, op)
    return False


def _do_open(fd: int, other: Path, op: Op) -> bool:
    match op.verb:
        case "write" | "append":
            os.pwrite(fd, op.data(), op.b)
        case "mapped":
            with mmap.mmap(fd, 0) as view:
                data = op.data()[: len(view) - op.b]
                view[op.b : op.b + len(data)] = data
                view.flush()
            return True
        case "punch":
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, op.b, op.c)
        case "zero":
            fallocate(fd, ZERO_RANGE, op.b, op.c)
        case "allocate":
            fallocate(fd, 0, op.b, op.c)
        case "clone" | "copy":
            with _opened(other, os.O_RDONLY) as source:
                size = os.fstat(source).st_size
                if op.verb == "clone" and size:
                    with suppress(_Unsharable):
                        _clone(fd, source)
                        return False
                done = 0
                while done < size:
                    done += os.copy_file_range(source, fd, size - done, done, done)
        case "fsync":
            os.fsync(fd)
            return True
    return False


class _Unsharable(Exception):
    """The source ends inside a block, and the target goes on behind the block."""


def _clone(fd: int, source: int) -> None:
    try:
        clone_range(fd, source)
    except OSError as error:
        if error.errno == 22:
            raise _Unsharable from error
        raise


def execute(seed: int, length: int, directory: str, counters: str) -> None:
    """Do the operations of ``history(seed, length)`` below ``directory`` until the mount is gone."""
    libc = ctypes.CDLL(None)
    libc.signal(7, 0)  # SIGBUS when the mount goes while a page is stored to: the end, quietly
    ops, _ = history(seed, length)
    with open(counters, "r+b") as file, mmap.mmap(file.fileno(), COUNTERS.size) as shared:
        promised = 0
        for number, op in enumerate(ops):
            COUNTERS.pack_into(shared, 0, number + 1, promised)
            try:
                promises = do(Path(directory), op)
            except OSError as error:
                if error.errno in (103, 107, 5, 2):  # ECONNABORTED, ENOTCONN, EIO, ENOENT: the mount is gone
                    return
                raise
            if promises:
                promised = number + 1
                COUNTERS.pack_into(shared, 0, number + 1, promised)
