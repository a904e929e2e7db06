"""The tracer on real processes: what an unmodified C program sees, to the byte.

A victim obeys one-word commands on its standard input and prints one line for each thing that happens to it.
A file on /dev/shm that is mapped and then truncated gives real SIGBUS/BUS_ADRERR on touch, so AR needs no
FUSE here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from daxemu.host import ptrace, siginfo
from daxemu.host.ptrace import Kind, Step, Stop
from daxemu.host.tracer import (
    Delivered,
    Gone,
    Ignored,
    NotTaken,
    Refused,
    SendAO,
    Thread,
    Verdict,
)
from daxemu.host.tracer_link import Armed, TracerLink
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AO, BUS_MCEERR_AR

VICTIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static __thread sigjmp_buf recover;
static __thread int touching;
static volatile int counted;
static char *map;

static void say(const char *fmt, ...)
{
    char line[200];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (write(1, line, n) != n)
        _exit(3);
}
static void on_bus(int sig, siginfo_t *i, void *c)
{
    say("BUS %d %lx %d %ld\n", i->si_code, (long)i->si_addr, i->si_addr_lsb, syscall(SYS_gettid));
    if (touching && i->si_code != BUS_MCEERR_AO)
        siglongjmp(recover, 1);
}
static void on_count(int sig) { counted++; }
static void set(int sig, void *handler)
{
    struct sigaction sa = {.sa_flags = SA_SIGINFO | SA_RESTART};
    sa.sa_sigaction = handler;
    if (handler == SIG_IGN || handler == SIG_DFL) {
        sa.sa_flags = 0;
        sa.sa_handler = handler;
    }
    sigaction(sig, &sa, 0);
}
static void *thread(void *unused)
{
    say("thread %ld\n", syscall(SYS_gettid));
    for (;;)
        pause();
}
static void *execer(void *path)
{
    char go;
    say("thread %ld\n", syscall(SYS_gettid));
    if (read(0, &go, 1) != 1)
        _exit(4);
    execl(path, path, "/dev/null", "again", NULL);
    _exit(4);
}
static int line(char *buf, int size)
{
    for (int n = 0; n < size - 1;) {
        if (read(0, buf + n, 1) != 1) {
            say("READ %d\n", errno);
            _exit(5);
        }
        if (buf[n] == '\n')
            return buf[n] = 0, 1;
        n++;
    }
    return 0;
}
static long ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}
int main(int argc, char **argv)
{
    char buf[100], word[20];
    sigset_t bus;
    int fd = open(argv[1], O_RDWR);
    map = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    sigemptyset(&bus);
    sigaddset(&bus, SIGBUS);
    set(SIGBUS, on_bus);
    set(SIGRTMIN + 1, on_count);
    say("ready %lx\n", (long)map);
    while (line(buf, sizeof buf)) {
        long arg = 0;
        sscanf(buf, "%19s %ld", word, &arg);
        if (!strcmp(word, "touch")) {
            touching = 1;
            if (!sigsetjmp(recover, 1))
                say("byte %d\n", ((volatile char *)map)[arg]);
            touching = 0;
        } else if (!strcmp(word, "block")) {
            pthread_sigmask(SIG_BLOCK, &bus, 0), say("done\n");
        } else if (!strcmp(word, "unblock")) {
            pthread_sigmask(SIG_UNBLOCK, &bus, 0), say("done\n");
        } else if (!strcmp(word, "ignore")) {
            set(SIGBUS, SIG_IGN), say("done\n");
        } else if (!strcmp(word, "default")) {
            set(SIGBUS, SIG_DFL), say("done\n");
        } else if (!strcmp(word, "take")) {
            siginfo_t i;
            struct timespec t = {arg, 0};
            int r = sigtimedwait(&bus, &i, &t);
            if (r < 0)
                say("TOOK %d %d\n", r, errno);
            else
                say("TOOK %d %d %lx %d\n", r, i.si_code, (long)i.si_addr, i.si_addr_lsb);
        } else if (!strcmp(word, "sleep")) {
            struct timespec t = {0, arg * 1000000};
            long from = ms();
            int r = nanosleep(&t, 0);
            say("slept %d %d\n", r, ms() - from >= arg);
        } else if (!strcmp(word, "epoll")) {
            struct epoll_event e = {.events = EPOLLIN};
            int ep = epoll_create1(0), sfd = signalfd(-1, &bus, 0);
            struct signalfd_siginfo s;
            epoll_ctl(ep, EPOLL_CTL_ADD, sfd, &e);
            int r = epoll_wait(ep, &e, 1, -1);
            if (r != 1 || read(sfd, &s, sizeof s) != sizeof s)
                say("EPOLL %d %d\n", r, errno);
            else
                say("EPOLL %d %lx %d\n", s.ssi_code, (long)s.ssi_addr, s.ssi_addr_lsb);
        } else if (!strcmp(word, "thread")) {
            pthread_t t;
            pthread_create(&t, 0, thread, 0);
        } else if (!strcmp(word, "spin")) {
            say("done\n");
            for (unsigned long n = 0; counted < arg; n++) {
                /* a value that lives in the red zone and in registers must survive */
                volatile unsigned long check[8];
                for (int k = 0; k < 8; k++)
                    check[k] = n * k;
                for (int k = 0; k < 8; k++)
                    if (check[k] != n * k)
                        abort();
            }
            say("counted %d\n", counted);
        } else if (!strcmp(word, "exec")) {
            pthread_t t;
            pthread_create(&t, 0, execer, argv[0]);
            for (;;)
                pause();
        } else if (!strcmp(word, "execself")) {
            execl(argv[0], argv[0], argv[1], NULL);
        } else if (!strcmp(word, "seccomp")) { /* death to whoever calls rt_tgsigqueueinfo */
            struct sock_filter code[] = {
                BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_tgsigqueueinfo, 0, 1),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
            };
            struct sock_fprog prog = {4, code};
            prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            say("done %d\n", prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog));
        } else if (!strcmp(word, "count")) {
            say("counted %d\n", counted);
        } else if (!strcmp(word, "quit")) {
            return 0;
        }
    }
    return 1;
}
"""


