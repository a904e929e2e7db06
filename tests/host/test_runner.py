"""daxemu run without a mount: the command replaces the process, and is released from it.

Files in shared memory stand for files of a mount; a fake supervisor records the requests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.mount import DAXEMU

PATIENCE = 20.0
START = """
import json, os, sys
from pathlib import Path
from daxemu.host.proc.mountinfo import Mount
from daxemu.host.run.runner import execute
here, result, *command = sys.argv[1:]
number = os.stat(here).st_dev
log = os.open(f"{here}/log", os.O_CREAT | os.O_APPEND | os.O_RDWR)
def advise(tid, piece, soft):
    with open(f"{here}/log", "a") as log:
        log.write(json.dumps([piece.offset, piece.length, soft]) + "\\n")
    return int(result)
execute(command, Mount(Path(here), Path(here), (os.major(number), os.minor(number))), advise)
"""
CALL = """
import ctypes, mmap, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
view = mmap.mmap(os.open(sys.argv[1] + "/f", os.O_RDWR), 8 * 4096)
at = ctypes.addressof(ctypes.c_char.from_buffer(view))
def advise(page=2, pages=1, advice=100):
    failed = libc.madvise(at + page * 4096, pages * 4096, advice)
    return os.strerror(ctypes.get_errno()) if failed else "0"
"""


@pytest.fixture
def here() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as path:
        (Path(path) / "f").write_bytes(bytes(8 * 4096))
        (Path(path) / "control.sock").touch()
        yield Path(path)


def started(here: Path, script: str, result: int = 0, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(here), str(result), sys.executable, "-c", CALL + script, str(here)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def says(here: Path, script: str, result: int = 0) -> str:
    out, _ = (process := started(here, script, result)).communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return out.strip()


def asked(here: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (here / "log").read_text().splitlines()]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def helpers(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if START.encode() in words and mark.encode() in words and parent != os.getpid():
                found.append(int(entry.name))
    return found


def test_what_it_asks_and_returns(here: Path) -> None:
    assert says(here, "print(advise(), advise(3, 4, 101))") == "0 0"
    assert asked(here) == [[2 * 4096, 4096, False], [3 * 4096, 4 * 4096, True]]
    assert says(here, "print(advise())", 16) == "Device or resource busy"


def test_children_and_threads(here: Path) -> None:
    script = """
