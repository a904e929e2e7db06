"""Programs under the filter for direct mappings, with the real helper and control socket.

tests/support/forwarded.py says what stands for the mounts and the supervisor.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daxemu.host.run import zone
from daxemu.host.run.filters import Nr
from tests.support.forwarded import (
    PATIENCE,
    PROGRAM,
    Stub,
    output_of,
    python,
    says,
    started,
    stub,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="direct mappings need root")


@pytest.fixture
def supervisor() -> Iterator[Stub]:
    with stub() as made:
        yield made


# -- answers


def test_value(supervisor: Stub) -> None:
    supervisor.decide(f"value {zone.SLICES[0].start + 0x7000:#x}")
    assert says(supervisor, "print(hex(mapped()))") == hex(zone.SLICES[0].start + 0x7000)
    ((number, _tid, args, start),) = supervisor.calls()
    assert (number, args[:4], start) == (Nr.MMAP, [0, 4 * 4096, 3, 1], zone.SLICES[0].start)


def test_errno(supervisor: Stub) -> None:
    supervisor.decide(f"errno {errno.ENOMEM}")
    assert says(supervisor, "print(mapped())") == str(-errno.ENOMEM)


def test_continue(supervisor: Stub) -> None:
    assert says(supervisor, "print(ctypes.string_at(mapped(), 6))") == "b'direct'"


def test_handler_answers_itself(supervisor: Stub) -> None:
    supervisor.decide("itself")
    assert says(supervisor, "print(mapped())") == "77"


def test_added_descriptor(supervisor: Stub) -> None:
    """A descriptor that is given to a waiting thread is open there, and closed by execve(2)."""
    supervisor.decide("descriptor")
    script = """
fd = mapped()
print(os.readlink(f"/proc/self/fd/{fd}"), os.get_inheritable(fd))
"""
    assert says(supervisor, script) == f"{supervisor.directory}/given False"


def test_failed_handler(supervisor: Stub) -> None:
    """An exception in the supervisor costs one call: ENODEV."""
    supervisor.decide("crash")
    assert says(supervisor, "print(mapped(), mapped())") == f"{-errno.ENODEV} {-errno.ENODEV}"


# -- which calls


def test_calls_in_the_zone_are_forwarded(supervisor: Stub) -> None:
    script = """
at = mapped(SLICE, 0x11)
assert at == SLICE
print(syscall(26, at, 4096, 4), syscall(10, at, 4096, 1), syscall(28, at, 4096, 4))
print(hex(syscall(25, at, 4096, 4096, 0)))
print(syscall(9, at, 4096, 3, 0x32, -1, 0) == at, syscall(11, at, 4 * 4096))
"""
    assert says(supervisor, script).splitlines() == ["0 0 0", hex(zone.START), "True 0"]
    assert supervisor.numbers() == [
        *(Nr.MMAP, Nr.MSYNC, Nr.MPROTECT, Nr.MADVISE, Nr.MREMAP, Nr.MMAP, Nr.MUNMAP)
    ]


def test_other_calls_are_not(supervisor: Stub) -> None:
    """Mappings elsewhere, of other files, children and execs of a program without a direct mapping."""
    script = """
import subprocess
at = mapped(path="/usr/bin/env", flags=2, fd=os.open("/usr/bin/env", os.O_RDONLY))
assert at > 0 and syscall(11, at, 4 * 4096) == 0
assert mapped(fd=999) == -9
subprocess.run(["true"], check=True)
print(libc.madvise(ctypes.c_void_p(0), 0, 4))
"""
    assert says(supervisor, script) == "0"
    assert supervisor.calls() == []


def test_calls_outside_of_the_zone_are_forwarded_of_a_process_that_maps_there(supervisor: Stub) -> None:
    """mremap(2), msync(2), and the advice that poisons or punches; not before the mapping, nor others."""
    script = """
own = syscall(9, 0, 4096, 3, 0x22, -1, 0)
def calls():
    return [
        syscall(26, own, 4096, 4), syscall(10, own, 4096, 3), syscall(28, own, 4096, 4),
        syscall(28, own, 4096, 9), syscall(25, own, 4096, 4096, 0) - own,
    ]
before = calls()
at = 0x1000_0000_0000
assert mapped(at, 0x11) == at
print(before == calls(), before[-1], syscall(28, own, 4096, 100) != 0, syscall(11, at, 4 * 4096))
if not (pid := os.fork()):
    os._exit(syscall(26, own, 4096, 4))
print(os.waitpid(pid, 0)[1])
"""
    assert says(supervisor, script).splitlines() == ["True 0 True 0", "0"]
    assert supervisor.numbers() == [
        *(Nr.MMAP, Nr.MSYNC, Nr.MADVISE, Nr.MREMAP, Nr.MADVISE, Nr.CLONE, Nr.MSYNC)
    ]


def test_mremap_onto_an_address_in_the_zone_is_forwarded(supervisor: Stub) -> None:
    script = """
