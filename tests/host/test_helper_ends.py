"""Ends of a supervisor, a helper, a program while calls are forwarded: nothing hangs, nothing is left.

tests/support/forwarded.py says what stands for the mounts and the supervisor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from daxemu.host.run import zone
from daxemu.host.run.filters import Nr
from tests.support.forwarded import PATIENCE, Stub, eventually, helper_of, output_of, python, says, stub

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="direct mappings need root")


@pytest.fixture
def supervisor() -> Iterator[Stub]:
    with stub() as made:
        yield made


def test_supervisor_killed_before(supervisor: Stub) -> None:
    """mmap(2) of the dead mount is ENODEV; every other call is the kernel's."""
    script = """
at = mapped(SLICE, 0x11)
print(at == SLICE, flush=True)
sys.stdin.readline()
print(mapped(), syscall(11, at, 4096), flush=True)
os.execv("/bin/echo", ["echo", "done"])
"""
    process = python([supervisor], script, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "True\n"
    supervisor.kill()
    process.stdin.write("\n")
    process.stdin.flush()
    assert output_of(process).splitlines() == [f"{-errno.ENODEV} 0", "done"]


@pytest.mark.mount
def test_supervisor_starts_again(supervisor: Stub, tmp_path: Path) -> None:
    """While the mount table changes without a supervisor, mmap(2) stays ENODEV. A new supervisor is attached
    after the next change, with a slice of its own.
    """
    script = """
assert mapped() > 0
print("mapped", flush=True)
for line in sys.stdin:
    print(mapped() > 0, flush=True)
"""
    process = python([supervisor], script, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "mapped\n"

    def maps_after_a_change() -> bool:
        assert process.stdin is not None
        assert process.stdout is not None
        subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
        subprocess.run(["umount", tmp_path], check=True)
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline() == "True\n"

    supervisor.kill()
    assert [maps_after_a_change() for _ in range(3)] == [False] * 3
    supervisor.process = supervisor.started()
    assert any(maps_after_a_change() for _ in range(100))
    process.stdin.close()
    assert process.wait(PATIENCE) == 0
    process.stdout.close()
    assert [call[3] for call in supervisor.calls()] == [zone.SLICES[0].start, zone.SLICES[1].start]


@pytest.mark.parametrize("threads", [1, 600])
def test_supervisor_killed_meanwhile(supervisor: Stub, threads: int) -> None:
    """Threads that wait for an answer get ENODEV, however many they are."""
    supervisor.decide("hold")
    script = f"""
threading.stack_size(65536)
results = []
threads = [threading.Thread(target=lambda: results.append(mapped(fd=fd))) for _ in range({threads})]
fd = os.open(here + "/f", os.O_RDWR)
for thread in threads:
    thread.start()
print("started", flush=True)
for thread in threads:
    thread.join()
print(len(results), set(results))
"""
    process = python([supervisor], script)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    assert eventually(lambda: len(supervisor.calls()) == threads)
    supervisor.kill()
    assert output_of(process) == f"{threads} {{{-errno.ENODEV}}}"


def test_supervisor_that_is_stopped_delays_only_its_own_calls(supervisor: Stub) -> None:
    """600 calls for a stopped supervisor: more than a socket takes; other files are mapped meanwhile."""
    script = """
threading.stack_size(65536)
assert mapped() > 0
fd = os.open(here + "/f", os.O_RDWR)
print("mapped", flush=True)
sys.stdin.readline()
results = []
threads = [threading.Thread(target=lambda: results.append(mapped(fd=fd) > 0)) for _ in range(600)]
for thread in threads:
    thread.start()
other = os.open("/usr/bin/env", os.O_RDONLY)
print(mapped(fd=other, flags=2) > 0, results, flush=True)
for thread in threads:
    thread.join()
print(len(results), set(results))
"""
    process = python([supervisor], script, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "mapped\n"
    supervisor.process.send_signal(signal.SIGSTOP)
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "True []\n"
    finally:
        supervisor.process.send_signal(signal.SIGCONT)
    assert output_of(process) == "600 {True}"


def descriptors(supervisor: Stub) -> list[str]:
    names = []
    for entry in Path(f"/proc/{supervisor.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(entry.readlink()))
    return names


def test_supervisor_keeps_nothing_after_the_program(supervisor: Stub) -> None:
    before = len(descriptors(supervisor))
    assert says(supervisor, "print(mapped() > 0)") == "True"
    assert eventually(lambda: len(descriptors(supervisor)) == before)
    assert not any("seccomp" in name for name in descriptors(supervisor))


def test_helper_killed(supervisor: Stub) -> None:
    """No program hangs: the supervisor gives its copy of the listener up, and calls fail with ENOSYS."""
    supervisor.decide("hold")
    script = """
def waits():
    print(mapped())
(thread := threading.Thread(target=waits)).start()
thread.join()
print(mapped())
"""
    process = python([supervisor], script)
    assert eventually(lambda: supervisor.numbers() == [Nr.MMAP])
    os.kill(helper_of(process), signal.SIGKILL)
    assert output_of(process).split() == [str(-errno.ENOSYS)] * 2


def test_waiting_thread_is_killed(supervisor: Stub) -> None:
    supervisor.decide("hold")
    process = python([supervisor], "mapped()")
    assert eventually(lambda: supervisor.numbers() == [Nr.MMAP])
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    supervisor.decide("continue")
    assert says(supervisor, "print(mapped() > 0)") == "True"
