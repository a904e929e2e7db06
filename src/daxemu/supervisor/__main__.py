"""``python -m daxemu.supervisor DEVICE MOUNTPOINT READY_FD [OPTIONS]``: a supervisor in the background.

READY_FD is the write end of a pipe, for lines of JSON: protocol.Progress while the repair strategy begins,
and a last line when the mount is usable (``{"ok": true}``) or refused. OPTIONS are MountOptions as JSON.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from daxemu.errors import DaxemuError
from daxemu.protocol import Progress, Reply
from daxemu.supervisor.log_handler import log_to_stderr
from daxemu.supervisor.settings import MountOptions

SAY = 0.5
"""Least seconds between two lines of Progress."""


def main(device: str, mountpoint: str, ready_fd: int, options: str = "{}") -> int:
    """Run a supervisor until its mount ends. Return the exit status."""
    log_to_stderr("%(asctime)s %(levelname)s %(name)s: %(message)s", logging.INFO)

    def say(what: Reply | Progress) -> None:
        try:
            os.write(ready_fd, msgspec.json.encode(what) + b"\n")
        except BrokenPipeError as error:
            raise DaxemuError("whoever asked for the mount went away") from error

    is_ready, last = False, 0.0

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        say(Reply(True))
        os.close(ready_fd)

    def progress(seen: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= SAY:
            last = time.monotonic()
            say(seen)

    try:
        from daxemu.supervisor.run import supervise

        chosen = msgspec.json.decode(options, type=MountOptions)
        supervise(Path(device), Path(mountpoint), ready, chosen, progress)
    except DaxemuError as error:
        if is_ready:
            logging.exception("the supervisor failed")
        else:
            logging.error("%s", error)
            with suppress(DaxemuError):
                say(Reply(False, error=type(error).__name__, message=str(error)))
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