own = syscall(9, 0, 4096, 3, 0x22, -1, 0)
assert mapped(SLICE, 0x11) == SLICE
print(hex(syscall(25, own, 4096, 4096, 3, SLICE)))
"""
    assert says(supervisor, script) == hex(zone.START)
    assert supervisor.numbers() == [Nr.MMAP, Nr.MREMAP]


def test_poison_in_the_zone(supervisor: Stub) -> None:
    """madvise(MADV_HWPOISON) goes to the mount's supervisor in the zone; elsewhere to the kernel."""
    assert says(supervisor, "print(syscall(28, mapped(SLICE, 0x11), 4096, 100) != 0)") == "True"
    assert supervisor.numbers() == [Nr.MMAP, Nr.MADVISE]


def test_fork_and_exec_of_a_process_with_mappings(supervisor: Stub) -> None:
    script = """
assert mapped() > 0
if not (pid := os.fork()):
    if not os.fork():
        os.execv("/bin/true", ["true"])
    os.wait()
    os._exit(0)
os.waitpid(pid, 0)
os.execv("/bin/echo", ["echo", "done"])
"""
    assert says(supervisor, script) == "done"
    made, *others = supervisor.calls()
    assert made[0] == Nr.MMAP
    assert sorted(call[0] for call in others) == sorted([Nr.CLONE, Nr.CLONE, Nr.EXECVE, Nr.EXECVE])


def test_page_cache_mount_is_left_to_the_kernel() -> None:
    with stub(direct=False) as supervisor:
        assert says(supervisor, "print(ctypes.string_at(mapped(), 6), mapped() > 0)") == "b'direct' True"
        assert supervisor.calls() == []


# -- other machines


def assembled(directory: Path, source: str) -> Path:
    """Build a 32-bit program without a library."""
    (directory / "x.S").write_text(source)
    subprocess.run(
        ["gcc", "-m32", "-nostdlib", "-static", "-no-pie", "-o", directory / "x", directory / "x.S"],
        check=True,
    )
    return directory / "x"


MMAP_32 = """
.globl _start
_start:
    movl 4(%esp), %eax            # argc
    movl $5, %eax                 # open(argv[1], O_RDWR)
    movl 8(%esp), %ebx
    movl $2, %ecx
    int $0x80
    movl %eax, fd
    {call}
    negl %eax                     # exit with the errno
    movl %eax, %ebx
    movl $1, %eax
    int $0x80
.data
fd_at: .long 0
arguments: .long 0, 4096, 3, 1
fd: .long 0, 0
"""
MMAP2 = """
    movl $192, %eax
    xorl %ebx, %ebx
    movl $4096, %ecx
    movl $3, %edx
    movl $1, %esi
    movl fd, %edi
    xorl %ebp, %ebp
    int $0x80
"""
OLD_MMAP = """
    movl $90, %eax
    movl $arguments, %ebx
    int $0x80
"""


@pytest.mark.parametrize("call", [MMAP2, OLD_MMAP], ids=["mmap2", "mmap"])
def test_32_bit_program_is_refused_by_name(supervisor: Stub, tmp_path: Path, call: str) -> None:
    program = assembled(tmp_path, MMAP_32.replace("{call}", call))
    process = started([supervisor], [str(program), str(supervisor.directory / "f")])
    assert output_of(process, errno.ENODEV) == ""
    (refusal,) = supervisor.refusals()
    assert refusal["path"] == f"{supervisor.directory}/f"
    assert refusal["pid"] == process.pid
    assert "not a 64-bit program" in refusal["reason"]
    assert supervisor.calls() == []


@pytest.mark.parametrize("call", [MMAP2, OLD_MMAP], ids=["mmap2", "mmap"])
def test_32_bit_program_maps_other_files(supervisor: Stub, tmp_path: Path, call: str) -> None:
    (tmp_path / "other").write_bytes(bytes(4096))
    program = assembled(tmp_path, MMAP_32.replace("{call}", call))
    process = started([supervisor], [str(program), str(tmp_path / "other")])
    process.communicate(timeout=PATIENCE)
    assert process.returncode not in {errno.ENODEV, errno.ENOSYS, errno.EINVAL, errno.EBADF}
    assert supervisor.refusals() == []


# -- several


