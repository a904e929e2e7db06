"""Loads on direct mappings: many extents, mappings, threads and processes; no access fails or is wrong.

The steps are in tests/victims/stress.c. DAXEMU_STRESS multiplies the lengths of the loads (``make soak``).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.actor import compile_victim
from tests.support.mount import DAXEMU, DaxMount

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
    argv = [*DAXEMU, "run", str(mount.path), "--", *map(str, command)]
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
