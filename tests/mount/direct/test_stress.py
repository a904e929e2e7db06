"""Loads on direct mappings: many extents, mappings, threads and processes; no access fails or is wrong.

The steps are in tests/victims/stress.c. DAXEMU_STRESS multiplies the lengths of the loads (``make soak``).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.host.direct.supervised import agents
from tests.support.actor import compile_victim
from tests.support.files import content
from tests.support.mount import PATIENCE, DaxMount
from tests.support.syscalls import clone_range

FACTOR = int(os.environ.get("DAXEMU_STRESS", "1"))
LIMIT = 60 * FACTOR
"""Time limit of a program in seconds. A hang fails the test."""
PAGE = 4096

pytestmark = [pytest.mark.mount, pytest.mark.timeout(2 * LIMIT)]


@pytest.fixture
def program() -> Path:
    return compile_victim("stress")


def holes_between(path: Path, extents: int) -> Path:
    """Make a file of ``extents`` extents of a page, with a hole of a page behind each. A page begins with its
    number, as a 64-bit integer.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for page in range(0, 2 * extents, 2):
        os.pwrite(fd, page.to_bytes(8, "little").ljust(PAGE, b"\0"), page * PAGE)
    os.ftruncate(fd, 2 * extents * PAGE)
    os.close(fd)
    return path


def under_run(mount: DaxMount, *command: str | Path | int) -> None:
    argv = [*mount.wrapper, *map(str, command)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), (
        done.stdout + done.stderr + str(mount.events("DirectMappingRefused"))
    )


def nothing_is_left(mount: DaxMount) -> None:
    """Assert that no agent has the media open, and that the supervisor has met no unexpected error."""
    assert not mount.events("UnexpectedError")


def test_more_extents_than_an_address_space_may_have_vmas(dax_mount: DaxMount, program: Path) -> None:
    """vm.max_map_count is 65,530."""
    path = holes_between(dax_mount.path / "f", 10_000 * FACTOR)
    under_run(dax_mount, program, "extents", path)
    nothing_is_left(dax_mount)


@pytest.mark.parametrize(("vmas", "extents"), [(60_000, 4000), (65_470, 500)])
def test_a_program_with_many_vmas_of_its_own(
    dax_mount: DaxMount, program: Path, vmas: int, extents: int
) -> None:
    path = holes_between(dax_mount.path / "f", extents)
    under_run(dax_mount, program, "vmas", path, vmas)
    nothing_is_left(dax_mount)


def test_a_thousand_mappings_in_one_process(dax_mount: DaxMount, program: Path) -> None:
    under_run(dax_mount, program, "many", dax_mount.make_file("f", 16))
    nothing_is_left(dax_mount)


def test_eight_threads_map_store_and_unmap(dax_mount: DaxMount, program: Path) -> None:
    files = [dax_mount.make_file(name, 16) for name in "fghi"]
    under_run(dax_mount, program, "loop", *files)
    nothing_is_left(dax_mount)


def test_eight_threads_store_while_the_file_changes(dax_mount: DaxMount, program: Path) -> None:
    files = [dax_mount.make_file(name, 16) for name in "fg"]
    under_run(dax_mount, program, "changes", *files, 500 * FACTOR)
    nothing_is_left(dax_mount)


def test_two_hundred_processes_alive(dax_mount: DaxMount, program: Path) -> None:
    under_run(dax_mount, program, "tree", dax_mount.make_file("f", 16))
    nothing_is_left(dax_mount)


def test_a_program_that_executes_itself_again_and_again(dax_mount: DaxMount, program: Path) -> None:
    under_run(dax_mount, program, "execs", dax_mount.make_file("f", 16), 200 * FACTOR)
    nothing_is_left(dax_mount)


@pytest.mark.parametrize("limit", [4, 8])
def test_a_program_without_a_free_descriptor(dax_mount: DaxMount, program: Path, limit: int) -> None:
    under_run(dax_mount, program, "descriptors", dax_mount.make_file("f", 16), limit)
    nothing_is_left(dax_mount)