import threading
(thread := threading.Thread(target=lambda: print(advise(1), flush=True))).start()
thread.join()
if not (pid := os.fork()):
    print(advise(2), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(advise(3), flush=True)
if not sys.argv[2:]:
    os.execv(sys.executable, [*sys.orig_argv, "again"])
"""
    assert says(here, script).split() == ["0"] * 6
    assert sorted(offset for offset, _, _ in asked(here)) == [n * 4096 for n in (1, 1, 2, 2, 3, 3)]


def test_a_signal_meanwhile_waits(here: Path) -> None:
    """A received call is made once, whatever signal arrives."""
    script = """
got = []
signal.signal(signal.SIGALRM, lambda *_: got.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
results = {advise() for _ in range(200)}
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(got) > 0, results - {os.strerror(4)})
"""
    assert says(here, script) == "True {'0'}"
    assert len(asked(here)) <= 200


def test_stop_and_continue(here: Path) -> None:
    with started(
        here, "print(os.getpid(), flush=True); input(); print(advise())", stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV])
def test_signals_reach_the_command(here: Path, number: signal.Signals) -> None:
    default = "pass;" if number == signal.SIGKILL else f"signal.signal({int(number)}, signal.SIG_DFL);"
    script = f"{default} print(flush=True); input()"
    with started(here, script, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number


def test_a_terminals_interrupt(here: Path) -> None:
    """Ctrl-C signals the terminal's process group, and the helper belongs to no such group."""
    with started(here, "print(flush=True); time.sleep(60)", start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (helper,) = helpers(str(here))
        assert os.getsid(helper) == helper != os.getsid(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE) == -signal.SIGTERM
    assert eventually(lambda: not helpers(str(here)))


def test_the_helper_is_no_child_of_the_command(here: Path) -> None:
    script = """
try:
    print(os.waitpid(-1, 0))
except ChildProcessError:
    print("none")
"""
    assert says(here, script) == "none"


def test_the_helper_stays_for_a_daemon(here: Path) -> None:
    """The helper holds no pipe open: the output ends with the command."""
    script = """
if os.fork():
    os._exit(0)
os.dup2(os.open("/dev/null", 2), 1)
while os.path.exists(sys.argv[1]) and not os.path.exists(sys.argv[1] + "/go"):
    time.sleep(0.01)
open(sys.argv[1] + "/said", "w").write(advise())
"""
    assert says(here, script) == ""
    assert helpers(str(here))
    (here / "go").touch()
    assert eventually(lambda: (here / "said").exists() and (here / "said").read_text() == "0")
    assert eventually(lambda: not helpers(str(here)))


def test_descriptors_and_dispositions_are_its_own(here: Path) -> None:
    reader, writer = os.pipe()
    script = (
        f"os.write({writer}, b'x')\n"
        "print(*(line for line in open('/proc/self/status') if line.startswith('SigIgn')))\n"
        "print(sorted(int(n) for n in os.listdir('/proc/self/fd')))"
    )
    plain = subprocess.run(
        [sys.executable, "-c", CALL + script, str(here)], stdout=subprocess.PIPE, pass_fds=[writer], text=True
    )
    with started(here, script, pass_fds=[writer]) as process:
        assert process.communicate()[0] == plain.stdout
    assert os.read(reader, 2) == b"xx"
    os.close(reader)
    os.close(writer)


def test_without_a_helper_the_call_fails(here: Path) -> None:
    with started(here, "print(flush=True); input(); print(advise())", stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(helpers(str(here))[0], signal.SIGKILL)
        assert process.communicate("\n")[0] == "Function not implemented\n"


# -- the command line


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DAXEMU, "run", *words], capture_output=True, text=True, timeout=PATIENCE, **options
    )


def test_exit_statuses() -> None:
    assert command("--", "true").returncode == 0
    assert command("--", "sh", "-c", "exit 7").returncode == 7
    assert command("--", "sh", "-c", "kill -9 $$").returncode == -9
    assert command("--", "no-such-command").returncode == 127
    assert command("--", "/etc/passwd").returncode == 126


def test_each_mistake_has_its_error_and_status() -> None:
    done = command("--", "no-such-command")
    assert done.stderr == "daxemu: no-such-command: No such file or directory\n"
    assert (done := command("ls")).returncode == 2
    assert "after --" in done.stderr
    assert (done := command("/usr", "--", "ls")).returncode == 3
    assert "is not on a daxemu mount" in done.stderr
    assert (done := command("--", *DAXEMU, "run", "--", "true")).returncode == 4


def test_words_of_the_command_are_its_own() -> None:
    assert command("--", "echo", "--help", "--", "-x").stdout == "--help -- -x\n"


def test_a_pipeline() -> None:
    assert command("--", "sh", "-c", "yes | head -3 | wc -l").stdout.strip() == "3"
    piped = subprocess.run(
        ["sh", "-c", f"{' '.join(DAXEMU)} run -- yes | head -2"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (piped.stdout, piped.stderr) == ("y\ny\n", "")


def test_without_root() -> None:
    """Without root, no_new_privs is set: a set-user-ID program gains no privilege."""
    done = command("--", "grep", "-E", "NoNewPrivs|Seccomp_filters", "/proc/self/status")
    assert done.stdout.split() == ["NoNewPrivs:", "0", "Seccomp_filters:", "1"]
    if os.geteuid() == 0:
        unprivileged = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all"]
        argv = [*unprivileged, *DAXEMU, "run", "--", "grep", "-E", "NoNewPrivs", "/proc/self/status"]
        other = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
        if "ermission denied" in other.stderr or "No module" in other.stderr:
            pytest.skip("nobody may not run this interpreter")
        assert other.stdout.split() == ["NoNewPrivs:", "1"], other.stderr
