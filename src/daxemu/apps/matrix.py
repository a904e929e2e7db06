"""Matrix of programs and situations: selection of cells, and running them."""

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
from daxemu.apps.cell import CellRequest, CellStep, MatrixCell
from daxemu.apps.install import missing
from daxemu.apps.programs import APPLICATIONS, application_called
from daxemu.apps.situations import BY_NAME, SITUATIONS, Situation
from daxemu.errors import InvalidArgument
from daxemu.evaluate.machine import clear_away, start_worker
from daxemu.events.mounts import Mode

LIMIT = 30.0
"""Default seconds for each wait; a longer wait counts as a hang."""
_SHM = Path("/dev/shm")
_decode = msgspec.json.Decoder(CellStep | MatrixCell).decode


class Wanted(NamedTuple):
    """Cell to run. ``why_not``: ``absent: ...`` or ``no journal``; empty if the cell can run."""

    application: type[Application]
    situation: Situation
    why_not: str = ""
    mode: Mode = "page cache"


def wanted(
    only: Sequence[str] = (), situations: Sequence[str] = (), modes: Sequence[Mode] = ("page cache",)
) -> list[Wanted]:
    """Return the cells of the named programs and situations (default: all), mode by mode.

    Raises InvalidArgument.
    """
    programs = [application_called(name) for name in only] or APPLICATIONS
    for name in situations:
        if name not in BY_NAME:
            known = ", ".join(BY_NAME)
            raise InvalidArgument(f"no situation {name!r}: known situations are {known}")
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
    return [cell._replace(mode=mode) for mode in modes for cell in found]


def make(cell: Wanted, limit: float, tell: Callable[[CellStep], None]) -> MatrixCell:
    """Run one cell in a separate process; ``tell`` is called with each step.

    An exception here, KeyboardInterrupt included, ends the process too.
    """
    name = f"daxemu-apps-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    directory = Path(tempfile.gettempdir()) / name
    device = (_SHM if os.access(_SHM, os.W_OK) else Path(tempfile.gettempdir())) / f"{name}.device"
    application, situation = cell.application.name, cell.situation.name
    request = CellRequest(application, situation, limit, str(directory), str(device), cell.mode)
    made: MatrixCell | None = None
    process = start_worker("daxemu.apps.cell")
    try:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(request))
        process.stdin.close()
        for message in _messages(process):
            if isinstance(message, CellStep):
                tell(message)
            else:
                made = message
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
        return MatrixCell(application, situation, cell.mode, failed=why)
    return made


def _messages(process: subprocess.Popen[bytes]) -> Iterator[CellStep | MatrixCell]:
    assert process.stdout is not None
    for line in process.stdout:
        yield _decode(line)
