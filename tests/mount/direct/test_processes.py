"""Processes with direct mappings: fork, vfork, threads, execve, exit, namespaces, buffers of system calls.

The steps are in tests/victims/direct.c, and those about memory in direct_memory.c.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.actor import compile_victim
from tests.support.forwarded import eventually
from tests.support.mount import DAXEMU, DaxMount, dax_mount_at

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

LIMIT = 60
"""Time limit of a program in seconds. A hang fails the test."""
PAGE = 4096
STEPS = (
    *("store", "fork", "vfork", "vfork-mmap", "vfork-first", "spawn", "exec", "thread-exec", "failed-exec"),
    *("many-mappings", "raw-fork", "forking-handler"),
    *("threads", "forking-threads", "proc", "shared-memory"),
)
MEMORY_STEPS = ("parts", "private", "locked", "mremap", "fixed")


def under_run(mount: DaxMount | None, *command: str | Path, before: tuple[str, ...] = ()) -> str:
    """Run a command below ``daxemu run``; return the output. The exit status must be 0."""
    argv = [*before, *DAXEMU, "run", *([mount.path] if mount is not None else []), "--", *command]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def waiting(mount: DaxMount, program: Path, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a program that maps a file, stores, and waits. The program is killed at the end."""
    argv = [*DAXEMU, "run", str(mount.path), "--", str(program), "wait", str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def agents(mount: DaxMount) -> list[int]:
    """Return the processes that have the media of the mount open, but for the supervisor."""
    media = (mount.device / "media").stat()
    found = []
    supervisor = mount.json("status", mount.path)["pid"]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [(each.stat().st_dev, each.stat().st_ino) for each in (process / "fd").iterdir()]
        except OSError:
            continue  # ended meanwhile
        if int(process.name) != supervisor and (media.st_dev, media.st_ino) in opened:
            found.append(int(process.name))
    return found


@pytest.fixture
def program() -> Path:
    return compile_victim("direct")


@pytest.fixture
def memory_program() -> Path:
    return compile_victim("direct_memory")


@pytest.fixture
def path(dax_mount: DaxMount) -> Path:
    return dax_mount.make_file("f", 16)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A file that is not on the mount."""
    made = tmp_path / "other"
    made.write_bytes(b"o" * 16 * PAGE)
    return made


@pytest.mark.parametrize("step", STEPS)
def test_step(dax_mount: DaxMount, program: Path, path: Path, step: str) -> None:
    does(dax_mount, program, step, path)


@pytest.mark.parametrize("step", MEMORY_STEPS)
def test_step_about_memory(dax_mount: DaxMount, memory_program: Path, path: Path, step: str) -> None:
    does(dax_mount, memory_program, step, path)


def does(dax_mount: DaxMount, program: Path, step: str, path: Path) -> None:
    assert under_run(dax_mount, program, step, path).split()[-1] == "ok"
    assert not dax_mount.events("UnexpectedError")
    assert eventually(lambda: not agents(dax_mount))


@pytest.mark.parametrize("step", ["store", "fork", "spawn", "exec", "threads"])
def test_step_of_a_static_program(dax_mount: DaxMount, path: Path, step: str) -> None:
    program = compile_victim("direct", options=("-static",))
    assert under_run(dax_mount, program, step, path).split()[-1] == "ok"


@pytest.mark.parametrize("step", ["kernel-mode", "io-uring"])
def test_the_kernel_reads_into_a_mapping(
    dax_mount: DaxMount, memory_program: Path, path: Path, other: Path, step: str
) -> None:
    said = under_run(dax_mount, memory_program, step, path, other).splitlines()
    if len(said) == 2:
        pytest.skip(said[0])
    assert said == ["ok"]


def test_nothing_is_left_of_a_killed_program(dax_mount: DaxMount, program: Path, path: Path) -> None:
    with waiting(dax_mount, program, path) as process:
        assert len(agents(dax_mount)) == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert eventually(lambda: not agents(dax_mount))
    assert path.read_bytes()[PAGE : PAGE + 2] == b"wB"
    assert not dax_mount.events("UnexpectedError")


def test_the_program_does_not_outlive_its_agent(dax_mount: DaxMount, program: Path, path: Path) -> None:
    with waiting(dax_mount, program, path) as process:
        (agent,) = agents(dax_mount)
        os.kill(agent, signal.SIGKILL)
        assert process.wait(LIMIT) == -signal.SIGKILL


def test_two_runs_on_one_mount(dax_mount: DaxMount, program: Path, path: Path) -> None:
    with waiting(dax_mount, program, path):
        assert under_run(dax_mount, program, "store", path) == "ok\n"
        assert under_run(dax_mount, program, "fork", dax_mount.make_file("g", 16)) == "ok\n"
        assert len(agents(dax_mount)) == 1


def test_setuid_execve_drops_the_mappings(dax_mount: DaxMount, program: Path, path: Path) -> None:
    """A set-user-ID program starts with an address space of its own, as every program."""
    path.chmod(0o666)
    setuid = dax_mount.path / "setuid"
    setuid.write_bytes(program.read_bytes())
    os.chown(setuid, 65534, 65534)
    setuid.chmod(0o4755)
    dax_mount.path.chmod(0o755)
    assert under_run(dax_mount, setuid, "exec", path) == "ok\n"


@pytest.mark.parametrize("kind", ["--mount", "--pid"])
def test_in_a_namespace(dax_mount: DaxMount, program: Path, path: Path, kind: str) -> None:
    """The program is a child of the first process of the pid namespace."""
    wrapper = ("unshare", kind, "--fork", "sh", "-c", '"$@"; exit $?', "sh")
    assert under_run(dax_mount, *wrapper, program, "fork", path) == "ok\n"
    assert not dax_mount.events("UnexpectedError")


def test_the_first_process_of_a_pid_namespace(dax_mount: DaxMount, program: Path, path: Path) -> None:
    assert under_run(dax_mount, "unshare", "--pid", "--fork", program, "store", path) == "ok\n"


def test_run_in_a_mount_namespace(dax_mount: DaxMount, program: Path, path: Path) -> None:
    assert under_run(dax_mount, program, "fork", path, before=("unshare", "--mount")) == "ok\n"


MAP_SHARED = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    mmap.mmap(fd, 4096)
except OSError as error:
    print(os.strerror(error.errno))
print(mmap.mmap(fd, 4096, mmap.MAP_PRIVATE)[:1])
"""


OF_A_SHELL = ("sh", "-c", '"$@"; exit $?', "sh")
"""Words before a command that shall not be the first process of a pid namespace."""
NAMESPACES = (("--pid", "--fork"), ("--pid", "--fork", "--mount-proc"))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("step", ["fork", "raw-fork", "exec", "threads"])
def test_run_in_a_pid_namespace(
    dax_mount: DaxMount, program: Path, path: Path, step: str, namespace: tuple[str, ...]
) -> None:
    before = ("unshare", *namespace, *OF_A_SHELL)
    assert under_run(dax_mount, program, step, path, before=before) == "ok\n"
    assert not dax_mount.events("DirectMappingRefused")
    assert not dax_mount.events("UnexpectedError")


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("where", ["run inside", "run outside"])
def test_consumption_in_a_pid_namespace(
    dax_mount: DaxMount, program: Path, path: Path, where: str, namespace: tuple[str, ...]
) -> None:
    """The supervisor, and the program, have other ids for the thread."""
    dax_mount.inject("f", (3 * PAGE, PAGE))
    into = ("unshare", *namespace, *OF_A_SHELL)
    if where == "run inside":
        said = under_run(dax_mount, program, "consume", path, before=into)
    else:
        said = under_run(dax_mount, *into, program, "consume", path)
    assert said == "code 4 page 3\nok\n"
    (consumed,) = dax_mount.events("SignalSent")
    assert consumed["result"] == "delivered"


def test_a_program_under_a_tracer_has_no_direct_mappings(dax_mount: DaxMount, path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    argv = [*DAXEMU, "run", str(dax_mount.path), "--", "strace", "-f", "-o", "/dev/null"]
    done = subprocess.run(
        [*argv, sys.executable, "-c", MAP_SHARED, path], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.stdout == "No such device\n"  # and MAP_PRIVATE fails alike
    assert done.returncode == 1
    (refused, *_) = dax_mount.events("DirectMappingRefused")
    assert "traces the program" in refused["reason"] or "traces thread" in refused["reason"]


def test_two_direct_mounts_in_one_program(
    dax_mount: DaxMount, tmp_path: Path, program: Path, path: Path
) -> None:
    """fork(2) and posix_spawn(3) of a program that maps files of both."""
    (tmp_path / "second").mkdir()
    with dax_mount_at(tmp_path / "second", "64M", mount=False) as second:
        second.mount("--direct")
        assert under_run(None, program, "two-mounts", path, second.make_file("f", 16)) == "ok\n"
        for mount in (dax_mount, second):
            assert eventually(partial(_has_no_agent, mount))
            assert not mount.events("UnexpectedError")


def _has_no_agent(mount: DaxMount) -> bool:
    return not agents(mount)
