"""Zygote: forks supervisors, commands, and other test processes, from a process with all modules imported.

    python -m tests.support.zygote FD      requests on a SOCK_SEQPACKET socket: JSON, with descriptors

A fork takes a tenth of the time of a Python start. A forked supervisor equals ``python -m
daxemu.supervisor``, and a forked command ``python -m daxemu``, without the execve(2).
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self

from daxemu.errors import ERRORS, DaxemuError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0
LATE = ("daxemu.supervisor.run", "daxemu.supervisor.spawn", "daxemu.mm.memmap")
"""Modules that a supervisor, or a command, imports late: the larger part of its start. The modules of the
verbs come on top.
"""
MAX_REQUEST = 1 << 17
"""Bytes."""


class Zygote:
    """The forking process. A context manager; forked processes outlive it. Any thread may use a zygote."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._one_at_a_time = threading.Lock()
        self._state = _read_at_start()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.zygote", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the zygote."""
        self._sock.close()
        self._process.wait(PATIENCE)

    @property
    def is_up_to_date(self) -> bool:
        """Return True if a new Python would start as the zygote did: in the same mount namespace, and with
        the same values of the variables that daxemu and Python read at the start.
        """
        return self._state == _read_at_start()

    def _ask(self, *descriptors: int, **request: Any) -> dict[str, Any]:
        with self._one_at_a_time:
            socket.send_fds(self._sock, [json.dumps(request).encode()], descriptors)
            answer = self._sock.recv(MAX_REQUEST)
        assert answer, "the zygote died"
        found: dict[str, Any] = json.loads(answer)
        return found

    def supervise(
        self,
        device: Path,
        mountpoint: Path,
        sabotage: Sequence[Any] = (),
        repair: str = "none",
        *,
        direct: bool = False,
    ) -> int:
        """Mount with a repair strategy; return the supervisor's pid. Raises the error of a refused mount.

        ``sabotage``: a function of tests/support/sabotage.py and its arguments, called first in the
        supervisor.
        """
        answer = self._ask(
            do="supervise",
            device=str(device),
            mountpoint=str(mountpoint),
            sabotage=list(sabotage),
            repair=repair,
            direct=direct,
        )
        reply = answer["reply"]
        if not reply["ok"]:
            raise ERRORS.get(reply["error"], DaxemuError)(reply["message"])
        return int(answer["pid"])

    def run(self, function: str, *arguments: Any) -> int:
        """Call "module:function" in a new process; return the pid. Arguments must be JSON-compatible."""
        return int(self._ask(do="run", function=function, arguments=arguments)["pid"])

    def daxemu(self, arguments: Sequence[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
        """Run ``daxemu ARGUMENTS`` here, with an empty stdin. Return the result after the end of the command.

        Raises TimeoutExpired after ``timeout`` seconds; the command is killed then. Precondition:
        ``is_up_to_date``.
        """
        ended, status = os.pipe()
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            os.fdopen(ended) as end,
        ):
            try:
                request = {
                    "arguments": list(arguments),
                    "cwd": str(Path.cwd()),
                    "environment": dict(os.environ),
                    "umask": _umask(),
                }
                descriptors = (out.fileno(), err.fileno(), status)
                pid = int(self._ask(*descriptors, do="daxemu", **request)["pid"])
            finally:
                os.close(status)
            if not select.select([end], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(["daxemu", *arguments], timeout)
            code = end.readline()
            assert code, f"daxemu {arguments} was killed"
            wait_for_end(pid)
            for output in (out, err):
                output.seek(0)
            return subprocess.CompletedProcess(arguments, int(code), out.read(), err.read())


_shared: list[Zygote] = []


def shared_zygote() -> Zygote:
    """Return the zygote of this process, which starts at the first call."""
    if not _shared:
        _shared.append(Zygote())
        atexit.register(_shared[0].close)
    return _shared[0]


def _read_at_start() -> tuple[str, dict[str, str]]:
    """Return what a Python, or a module of daxemu, reads when it starts: see ``is_up_to_date``."""
    names = ("DAXEMU_", "PYTHON", "LD_")
    variables = {name: value for name, value in os.environ.items() if name.startswith(names)}
    return str(Path("/proc/thread-self/ns/mnt").readlink()), variables


_AT_FIRST = _read_at_start()


def forking_zygote() -> Zygote | None:
    """Return the shared zygote; None where a new Python would start differently, now or at its start, than at
    the beginning of the tests. A zygote inside a mount namespace of a test would keep the namespace alive.
    """
    if _read_at_start() != _AT_FIRST or not shared_zygote().is_up_to_date:
        return None
    return shared_zygote()


def _umask() -> int:
    text = Path("/proc/thread-self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Umask:")).split()[1], 8)


