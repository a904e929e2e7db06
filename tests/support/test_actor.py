"""The actor itself, on plain files in memory: its report must match the kernel's action."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.actor import (
    Actor,
    ActorDied,
    ActorError,
    ActorTimeout,
    Death,
    Result,
    Signal,
    compile_actor,
)

PAGE = 4096
SYS_TGKILL = 234  # x86_64
KERNEL = tuple(int(n) for n in platform.release().split(".")[:2])
SIGBUS_DEATH = Death(signal=signal.SIGBUS)


@pytest.fixture
def here() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as path:
        (Path(path) / "f").write_bytes(b"".join(bytes([c]) * PAGE for c in b"ABCDEFGH"))
        yield Path(path)


@pytest.fixture
def p0(here: Path) -> Iterator[Actor]:
    with Actor.spawn("p0", cwd=here) as actor:
        yield actor


@pytest.fixture
def mapped(p0: Actor) -> Actor:
    do(p0, "open 0 f rw", "mmap 0 0 0 8 shared")
    return p0


def do(actor: Actor, *commands: str) -> None:
    for command in commands:
        result = actor.cmd(command)
        assert result.ret == 0, f"{command}: {result}"


def cut(here: Path, length: int = 0) -> None:
    os.truncate(here / "f", length)


def adrerr(actor: Actor, page: int, thread: int = 0) -> Signal:
    raw = actor.addr(0, page)
    return Signal(thread, "SIGBUS", "BUS_ADRERR", f"m0+{page * PAGE:#x}", raw, "during access")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def gone(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 20)[0])


class TestFiles:
    def test_reads_tell_each_page_by_its_letter(self, mapped: Actor) -> None:
        assert mapped.cmd("pread 0 0 32768").res == {"ret": 32768, "errno": "0", "pages": "ABCDEFGH"}
        assert mapped.cmd("pread 0 4095 2").pages == "?"
        assert mapped.cmd("pread 0 32768 4096").res == {"ret": 0, "errno": "0", "pages": ""}

    def test_writes_and_holes(self, mapped: Actor) -> None:
        assert mapped.cmd("pwrite 0 4096 4096 x").ret == PAGE
        do(mapped, "punch 0 8192 4096", "fsync 0", "syncfs 0", "msync 0 0 8")
        assert mapped.cmd("pread 0 0 16384").pages == "Ax0D"
        do(mapped, "trunc 0 4096")
        assert mapped.cmd("pread 0 0 32768").pages == "A"

    def test_copies_a_range_between_files(self, p0: Actor) -> None:
        do(p0, "open 0 f rw", "open 1 g creat")
        assert p0.cmd("copyrange 1 0 4096 8192 4096").ret == 2 * PAGE
        assert p0.cmd("pread 1 0 12288").pages == "0BC"

    def test_failures_carry_the_errno(self, p0: Actor) -> None:
        assert p0.cmd("open 0 missing rw").res == {"ret": -1, "errno": "ENOENT"}
        assert p0.cmd("pread 0 0 4096").res == {"ret": -1, "errno": "EBADF", "pages": ""}
        do(p0, "open 0 f ro")
        assert str(p0.cmd("pwrite 0 0 1 x")) == "ret -1 EBADF"

    def test_descriptors_can_be_used_again_after_close(self, p0: Actor) -> None:
        do(p0, "open 0 f rw", "close 0", "open 0 f rw")
        with pytest.raises(ActorError, match="descriptor in use"):
            p0.cmd("open 0 f rw")

    @pytest.mark.parametrize("command", ["tr 0 0", "frobnicate", "pread 0", "open 0 f sideways", "tr 99 0"])
    def test_a_wrong_script_is_an_error_and_no_result(self, p0: Actor, command: str) -> None:
        with pytest.raises(ActorError, match="bad command"):
            p0.cmd(command)
        p0.expect_no_signal()


class TestMemory:
    def test_a_first_touch_takes_one_fault_and_a_second_none(self, mapped: Actor) -> None:
        do(mapped, "munmap 0", "mmap 0 0 5 1 shared")
        assert mapped.cmd("tr 0 0").res == {"ok": "F", "faults": 1}
        assert mapped.cmd("tr 0 0").res == {"ok": "F", "faults": 0}

    def test_a_store_reaches_the_file_and_a_private_one_does_not(self, mapped: Actor) -> None:
        do(mapped, "mmap 1 0 0 8 private")
        assert mapped.cmd("tw 0 1 x").ok == "x"
        assert mapped.cmd("tw 1 2 y").res == {"ok": "y", "faults": 1}
        assert mapped.cmd("pread 0 0 12288").pages == "A?C"

    def test_a_zero_byte_reads_as_0(self, mapped: Actor) -> None:
        do(mapped, "punch 0 0 4096")
        assert mapped.cmd("tr 0 0").ok == "0"

    def test_pagemap_says_whether_the_page_is_present(self, mapped: Actor) -> None:
        do(mapped, "munmap 0", "mmap 0 0 3 1 shared")
        assert mapped.cmd("pagemap 0 0").res["present"] == 0
        mapped.cmd("tr 0 0")
        assert mapped.cmd("pagemap 0 0").res == {"present": 1, "swap_entry": 0, "file_or_shared": 1}

    def test_a_page_as_the_buffer_of_system_calls(self, mapped: Actor, here: Path) -> None:
        do(mapped, "open 1 other creat")
        assert mapped.cmd("kwrite 0 2 1 0 8192").ret == 2 * PAGE
        assert mapped.cmd("pread 1 0 8192").pages == "CD"
        assert mapped.cmd("kread 0 0 1 0 4096").ret == PAGE
        assert mapped.cmd("tr 0 0").ok == "C"
        cut(here, PAGE)
        assert str(mapped.cmd("kwrite 0 2 1 0 4096")) == "ret -1 EFAULT"
        mapped.expect_no_signal()

    def test_memory_of_another_process(self, mapped: Actor, here: Path) -> None:
        with Actor.spawn("p1", cwd=here) as p1:
            assert p1.pvm("pvmread", mapped, 0, 3, PAGE).ret == PAGE
            assert p1.pvm("pvmwrite", mapped, 0, 3, PAGE).ret == PAGE
        assert mapped.cmd("tr 0 3").ok == "v"

    def test_a_large_mapping_is_aligned_for_huge_pages(self, p0: Actor) -> None:
        do(p0, "open 0 big creat", "trunc 0 8388608", "mmap 0 0 1 1024 shared")
        assert p0.addr(0) % (2 << 20) == PAGE

    def test_advice_by_name_and_by_number(self, mapped: Actor) -> None:
        do(mapped, "madvise 0 1 2 4")
        assert mapped.cmd("madvise 0 0 1 9999").res == {"ret": -1, "errno": "EINVAL"}


class TestFaults:
    """A page beyond the end of a truncated file: a real BUS_ADRERR."""

    def test_a_load_reports_the_signal_and_goes_on(self, mapped: Actor, here: Path) -> None:
        mapped.cmd("tr 0 1")
        cut(here, PAGE)
        assert mapped.cmd("tr 0 1").res == {"faulted": True}
        assert mapped.signals() == [adrerr(mapped, 1)]
        assert mapped.cmd("tw 0 7 x").faulted
        assert mapped.wait_signal() == adrerr(mapped, 7)
        assert mapped.cmd("tr 0 0").ok == "A"
        mapped.expect_no_signal()

    def test_again_and_again(self, mapped: Actor, here: Path) -> None:
        cut(here)
        for _ in range(50):
            assert mapped.cmd("tr 0 2").faulted
        assert mapped.signals() == [adrerr(mapped, 2)] * 50

    def test_the_recorded_form(self, mapped: Actor, here: Path) -> None:
        cut(here)
        mapped.cmd("tr 0 1")
        told = {
            "thread": 0,
            "sig": "SIGBUS",
            "code": "BUS_ADRERR",
            "addr": "m0+0x1000",
            "how": "during access",
        }
        assert mapped.wait_signal().recorded() == told

    def test_an_extra_thread_is_the_one_that_gets_it(self, mapped: Actor, here: Path) -> None:
        do(mapped, "threads n e")
        assert mapped.cmd("ttr 1 0 1").ok == "B"
        assert mapped.cmd("ttw 2 0 1 z").ok == "z"
        cut(here)
        assert mapped.cmd("ttr 2 0 1").faulted
        assert mapped.signals() == [adrerr(mapped, 1, thread=2)]
        assert mapped.cmd("ttr 1 0 4").faulted
        assert mapped.signals() == [adrerr(mapped, 4, thread=1)]

    def test_spinning_ends_with_the_fault(self, mapped: Actor, here: Path) -> None:
        mapped.start_spin(0, 3)
        cut(here)
        assert mapped.reply() == Result({"faulted": True})
        assert mapped.signals() == [adrerr(mapped, 3)]

    def test_a_store_to_a_read_only_mapping(self, p0: Actor) -> None:
        do(p0, "open 0 f ro", "mmap 0 0 0 8 ro")
        assert p0.cmd("tw 0 0 x").faulted
        got = p0.wait_signal()
        assert (got.sig, got.code, got.addr) == ("SIGSEGV", "SEGV_ACCERR", "m0+0x0")

    @pytest.mark.parametrize("disposition", ["default", "ignore", "block"])
    def test_without_a_handler_it_dies_in_the_middle_of_the_command(
        self, mapped: Actor, here: Path, disposition: str
    ) -> None:
        do(mapped, f"sig {disposition}")
        cut(here)
        with pytest.raises(ActorDied, match="> tr 0 1") as died:
            mapped.cmd("tr 0 1")
        assert died.value.death == mapped.wait_death() == SIGBUS_DEATH
        with pytest.raises(ActorDied, match="dead already"):
            mapped.cmd("tr 0 1")


class TestSignals:
    def test_action_optional_does_not_disturb(self, mapped: Actor) -> None:
        do(mapped, "queue BUS_MCEERR_AO 0 2 12")
        raw = mapped.addr(0, 2)
        told = Signal(0, "SIGBUS", "BUS_MCEERR_AO", "m0+0x2000", raw, "async", lsb=12)
        assert mapped.signals() == [told]
        assert told.recorded()["lsb"] == 12

    def test_action_required_outside_an_access(self, mapped: Actor) -> None:
        do(mapped, "queue BUS_MCEERR_AR 0 2 21")
        got = mapped.wait_signal()
        assert (got.code, got.lsb, got.how) == ("BUS_MCEERR_AR", 21, "at syscall return")

    def test_blocked_pending_and_taken(self, mapped: Actor) -> None:
        do(mapped, "sig block", "sig pending")
        assert mapped.cmd("sig take").res == {"ret": -1, "errno": "EAGAIN"}
        do(mapped, "queue BUS_MCEERR_AO 0 1 12")
        mapped.expect_no_signal()
        assert mapped.cmd("sig pending").ret == 1
        assert mapped.cmd("sig take").ret == signal.SIGBUS
        assert mapped.wait_signal().how == "pending, taken with sigtimedwait"
        do(mapped, "queue BUS_MCEERR_AO 0 1 12", "sig unblock")
        assert mapped.wait_signal().how == "async"

    def test_one_sent_by_anybody_during_an_access_does_not_end_it(self, mapped: Actor, here: Path) -> None:
        mapped.start_spin(0, 3)
        os.kill(mapped.pid, signal.SIGBUS)
        got = mapped.wait_signal()
        assert (got.code, got.addr, got.how, got.lsb) == ("0", "0x0", "async", None)
        cut(here)
        assert mapped.reply().faulted

    def test_ignored_default_and_handled_again(self, p0: Actor) -> None:
        do(p0, "sig ignore")
        os.kill(p0.pid, signal.SIGBUS)
        p0.expect_no_signal()
        do(p0, "sig handler")
        os.kill(p0.pid, signal.SIGBUS)
        assert p0.wait_signal().code == "0"
        do(p0, "sig default")
        os.kill(p0.pid, signal.SIGBUS)
        assert p0.wait_death() == SIGBUS_DEATH
        assert p0.wait_death().recorded() == {"signal": "SIGBUS"}

    def test_the_barrier_waits_for_every_thread(self, p0: Actor) -> None:
        do(p0, "threads n n n")
        for round_ in range(50):
            thread = round_ % 4
            signal_thread(p0, thread)
            with pytest.raises(AssertionError, match=f"thread={thread}"):
                p0.expect_no_signal()
            p0.expect_no_signal()

    def test_lines_of_threads_never_mix(self, p0: Actor) -> None:
        do(p0, "threads n n n n n n")
        for _ in range(100):
            for thread in range(7):
                signal_thread(p0, thread)
        p0.barrier()
        assert {one.thread for one in p0.signals()} == set(range(7))


def signal_thread(actor: Actor, thread: int) -> None:
    done = ctypes.CDLL(None).syscall(SYS_TGKILL, actor.pid, actor.tid(thread), signal.SIGBUS)
    assert done == 0


class TestPolicy:
    def test_of_the_process(self, p0: Actor) -> None:
        assert p0.cmd("mcekill get").ret == 2
        do(p0, "mcekill early")
        assert p0.cmd("mcekill get").ret == 1
        do(p0, "mcekill late", "mcekill get", "mcekill default")
        assert p0.cmd("mcekill get").ret == 2

    def test_of_threads(self, p0: Actor) -> None:
        do(p0, "mcekill early", "threads l n e")
        flags = [policy_flags(p0.pid, p0.tid(thread)) for thread in range(4)]
        assert flags == [0x8000080, 0x80, 0, 0x8000080]
        assert p0.tid(0) == p0.pid


def policy_flags(pid: int, tid: int) -> int:
    stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[6]) & 0x8000080


class TestProcesses:
    def test_fork_shares_present_pages_and_counts_its_own_faults(self, mapped: Actor) -> None:
        mapped.cmd("tw 0 1 x")
        p1 = mapped.fork("p1")
        assert p1.pid != mapped.pid
        assert Path(f"/proc/{p1.pid}/comm").read_text() == "p1\n"
        assert p1.cmd("tr 0 1").res == {"ok": "x", "faults": 1}
        assert p1.cmd("tw 0 2 y").ok == "y"
        assert mapped.cmd("tr 0 2").ok == "y"
        assert p1.cmd("pread 0 0 4096").pages == "A"

    def test_parent_and_child_get_their_own_signals(self, mapped: Actor, here: Path) -> None:
        p1 = mapped.fork("p1")
        cut(here)
        assert p1.cmd("tr 0 1").faulted
        mapped.expect_no_signal()
        assert p1.signals() == [adrerr(p1, 1)]

    def test_a_forked_child_has_threads_of_its_own_and_forks(self, p0: Actor) -> None:
        do(p0, "threads n e")
        p1 = p0.fork("p1")
        do(p1, "threads l")
        assert policy_flags(p1.pid, p1.tid(1)) == 0x80
        p2 = p1.fork("p2")
        p2.expect_no_signal()
        assert state_of(p2.pid) in "SR"

    def test_how_a_forked_child_died_is_known(self, mapped: Actor, here: Path) -> None:
        p1, p2 = mapped.fork("p1"), mapped.fork("p2")
        do(p1, "sig default")
        do(p2, "exit 3")
        cut(here)
        with pytest.raises(ActorDied):
            p1.cmd("tr 0 1")
        assert p1.wait_death() == SIGBUS_DEATH
        assert p2.wait_death() == Death(exit=3)
        mapped.expect_no_signal()

    def test_a_forked_child_outlives_its_parent(self, mapped: Actor) -> None:
        p1 = mapped.fork("p1")
        mapped.kill()
        assert p1.cmd("tr 0 1").ok == "B"
        p1.kill()
        assert p1.wait_death() == (Death(signal=signal.SIGKILL) if KERNEL >= (6, 15) else Death())

    def test_exec_keeps_the_streams_and_the_policy_and_nothing_else(self, mapped: Actor) -> None:
        do(mapped, "mcekill early", "threads n")
        pid = mapped.pid
        assert mapped.exec().res == {"ret": 0, "errno": "0"}
        assert mapped.cmd("mcekill get").ret == 1
        assert mapped.cmd("pread 0 0 4096").errno == "EBADF"
        with pytest.raises(ActorError, match="not mapped"):
            mapped.cmd("tr 0 1")
        assert [task.name for task in Path(f"/proc/{pid}/task").iterdir()] == [str(pid)]
        assert Path(f"/proc/{pid}/comm").read_text() == "p0\n"
        assert mapped.tid(0) == pid

    def test_exec_of_a_forked_child(self, mapped: Actor) -> None:
        p1 = mapped.fork("p1")
        assert p1.exec().ret == 0
        do(p1, "open 0 f rw")
        assert p1.cmd("pread 0 0 4096").pages == "A"

    def test_under_a_wrapper_that_execs(self, here: Path) -> None:
        here.chmod(0o755)
        with Actor.spawn("p0", cwd=here, wrapper=["setpriv", "--no-new-privs"]) as actor:
            assert "NoNewPrivs:\t1" in Path(f"/proc/{actor.pid}/status").read_text()
            assert actor.fork("p1").cmd("sleep 0").ret == 0

    def test_under_a_wrapper_that_stays(self, here: Path) -> None:
        with Actor.spawn("p0", cwd=here, wrapper=["sh", "-c", '"$@"; exit 9', "sh"]) as actor:
            assert actor.cmd("open 0 f rw").ret == 0
            assert Path(f"/proc/{actor.pid}/comm").read_text() == "p0\n"
            do(actor, "exit 4")
            assert actor.wait_death() == Death(exit=4) or KERNEL < (6, 15)


class TestLifetime:
    def test_no_answer_in_time_kills_it_and_shows_the_transcript(self, p0: Actor) -> None:
        do(p0, "mcekill early")
        with pytest.raises(ActorTimeout, match=r"(?s)> mcekill early.*> sleep 60000"):
            p0.cmd("sleep 60000", timeout=0.1)
        assert p0.wait_death() == Death(signal=signal.SIGKILL)
        assert not p0.alive

    def test_waiting_for_a_signal_or_death_that_does_not_come(self, here: Path) -> None:
        with Actor.spawn("p0") as p0, pytest.raises(ActorTimeout):
            p0.wait_signal(timeout=0.05)
        with Actor.spawn("p1") as p1, pytest.raises(ActorTimeout, match="still alive"):
            p1.wait_death(timeout=0.05)

    def test_death_ends_the_wait_for_a_signal(self, p0: Actor) -> None:
        os.kill(p0.pid, signal.SIGTERM)
        with pytest.raises(ActorDied) as died:
            p0.wait_signal()
        assert died.value.death == Death(signal=signal.SIGTERM)

    def test_it_exits_with_the_status_asked_for(self, p0: Actor) -> None:
        do(p0, "exit 7")
        assert p0.wait_death().recorded() == {"exit": 7}

    def test_leaving_the_block_ends_it_and_its_forks(self, here: Path) -> None:
        before = open_descriptors()
        with Actor.spawn("p0", cwd=here) as p0:
            pidfds = [os.pidfd_open(one.pid) for one in (p0, p0.fork("p1"))]
            p0.send("sleep 60000")
        assert all(gone(pidfd) for pidfd in pidfds)
        p0.close()
        for pidfd in pidfds:
            os.close(pidfd)
        assert open_descriptors() == before

    def test_a_failing_command_line_is_reported(self) -> None:
        with pytest.raises(ActorDied) as died:
            Actor.spawn("p0", wrapper=["false"])
        assert died.value.death == Death(exit=1)

    def test_all_die_with_the_test_process(self, here: Path) -> None:
        """Idle ones, busy ones and forks."""
        script = (
            "import sys, time\n"
            "from tests.support.actor import Actor\n"
            "p0 = Actor.spawn('p0', cwd=sys.argv[1])\n"
            "p0.cmd('open 0 f rw'), p0.cmd('mmap 0 0 0 8 shared')\n"
            "p1, p2 = p0.fork('p1'), p0.fork('p2')\n"
            "p2.start_spin(0, 1)\n"
            "p3 = Actor.spawn('p3')\n"
            "p3.send('sleep 600000')\n"
            "print(p0.pid, p1.pid, p2.pid, p3.pid, flush=True)\n"
            "time.sleep(600)\n"
        )
        argv = [sys.executable, "-c", script, str(here)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as tester:
            assert tester.stdout is not None
            pidfds = [os.pidfd_open(int(pid)) for pid in tester.stdout.readline().split()]
            tester.kill()
        assert len(pidfds) == 4
        assert all(gone(pidfd) for pidfd in pidfds)
        for pidfd in pidfds:
            os.close(pidfd)

    def test_one_spawned_in_a_thread_outlives_the_thread(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            p0 = pool.submit(Actor.spawn, "p0").result()
        time.sleep(0.05)
        with p0:
            p0.expect_no_signal()


class TestBuild:
    def test_is_made_once(self) -> None:
        first = compile_actor()
        made = first.stat().st_mtime_ns
        assert compile_actor() == first
        assert first.stat().st_mtime_ns == made

    def test_by_several_processes_at_once(self, tmp_path: Path) -> None:
        script = (
            "import sys, pathlib, subprocess\n"
            "from tests.support.actor import compile_actor\n"
            "binary = compile_actor(pathlib.Path(sys.argv[1]))\n"
            "sys.exit(subprocess.run([binary, 'p0'], stdin=subprocess.DEVNULL).returncode)\n"
        )
        argv = [sys.executable, "-c", script, str(tmp_path / "build")]
        makers = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(4)]
        assert [b"hello" in maker.communicate()[0] for maker in makers] == [True] * 4
        assert [maker.returncode for maker in makers] == [0] * 4
        assert len(list((tmp_path / "build").iterdir())) == 1