def test_two_mounts(supervisor: Stub) -> None:
    """Each mount gets its files and its slice; a fork and an exec go to both, one after the other."""
    script = """
second = os.memfd_create("file")
os.truncate(second, 4 * 4096)
assert mapped(SLICE, 0x11) == SLICE
assert mapped(fd=second) > 0
assert mapped(fd=second, flags=0x11, at=SLICE + (1 << 40)) > 0
assert syscall(11, SLICE, 4096) == 0
assert syscall(11, SLICE + (1 << 40), 4096) == 0
if not (pid := os.fork()):
    os.execv("/bin/true", ["true"])
print(os.waitpid(pid, 0)[1])
"""
    with stub() as other:
        assert output_of(python([supervisor, other], script)) == "0"
        assert supervisor.numbers() == [Nr.MMAP, Nr.MUNMAP, Nr.CLONE, Nr.EXECVE]
        assert other.numbers() == [Nr.MMAP, Nr.MMAP, Nr.MUNMAP, Nr.CLONE, Nr.EXECVE]
        assert {call[3] for call in supervisor.calls()} == {zone.SLICES[0].start}
        assert {call[3] for call in other.calls()} == {zone.SLICES[1].start}


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_supervisors_killed(supervisor: Stub, which: int) -> None:
    """A fork goes to the supervisor that is left."""
    script = """
second = os.memfd_create("file")
os.truncate(second, 4 * 4096)
assert mapped() > 0 and mapped(fd=second) > 0
print("mapped", flush=True)
sys.stdin.readline()
if not (pid := os.fork()):
    os._exit(0)
print(os.waitpid(pid, 0)[1], mapped() > 0, mapped(fd=second) > 0)
"""
    with stub() as other:
        process = python([supervisor, other], script, stdin=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "mapped\n"
        both = (supervisor, other)
        both[which].kill()
        process.stdin.write("\n")
        process.stdin.flush()
        assert output_of(process) == f"0 {which == 1} {which == 0}"
        assert both[1 - which].numbers() == [Nr.MMAP, Nr.CLONE, Nr.MMAP]


def test_two_runs_on_one_mount(supervisor: Stub) -> None:
    script = "assert mapped() > 0; print(flush=True); sys.stdin.readline(); print(mapped() > 0)"
    processes = [python([supervisor], script, stdin=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
    for process in processes:
        out, _ = process.communicate("\n", timeout=PATIENCE)
        assert out == "True\n"
    assert supervisor.numbers() == [Nr.MMAP] * 4


# -- tracers


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_under_strace_a_mapping_is_refused_by_name(supervisor: Stub) -> None:
    supervisor.decide("traced")
    script = PROGRAM + "print(mapped())"
    words = ["strace", "-f", "-o", "/dev/null", sys.executable, "-c", script, str(supervisor.directory)]
    assert output_of(started([supervisor], words)) == str(-errno.ENODEV)
    (refusal,) = supervisor.refusals()
    assert re.match(r"strace \(\d+\) traces the program: start the tracer later", refusal["reason"])
    assert says(supervisor, "print(mapped() > 0)") == "True"


# -- programs behave as without


def test_programs_print_the_same(supervisor: Stub, tmp_path: Path) -> None:
    """ls, git, a pipeline, job control: the same output and exit status as without the filter."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "file").write_text("text")
    commands = [
        ["ls", "-la", "/usr/bin"],
        ["git", "-C", str(tmp_path), "status", "--short"],
        ["sh", "-c", "seq 1000 | sort -r | head -3 | tr 0 x; exit 5"],
        # The first wait ends when the job has stopped.
        [
            "bash",
            "-c",
            "set -m; sleep 60 & kill -STOP %1; wait %1; jobs; kill -CONT %1; kill %1; wait %1; echo $?",
        ],
        ["sh", "-c", "kill -TERM $$"],
        ["no-such-program-here"],
    ]
    for command in commands[:-1]:
        plain = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        process = started([supervisor], command)
        assert process.communicate(timeout=PATIENCE)[0] == plain.stdout, command
        assert process.returncode == plain.returncode, command
    assert supervisor.calls() == []


STATIC = """
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
static void *thread(void *fd)
{
	char *at = mmap(NULL, 4096, PROT_READ, MAP_SHARED, (int)(long)fd, 0);
	return at == MAP_FAILED ? (void *)1 : (void *)(long)(at[0] != 'd');
}
int main(int argc, char **argv)
{
	int fd = open(argv[argc - 1], O_RDWR), status;
	void *failed;
	pthread_t id;
	pthread_create(&id, NULL, thread, (void *)(long)fd);
	pthread_join(id, &failed);
	if (!fork())
		_exit(thread((void *)(long)fd) != NULL);
	wait(&status);
	printf("%d %d\\n", failed != NULL, status);
	return 0;
}
"""


@pytest.mark.parametrize("flags", [["-static"], []], ids=["static", "dynamic"])
def test_c_programs(supervisor: Stub, tmp_path: Path, flags: list[str]) -> None:
    """Threads and children of C programs, whose library falls back from clone3 to clone."""
    (tmp_path / "p.c").write_text(STATIC)
    subprocess.run(["gcc", *flags, "-pthread", "-o", tmp_path / "p", tmp_path / "p.c"], check=True)
    process = started([supervisor], [str(tmp_path / "p"), str(supervisor.directory / "f")])
    assert output_of(process) == "0 0"
    assert supervisor.numbers() == [Nr.MMAP, Nr.CLONE, Nr.MMAP]


def test_signals_with_restart_are_not_seen(supervisor: Stub) -> None:
    """With SA_RESTART no call under the filter returns EINTR."""
    script = """
got = []
signal.signal(signal.SIGALRM, lambda *_: got.append(1))
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
fd = os.open("/usr/bin/env", os.O_RDONLY)
results = set()
while len(got) < 100:
    at = mapped(fd=fd, flags=2)
    results.add(min(at, 0))
    syscall(11, at, 4 * 4096)
    if at > 0 and len(got) % 20 == 0:
        results.add(min(mapped(), 0))
signal.setitimer(signal.ITIMER_REAL, 0)
print(results)
"""
    assert says(supervisor, script) == "{0}"