def wait_for_end(pid: int) -> None:
    """Wait for the end of a process, a child or not. Asserts after PATIENCE seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([handle], [], [], PATIENCE)
        assert ended, f"process {pid} lives on"
    finally:
        os.close(handle)


def wait_for_death(*pids: int) -> None:
    """Wait until a process, or its main thread, is dead. Other threads may linger in the kernel."""
    deadline = time.monotonic() + PATIENCE
    while all(map(_is_alive, pids)):
        assert time.monotonic() < deadline, f"processes {pids} live on"
        time.sleep(0.002)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


# -- in the zygote


def _serve(sock: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no wait(2) for children: a pidfd shows their end
    import daxemu.supervisor.__main__ as supervisor
    from daxemu.cli.main import VERBS

    for module in (*LATE, *(f"daxemu.cli.{name}" for name in sorted(set(VERBS.values())))):
        importlib.import_module(module)
    while True:
        packet, descriptors, _, _ = socket.recv_fds(sock, MAX_REQUEST, 3)
        if not packet:
            return
        request = json.loads(packet)
        try:
            match request["do"]:
                case "supervise":
                    answer = _supervise(supervisor.main, request)
                case "daxemu":
                    answer = {"pid": _command(request, *descriptors)}
                case _:
                    answer = {"pid": _fork(lambda r=request: _call(r), "/dev/null")}  # type: ignore[misc]
        finally:
            for fd in descriptors:
                os.close(fd)
        sock.send(json.dumps(answer).encode())


def _command(request: dict[str, Any], out: int, err: int, status: int) -> int:
    """Start a command; return its pid. The command writes its exit status to ``status`` at its end."""

    def command() -> int:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _open_standard(os.open(os.devnull, os.O_RDONLY), out, err, keep=[status])
        os.chdir(request["cwd"])
        os.umask(request["umask"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return _run_command(request["arguments"])

    pid = os.fork()
    if not pid:
        _end_with(command, lambda code: os.write(status, b"%d\n" % code))
    return pid


def _run_command(arguments: list[str]) -> int:
    from daxemu.cli.main import main
    from daxemu.supervisor import spawn

    forking = SimpleNamespace(**vars(subprocess))
    forking.Popen = ForkedSupervisor
    vars(spawn)["subprocess"] = forking
    try:
        main(arguments, prog_name="daxemu")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


class ForkedSupervisor:
    """Child forked, not executed, for ``python -m daxemu.supervisor``: the part of subprocess.Popen that
    supervisor/spawn.py uses.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: Any,
        stderr: Any,
        pass_fds: Sequence[int],
        start_new_session: bool,
        cwd: str,
    ) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "daxemu.supervisor"]
        assert (stdin, start_new_session) == (subprocess.DEVNULL, True)
        device, mountpoint, ready, options = command[3:]
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            _open_standard(os.open(os.devnull, os.O_RDONLY), stdout.fileno(), stderr.fileno(), keep=pass_fds)
            os.chdir(cwd)
            import daxemu.supervisor.__main__ as supervisor

            _end_with(lambda: supervisor.main(device, mountpoint, int(ready), options))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises TimeoutExpired after ``timeout`` seconds."""
        handle = os.pidfd_open(self.pid)
        try:
            if not select.select([handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("daxemu.supervisor", timeout or 0.0)
        finally:
            os.close(handle)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


def _open_standard(*files: int, keep: Sequence[int]) -> None:
    """Make copies of ``files`` the descriptors 0, 1 and 2, and close all others but those in ``keep``."""
    for number, fd in enumerate(files):
        os.dup2(fd, number)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            with suppress(OSError):  # the descriptor of the listing itself
                os.close(fd)


def _call(request: dict[str, Any]) -> None:
    module, _, name = request["function"].partition(":")
    getattr(importlib.import_module(module), name)(*request["arguments"])


def _supervise(main: Callable[[str, str, int, str], int], request: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = os.pipe()

    def child() -> int:
        os.close(ours)
        if request["sabotage"]:
            name, *arguments = request["sabotage"]
            getattr(importlib.import_module("tests.support.sabotage"), name)(*arguments)
        layouts = os.environ.get("DAXEMU_LAYOUTS", "1") != "0"
        options = json.dumps({"repair": request["repair"], "direct": request["direct"], "layouts": layouts})
        return main(request["device"], request["mountpoint"], theirs, options)

    try:
        pid = _fork(child, os.path.join(request["device"], "supervisor.log"))
    finally:
        os.close(theirs)
    with os.fdopen(ours) as answers:
        said = next((line for line in answers if "ok" in json.loads(line)), None)
    refusal = {"ok": False, "error": "DaxemuError", "message": "the supervisor ended at once"}
    return {"pid": pid, "reply": json.loads(said) if said else refusal}


def _fork(child: Callable[[], object], log: str) -> int:
    pid = os.fork()
    if not pid:
        _become(child, log)
    return pid


def _become(child: Callable[[], object], log: str) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, path in ((0, "/dev/null"), (1, log), (2, log)):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, number)
        os.close(fd)
    os.chdir("/")
    _end_with(child)


def _end_with(child: Callable[[], object], last: Callable[[int], object] = lambda status: None) -> NoReturn:
    """Call ``child``, then ``last`` with the exit status, and end the process. An int that ``child`` returns
    is the exit status.
    """
    status = 70
    try:
        result = child()
        status = result if isinstance(result, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        last(status)
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        _serve(requests)
