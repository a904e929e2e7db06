"""The matrix: which cells there are, and making them one after another."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from daxemu.apps.application import Application
from daxemu.apps.cell import Cell, Step, Task
from daxemu.apps.install import missing
from daxemu.apps.programs import APPLICATIONS, application_called
from daxemu.apps.situations import BY_NAME, SITUATIONS, Situation
from daxemu.errors import InvalidArgument
from daxemu.evaluate.machine import clear_away, start_worker

LIMIT = 30.0
"""Seconds that a program may say nothing before it counts as hung."""
_SHM = Path("/dev/shm")
_decode = msgspec.json.Decoder(Step | Cell).decode


class Wanted(NamedTuple):
    """A cell to be had. ``why_not``: why it cannot be, as ``absent: ...`` or ``no journal``."""

    application: type[Application]
    situation: Situation
    why_not: str = ""


def wanted(only: Sequence[str] = (), situations: Sequence[str] = ()) -> list[Wanted]:
    """The cells of some programs and situations, all if none are named. Raises InvalidArgument."""
    programs = [application_called(name) for name in only] or APPLICATIONS
    for name in situations:
        if name not in BY_NAME:
            known = ", ".join(BY_NAME)
            raise InvalidArgument(f"no situation {name!r}: there are {known}")
    columns = [BY_NAME[name] for name in situations] or SITUATIONS
    found = []
    for application in programs:
        lacking = missing(application.needs)
        for situation in columns:
            why_not = ""
            if situation.part == "journal" and not application.journal:
                why_not = "no journal"
            elif lacking:
                why_not = f"absent: {', '.join(lacking)}"
            found.append(Wanted(application, situation, why_not))
    return found


def make(cell: Wanted, limit: float, tell: Callable[[Step], None]) -> Cell:
    """Make one cell, in a process of its own; each step as it happens. Whatever ends this ends that."""
    name = f"daxemu-apps-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    directory = Path(tempfile.gettempdir()) / name
    device = (_SHM if os.access(_SHM, os.W_OK) else Path(tempfile.gettempdir())) / f"{name}.device"
    task = Task(cell.application.name, cell.situation.name, limit, str(directory), str(device))
    made: Cell | None = None
    process = start_worker("daxemu.apps.cell")
    try:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(task))
        process.stdin.close()
        for told in _told(process):
            if isinstance(told, Step):
                tell(told)
            else:
                made = told
    except BaseException:
        process.send_signal(signal.SIGTERM)
        raise
    finally:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode(errors="backslashreplace").strip().rpartition("\n")[2]
        process.stderr.close()
        process.wait()
        clear_away(directory, device)
    if made is None:
        why = f"the cell ended with status {process.returncode}: {errors}"
        return Cell(task.application, task.situation, failed=why)
    return made


def _told(process: subprocess.Popen[bytes]) -> Iterator[Step | Cell]:
    assert process.stdout is not None
    for line in process.stdout:
        yield _decode(line)