def test_other_ways_into_a_mapping(dax_mount: DaxMount, program: Path) -> None:
    """process_vm_readv(2), /proc/PID/mem, splice(2), sendfile(2), advice, and a child without the mapping."""
    under_run(dax_mount, program, "interfaces", dax_mount.make_file("f", 16), dax_mount.make_file("g", 1))
    nothing_is_left(dax_mount)


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_a_debugger_and_a_core_over_poison(dax_mount: DaxMount, program: Path, tmp_path: Path) -> None:
    """A store by ptrace(2) is in the file. Poison delays neither gcore nor the program."""
    path = dax_mount.make_file("f", NUMBERS)
    with storing(dax_mount, program, path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        address = next(line.split("-")[0] for line in lines if "/media" in line)
        dax_mount.inject("f", (3 * PAGE, PAGE))
        commands = [f"set *(char*)0x{address} = 33", f"gcore {tmp_path}/core", "detach"]
        words = [word for command in commands for word in ("-ex", command)]
        done = subprocess.run(
            ["gdb", "-batch", "-p", str(process.pid), *words], capture_output=True, text=True, timeout=LIMIT
        )
        assert "Saved corefile" in done.stdout, done.stdout + done.stderr
        with path.open("rb", buffering=0) as file:
            assert file.read(1) == b"!"
    nothing_is_left(dax_mount)


# -- stores meanwhile

NUMBERS = 16
"""Pages of a file that a program stores increasing numbers to, one page after the other, in rounds."""


@contextmanager
def storing(mount: DaxMount, program: Path, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that stores to each page of a file in turn. It is killed at the end."""
    argv = [*mount.wrapper, str(program), "numbers", str(path), str(NUMBERS)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def numbers(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), PAGE)]


def test_snapshots_of_a_file_that_is_stored_to_are_of_one_moment(dax_mount: DaxMount, program: Path) -> None:
    """In a round of the program, pages from the first on are one number ahead of the others."""
    path = dax_mount.make_file("f", NUMBERS)
    source, target = (os.open(dax_mount.path / name, os.O_RDWR | os.O_CREAT) for name in "fg")
    states = set()
    with storing(dax_mount, program, path):
        while numbers(content(source))[0] > 1 << 40:  # the letters of the file
            time.sleep(0.01)
        for _ in range(500):
            clone_range(target, source)
            got = numbers(content(target))
            assert got == sorted(got, reverse=True)
            assert got[0] - got[-1] <= 1
            states.add(tuple(got))
    assert len(states) > 10, "the program did not store meanwhile"
    os.close(source)
    os.close(target)
    nothing_is_left(dax_mount)


@pytest.mark.parametrize("end", ["kill", "remove", "umount", "powerfail"])
def test_the_end_of_the_mount_while_a_program_stores(dax_mount: DaxMount, program: Path, end: str) -> None:
    """The program ends with SIGBUS, the agents end, and every store from before is in the file, because the
    media has it at once.
    """
    path = dax_mount.make_file("f", NUMBERS)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # the name and the blocks of the file: a store needs no sync
    with storing(dax_mount, program, path) as process:
        deadline = time.monotonic() + PATIENCE
        while (before := numbers(path.read_bytes())[-1]) > 1 << 40:
            assert time.monotonic() < deadline
        if end == "kill":
            os.kill(dax_mount.json("status", dax_mount.path)["pid"], signal.SIGKILL)
        elif end == "umount":
            dax_mount.umount("--force")
        else:
            dax_mount.run(end, dax_mount.path)
        assert process.wait(PATIENCE) == -signal.SIGBUS
    while agents(dax_mount.device / "media"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if end in ("kill", "remove"):
        dax_mount.run("umount", "--force", dax_mount.path)
    dax_mount.run("fsck", dax_mount.device)
    dax_mount.mount("--direct")
    after = numbers(path.read_bytes())
    assert min(after) >= before
    assert after == sorted(after, reverse=True)
    assert after[0] - after[-1] <= 1
