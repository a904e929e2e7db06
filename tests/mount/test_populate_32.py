"""32-bit processes populating or locking a mapping of unreadable bytes: the system calls return."""

from __future__ import annotations

import errno
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.actor import VICTIMS
from tests.support.mount import PATIENCE
from tests.support.scene import PAGES, Scene

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit programs of x86_64 only"),
]

BAD = 40
FLAGS = ("-m32", "-O1", "-Wall", "-Wextra", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie")
FAILS = {"mlock", "mlock2"}


@pytest.fixture(scope="module")
def locker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the program, if this machine compiles and runs 32-bit programs."""
    binary = tmp_path_factory.mktemp("locker") / "locker32"
    made = subprocess.run(
        ["gcc", *FLAGS, "-fno-stack-protector", "-o", binary, VICTIMS / "locker32.c"],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"gcc makes no 32-bit programs: {made.stderr.strip().splitlines()[-1]}")
    try:
        zero: list[str | Path] = [binary, "/dev/zero", "0", "1", "populate", "private"]
        subprocess.run(
            zero, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
    except OSError as error:
        pytest.skip(f"the kernel runs no 32-bit programs: {error}")
    return binary


def run(locker: Path, scene: Scene, call: str, kind: str, before: Callable[[], object] = lambda: None) -> int:
    """Run the program. Return the exit status: the errno of the call, or minus the signal that ended the
    process. ``before`` is called once the process has the file open, before the system call.
    """
    command: list[str | Path] = [locker, scene.mount.path / "f", "0", str(PAGES), call, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"o"
            before()
            process.communicate(b"g", timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode


@pytest.mark.parametrize("call", ["populate", "locked", "mlock", "mlock2", "mlockall"])
def test_known_poison(locker: Path, scene: Scene, call: str) -> None:
    scene.poison(BAD, BAD + 1)
    assert run(locker, scene, call, "shared") == (errno.ENOMEM if call in FAILS else 0)
    (event,) = scene.mount.events("PopulateFailed")
    assert event["result"] == ("ENOMEM" if call in FAILS else "ignored")
    assert event["call"] == (call if call.startswith("mlock") else "mmap")
    assert (event["offset"], event["length"]) == (BAD * 4096, 2 * 4096)


@pytest.mark.parametrize("call", ["populate", "mlock"])
def test_a_private_copy_cannot_be_dropped(locker: Path, scene: Scene, call: str) -> None:
    """madvise(2) is not made in the name of a 32-bit thread: SIGKILL, before a load of zeros."""
    scene.poison(BAD)
    assert run(locker, scene, call, "private") == -9
    (event,) = scene.mount.events("PopulateFailed")
    assert event["result"] == "killed"
    assert "32-bit" in event["reason"]


@pytest.mark.parametrize("call", ["populate", "locked", "mlock", "mlock2", "mlockall"])
def test_after_removal(locker: Path, scene: Scene, call: str) -> None:
    def remove() -> None:
        scene.mount.json("remove", scene.mount.path)
        scene.mount.sound = False

    assert run(locker, scene, call, "shared", before=remove) == (errno.ENOMEM if call in FAILS else 0)
