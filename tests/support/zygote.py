"""Zygote: forks supervisors, and other test processes, from a process with all modules imported.

    python -m tests.support.zygote      one JSON request a line on stdin, answers on stdout

A fork takes a tenth of the time of a Python start. A forked supervisor equals ``python -m daxemu.supervisor``
without the execve(2).
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from daxemu.errors import ERRORS, DaxemuError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0
LATE = ("daxemu.supervisor.run", "daxemu.mm.memmap")
"""Modules that a supervisor imports late: the larger part of its start."""


class Zygote:
    """The forking process. A context manager; forked processes outlive it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the zygote died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def supervise(
        self, device: Path, mountpoint: Path, sabotage: Sequence[Any] = (), repair: str = "none"
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
        )
        reply = answer["reply"]
        if not reply["ok"]:
            raise ERRORS.get(reply["error"], DaxemuError)(reply["message"])
        return int(answer["pid"])

    def run(self, function: str, *arguments: Any) -> int:
        """Call "module:function" in a new process; return the pid. Arguments must be JSON-compatible."""
        return int(self._ask(do="run", function=function, arguments=arguments)["pid"])


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


def _serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no wait(2) for children: a pidfd shows their end
    import daxemu.supervisor.__main__ as supervisor

    for module in LATE:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "supervise":
            answer = _supervise(supervisor.main, request)
        else:
            answer = {"pid": _fork(lambda r=request: _call(r), "/dev/null")}  # type: ignore[misc]
        print(json.dumps(answer), flush=True)


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
        options = json.dumps({"repair": request["repair"], "layouts": layouts})
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
    status = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, path in ((0, "/dev/null"), (1, log), (2, log)):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(fd, number)
            os.close(fd)
        os.chdir("/")
        result = child()
        status = result if isinstance(result, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