async def until(condition: Callable[[], bool]) -> None:
    """For what the kernel has no event for."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


class Victim:
    """One running victim program."""

    def __init__(self, process: trio.Process, file: Path) -> None:
        self.process = process
        self.file = file
        self.map = 0
        self._rest = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(command.encode() + b"\n")

    async def line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            chunk = await self.process.stdout.receive_some()
            assert chunk, f"the victim ended: {self._rest!r}"
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    async def ask(self, command: str) -> str:
        await self.tell(command)
        return await self.line()

    async def asleep_in(self, *calls: int) -> None:
        """Until the main thread sleeps in one of these system calls: there is no event for that."""
        await until(lambda: _syscall(self.pid) in calls)

    async def free(self, tid: int = 0) -> None:
        """Until nobody traces it: letting go follows the report of a delivery by an instant."""
        await until(lambda: _status(tid or self.pid).tracer == 0)


def _syscall(tid: int) -> int:
    word = Path(f"/proc/{tid}/syscall").read_text().split()[0]
    return int(word) if word.isdigit() else -1


def _status(tid: int) -> siginfo.Status:
    status = siginfo.read_status(tid)
    assert status is not None
    return status


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("victim")
    source = folder / "victim.c"
    source.write_text(VICTIM)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", folder / "victim", source], check=True)
    return folder / "victim"


Start = Callable[[], Awaitable[Victim]]


@asynccontextmanager
async def victims(program: Path) -> AsyncIterator[Start]:
    """A function that starts victims; all are ended at the end."""
    running: list[Victim] = []

    async def start() -> Victim:
        file = Path(f"/dev/shm/daxemu-test-{os.getpid()}-{len(running)}")
        await trio.Path(file).write_bytes(bytes(1 << 20))
        process = await trio.lowlevel.open_process(
            [program, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        victim = Victim(process, file)
        running.append(victim)
        victim.map = int((await victim.line()).split()[1], 16)
        return victim

    try:
        yield start
    finally:
        with trio.CancelScope(shield=True):
            for victim in running:
                victim.process.kill()
                await victim.process.wait()
                victim.file.unlink(missing_ok=True)


def scenario(program: Path, play: Callable[[TracerLink, Start], Awaitable[None]]) -> None:
    """Run one scenario with a tracer, under a limit that only a hang reaches."""

    async def main() -> None:
        with trio.fail_after(60):
            async with victims(program) as start, TracerLink.open() as link:
                await play(link, start)

    trio.run(main)


async def deliver(link: TracerLink, victim: Victim, addr: int, lsb: int = 12, tid: int = 0) -> None:
    pending = await link.send_ao(victim.pid, tid or victim.pid, addr, lsb)
    assert await pending.wait(30) == Delivered(pending.id, tid or victim.pid, BUS_MCEERR_AO, addr)


# --- AO ---


def test_ao_handler_sees_exact_siginfo(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        for lsb in (12, 21):
            await deliver(link, victim, victim.map + 0x3000, lsb)
            assert await victim.line() == f"BUS 5 {victim.map + 0x3000:x} {lsb} {victim.pid}"
        await victim.free()
        assert await victim.ask("count") == "counted 0"  # read(2) was restarted

    scenario(program, play)


def test_ao_high_address(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        await deliver(link, victim, 0xFFFF_FFFF_FFFF_F000)
        assert await victim.line() == f"BUS 5 fffffffffffff000 12 {victim.pid}"

    scenario(program, play)


def test_ao_to_the_second_of_three_threads(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        tids = [int((await victim.ask("thread")).split()[1]) for _ in range(2)]
        await deliver(link, victim, victim.map, tid=tids[0])
        assert await victim.line() == f"BUS 5 {victim.map:x} 12 {tids[0]}"
        await victim.free(tids[0])
        assert [_status(tid).tracer for tid in (victim.pid, *tids)] == [0, 0, 0]

    scenario(program, play)


def test_ao_blocked_then_taken(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        await deliver(link, victim, victim.map + 0x1000)
        assert await victim.ask("take 10") == f"TOOK 7 5 {victim.map + 0x1000:x} 12"
        await victim.free()

    scenario(program, play)


def test_ao_blocked_then_unblocked(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        await deliver(link, victim, victim.map + 0x1000, 21)
        assert await victim.ask("unblock") == f"BUS 5 {victim.map + 0x1000:x} 21 {victim.pid}"
        assert await victim.line() == "done"

    scenario(program, play)


def test_ao_while_it_waits_in_sigtimedwait(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        for page in range(20):
            await victim.tell("take 30")
            await victim.asleep_in(128)
            await deliver(link, victim, victim.map + page * 4096)
            assert await victim.line() == f"TOOK 7 5 {victim.map + page * 4096:x} 12"

    scenario(program, play)


def test_ao_ignored_but_blocked_is_found_by_sigtimedwait(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        assert await victim.ask("ignore") == "done"
        await victim.tell("take 30")
        await victim.asleep_in(128)
        await deliver(link, victim, victim.map)
        assert await victim.line() == f"TOOK 7 5 {victim.map:x} 12"

    scenario(program, play)


def test_ao_blocked_through_signalfd_and_epoll(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        await victim.tell("epoll")
        await victim.asleep_in(232)
        await deliver(link, victim, victim.map + 0x5000)
        assert await victim.line() == f"EPOLL 5 {victim.map + 0x5000:x} 12"

    scenario(program, play)


def test_ao_blocked_restarts_read_and_nanosleep(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        await victim.asleep_in(0)
        await deliver(link, victim, victim.map)
        assert await victim.ask("take 10") == f"TOOK 7 5 {victim.map:x} 12"
        await victim.tell("sleep 300")
        await victim.asleep_in(35, 230)
        await deliver(link, victim, victim.map)
        assert await victim.line() == "slept 0 1"

    scenario(program, play)


def test_ao_blocked_in_a_busy_thread_leaves_its_stack_alone(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        for n in range(1, 30):
            assert await victim.ask(f"spin {n}") == "done"
            await deliver(link, victim, victim.map + n)
            os.kill(victim.pid, signal.SIGRTMIN + 1)
            assert await victim.line() == f"counted {n}"
            assert await victim.ask("take 10") == f"TOOK 7 5 {victim.map + n:x} 12"

    scenario(program, play)


def test_several_ao_blocked_none_lost(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        sent = [await link.send_ao(victim.pid, victim.pid, victim.map + 4096 * n) for n in range(5)]
        for n in range(5):
            assert isinstance(await sent[n].wait(30), Delivered)
            assert await victim.ask("take 30") == f"TOOK 7 5 {victim.map + 4096 * n:x} 12"

    scenario(program, play)


def test_ao_blocked_under_a_seccomp_filter_does_not_kill(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("seccomp") == "done 0"
        assert await victim.ask("block") == "done"
        outcome = await (await link.send_ao(victim.pid, victim.pid, victim.map)).wait(30)
        took = await victim.ask("take 10")
        if isinstance(outcome, Refused):  # no CAP_SYS_ADMIN, or a kernel without CONFIG_CHECKPOINT_RESTORE
            assert outcome.signalled
            assert took.startswith("TOOK 7 -6 ")
        else:
            assert isinstance(outcome, Delivered)
            assert took == f"TOOK 7 5 {victim.map:x} 12"

    scenario(program, play)


def test_ao_ignored(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("ignore") == "done"
        pending = await link.send_ao(victim.pid, victim.pid, victim.map)
        assert await pending.wait(30) == Ignored(pending.id)
        assert await victim.ask("count") == "counted 0"

    scenario(program, play)


def test_ao_default_action_kills(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("default") == "done"
        await deliver(link, victim, victim.map)
        assert await victim.process.wait() == -signal.SIGBUS

    scenario(program, play)


def test_ao_to_a_stopped_process_waits_for_sigcont(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        os.kill(victim.pid, signal.SIGSTOP)
        await until(lambda: _status(victim.pid).state == "T")
        pending = await link.send_ao(victim.pid, victim.pid, victim.map)
        await until(lambda: _status(victim.pid).tracer != 0)
        await link.arm(os.getpid() ^ 0x3FFFFF)  # a round trip: the tracer has done all it could
        assert pending.outcome is None
        assert _status(victim.pid).state in "Tt"
        os.kill(victim.pid, signal.SIGCONT)
        assert isinstance(await pending.wait(30), Delivered)
        assert await victim.line() == f"BUS 5 {victim.map:x} 12 {victim.pid}"
        await victim.free()

    scenario(program, play)


def test_twenty_ao_arrive_in_order(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        for _ in range(10):
            sent = [await link.send_ao(victim.pid, victim.pid, victim.map + 4096 * n) for n in range(20)]
            for n in range(20):
                assert await victim.line() == f"BUS 5 {victim.map + 4096 * n:x} 12 {victim.pid}"
                assert isinstance(await sent[n].wait(30), Delivered)
        await victim.free()

    scenario(program, play)


@pytest.mark.parametrize("mask", ["block", "unblock"])
def test_other_signals_and_stops_are_unharmed(program: Path, mask: str) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask(mask) == "done"
        assert await victim.ask("spin 4001") == "done"
        ended = trio.Event()

        async def storm() -> None:
            for n in range(4000):
                os.kill(victim.pid, signal.SIGRTMIN + 1)  # a queued signal: each one counts
                if n % 50 == 0:
                    os.kill(victim.pid, signal.SIGSTOP)
                    await trio.lowlevel.checkpoint()
                    os.kill(victim.pid, signal.SIGCONT)
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(storm)
            for n in range(1 if mask == "block" else 20):
                await deliver(link, victim, victim.map + 4096 * n)
                if mask == "unblock":
                    assert await victim.line() == f"BUS 5 {victim.map + 4096 * n:x} 12 {victim.pid}"
            await ended.wait()
        os.kill(victim.pid, signal.SIGRTMIN + 1)
        assert await victim.line() == "counted 4001"
        if mask == "block":
            assert await victim.ask("take 10") == f"TOOK 7 5 {victim.map:x} 12"

    scenario(program, play)


# --- AR ---


async def consume(link: TracerLink, victim: Victim, offset: int) -> None:
    armed = await link.arm(victim.pid, 30)
    assert isinstance(armed, Armed)
    addr = victim.map + offset
    assert await victim.ask(f"touch {offset}") == f"BUS 4 {addr:x} 12 {victim.pid}"
    assert await armed.wait(30) == Delivered(armed.id, victim.pid, BUS_MCEERR_AR, addr)


def test_ar_again_and_again(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("touch 5") == "byte 0"
        os.truncate(victim.file, 0)
        for n in range(50):
            await consume(link, victim, n * 4096 + 7)
        await victim.free()
        assert await victim.ask("touch 8191") == f"BUS {BUS_ADRERR} {victim.map + 8191:x} 0 {victim.pid}"

    scenario(program, play)


@pytest.mark.parametrize("how", ["block", "ignore", "default"])
def test_ar_is_forced(program: Path, how: str) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask(how) == "done"
        os.truncate(victim.file, 0)
        armed = await link.arm(victim.pid, 30)
        assert isinstance(armed, Armed)
        await victim.tell("touch 9")
        assert await armed.wait(30) == Delivered(armed.id, victim.pid, BUS_MCEERR_AR, victim.map + 9)
        assert await victim.process.wait() == -signal.SIGBUS

    scenario(program, play)


def test_ar_not_taken_lets_go(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        assert await victim.ask("block") == "done"
        await victim.tell("take 1000")
        await victim.asleep_in(128)
        armed = await link.arm(victim.pid, 0.01)
        assert isinstance(armed, Armed)
        assert await armed.wait(30) == NotTaken(armed.id)
        await victim.free()
        await deliver(link, victim, victim.map)  # it still waits
        assert await victim.line() == f"TOOK 7 5 {victim.map:x} 12"

    scenario(program, play)


def test_ar_in_a_stopped_process_not_taken_stays_stopped(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        os.kill(victim.pid, signal.SIGSTOP)
        await until(lambda: _status(victim.pid).state == "T")
        armed = await link.arm(victim.pid, 0.01)
        assert isinstance(armed, Armed)
        assert await armed.wait(30) == NotTaken(armed.id)
        await victim.free()
        await until(lambda: _status(victim.pid).state == "T")  # on its way back into the group stop
        os.kill(victim.pid, signal.SIGCONT)
        assert await victim.ask("count") == "counted 0"

    scenario(program, play)


def test_two_arms_one_fault(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        os.truncate(victim.file, 0)
        first, second = await link.arm(victim.pid, 30), await link.arm(victim.pid, 30)
        assert isinstance(first, Armed)
        assert isinstance(second, Armed)
        assert await victim.ask("touch 0") == f"BUS 4 {victim.map:x} 12 {victim.pid}"
        assert isinstance(await first.wait(30), Delivered)
        assert isinstance(await second.wait(30), Delivered)

    scenario(program, play)


def test_ao_and_ar_on_one_thread(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        os.truncate(victim.file, 0)
        for n in range(20):
            armed = await link.arm(victim.pid, 30)
            assert isinstance(armed, Armed)
            sent = [await link.send_ao(victim.pid, victim.pid, victim.map + 4096 * k) for k in range(3)]
            await victim.tell(f"touch {n}")
            seen = [await victim.line() for _ in range(4)]  # the handler returns from AO into the touch
            for pending in sent:
                assert isinstance(await pending.wait(30), Delivered)
            assert isinstance(await armed.wait(30), Delivered)
            assert [line for line in seen if line.startswith("BUS 4")] == [
                f"BUS 4 {victim.map + n:x} 12 {victim.pid}"
            ]
            assert [line for line in seen if line.startswith("BUS 5")] == [
                f"BUS 5 {victim.map + 4096 * k:x} 12 {victim.pid}" for k in range(3)
            ]

    scenario(program, play)


# --- refusals and ends ---


def test_already_traced(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        code = f"from daxemu.host import ptrace; ptrace.seize({victim.pid}); print(flush=True); input()"
        other = await trio.lowlevel.open_process(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert other.stdout is not None
            await other.stdout.receive_some()
            refused = await link.arm(victim.pid)
            assert isinstance(refused, Refused)
            assert refused.reason.startswith(f"already traced by PID {other.pid} (python")
            assert not refused.signalled
            outcome = await (await link.send_ao(victim.pid, victim.pid, victim.map)).wait(30)
            assert isinstance(outcome, Refused)
            assert outcome.signalled
        finally:
            other.kill()
            await other.wait()
        assert (await victim.line()).startswith("BUS -6 ")

    scenario(program, play)


def test_gone(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        armed = await link.arm(victim.pid, 1000)
        assert isinstance(armed, Armed)
        await victim.tell("quit")
        assert await armed.wait(30) == Gone(armed.id)
        assert await victim.process.wait() == 0
        assert isinstance(await link.arm(victim.pid), Gone)
        pending = await link.send_ao(victim.pid, victim.pid, 0)
        assert await pending.wait(30) == Gone(pending.id)

    scenario(program, play)


def test_exec_in_a_thread_ends_them_all(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        tids = [victim.pid] + [int((await victim.ask(word)).split()[1]) for word in ("thread", "exec")]
        held = [await link.arm(tid, 1000) for tid in tids]
        await victim.tell("")
        for armed in held:
            assert isinstance(armed, Armed)
            assert await armed.wait(30) == Gone(armed.id)
        assert (await victim.line()).startswith("ready")
        await victim.free()

    scenario(program, play)


def test_exec_in_an_unheld_thread_ends_the_held_leader(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        await victim.ask("exec")
        armed = await link.arm(victim.pid, 1000)
        assert isinstance(armed, Armed)
        await victim.tell("")
        assert await armed.wait(30) == Gone(armed.id)  # the kernel does not say so: the sweep finds it
        assert (await victim.line()).startswith("ready")

    scenario(program, play)


def test_exec_of_a_single_thread(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        armed = await link.arm(victim.pid, 1000)
        assert isinstance(armed, Armed)
        assert (await victim.ask("execself")).startswith("ready")
        assert await armed.wait(30) == Gone(armed.id)
        await victim.free()

    scenario(program, play)


def test_tracer_killed_then_restarted(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        victim = await start()
        armed = await link.arm(victim.pid, 1000)
        assert isinstance(armed, Armed)
        first = link.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        outcome = await armed.wait(30)
        assert isinstance(outcome, Refused)
        assert outcome.reason == "the tracer died"
        await deliver(link, victim, victim.map)
        assert await victim.line() == f"BUS 5 {victim.map:x} 12 {victim.pid}"
        assert link.pid != first

    scenario(program, play)


def test_closing_lets_everything_go(program: Path) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with victims(program) as start:
                running, stopped = await start(), await start()
                os.kill(stopped.pid, signal.SIGSTOP)
                async with TracerLink.open() as link:
                    pid = link.pid
                    assert isinstance(await link.arm(running.pid, 1000), Armed)
                    await link.send_ao(stopped.pid, stopped.pid, 0)
                    await until(lambda: _status(stopped.pid).tracer != 0)
                with pytest.raises(ProcessLookupError):
                    os.kill(pid or 0, 0)
                assert _status(running.pid).tracer == _status(stopped.pid).tracer == 0
                assert await running.ask("count") == "counted 0"
                os.kill(stopped.pid, signal.SIGCONT)
                assert await stopped.ask("count") == "counted 0"

    trio.run(main)


def test_fifty_victims_at_once_and_a_callback_for_each(program: Path) -> None:
    outcomes: list[object] = []

    async def main() -> None:
        with trio.fail_after(60):
            async with victims(program) as start, TracerLink.open(outcomes.append) as link:
                all_of_them = [await start() for _ in range(50)]
                for victim in all_of_them:
                    os.truncate(victim.file, 0)

                async def one(victim: Victim) -> None:
                    await deliver(link, victim, victim.map + 1)
                    assert (await victim.line()).startswith("BUS 5 ")
                    await consume(link, victim, 4096)

                async with trio.open_nursery() as nursery:
                    for victim in all_of_them:
                        nursery.start_soon(one, victim)

    trio.run(main)
    assert len(outcomes) == 100
    assert all(isinstance(outcome, Delivered) for outcome in outcomes)


def test_thousands_in_flight_do_not_deadlock(program: Path) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        gone = [await link.send_ao(1 << 22, 1 << 22, n) for n in range(5000)]
        for pending in gone:
            assert await pending.wait(30) == Gone(pending.id)

    scenario(program, play)


# --- the decisions, without processes ---


def _ao(id_: int) -> SendAO:
    return SendAO(id_, 1, 2, 0x1000 * id_)


def _cookie_stop(cookie: int) -> Stop:
    return Stop(Kind.SIGNAL, signal.SIGBUS, siginfo.SigInfo(signal.SIGBUS, siginfo.SI_QUEUE, cookie, 0, 0))


def test_decide_queue_then_replace_then_detach() -> None:
    thread = Thread(2)
    thread.fifo.append(_ao(1))
    assert thread.wants_interrupt
    assert thread.decide(Stop(Kind.TRAP), 77).step is Step.QUEUE
    verdict = thread.decide(_cookie_stop(77), 78)
    assert (verdict.step, verdict.sig) == (Step.DETACH, signal.SIGBUS)
    assert verdict.info == siginfo.bus_error(BUS_MCEERR_AO, 0x1000, 12)
    assert verdict.reports == (Delivered(1, 2, BUS_MCEERR_AO, 0x1000),)


def test_decide_a_dropped_cookie_is_sent_again() -> None:
    thread = Thread(2)
    thread.fifo.append(_ao(1))
    thread.decide(Stop(Kind.TRAP), 77)
    foreign = Stop(Kind.SIGNAL, signal.SIGBUS, siginfo.SigInfo(signal.SIGBUS, 0, 0, 0, 0), pending=False)
    verdict = thread.decide(foreign, 78)
    assert (verdict.step, verdict.info, verdict.interrupt) == (Step.CONT, None, True)
    assert thread.decide(Stop(Kind.TRAP), 79).step is Step.QUEUE


def test_decide_a_signal_before_the_injected_call_undoes_it() -> None:
    thread = Thread(2)
    thread.fifo.append(_ao(1))
    assert thread.decide(Stop(Kind.TRAP, blocked=True), 1).step is Step.INJECT
    verdict = thread.decide(Stop(Kind.SIGNAL, signal.SIGUSR1), 2)
    assert verdict == Verdict(Step.CONT, signal.SIGUSR1, undo=True, interrupt=True)
    assert thread.decide(Stop(Kind.TRAP, blocked=True), 3).step is Step.INJECT
    assert thread.decide(Stop(Kind.SYSCALL), 4).step is Step.SYSCALL
    verdict = thread.decide(Stop(Kind.SYSCALL, result=0), 5)
    assert (verdict.undo, verdict.step, verdict.interrupt) == (True, Step.CONT, True)
    assert verdict.reports == (Delivered(1, 2, BUS_MCEERR_AO, 0x1000),)
    assert thread.decide(Stop(Kind.TRAP, blocked=True, pending=True), 6).step is Step.DETACH


def test_decide_a_late_fault_beats_the_expired_arm() -> None:
    thread = Thread(2)
    thread.arm(5, deadline=1.0)
    thread.expire(2.0)
    verdict = thread.decide(Stop(Kind.TRAP, pending=True), 1)
    assert (verdict.step, verdict.interrupt, verdict.reports) == (Step.CONT, False, ())
    fault = siginfo.parse(siginfo.bus_error(BUS_ADRERR, 0x5008, 0))
    verdict = thread.decide(Stop(Kind.SIGNAL, signal.SIGBUS, fault), 2)
    assert verdict.reports == (Delivered(5, 2, BUS_MCEERR_AR, 0x5008),)
    assert verdict.step is Step.DETACH


def test_errors_carry_errno() -> None:
    with pytest.raises(OSError, match="SEIZE") as caught:
        ptrace.seize(1 << 22)
    assert caught.value.errno == errno.ESRCH
    with contextlib.suppress(ProcessLookupError):
        ptrace.tgkill(1 << 22, 1 << 22, 0)
