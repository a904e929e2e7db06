"""``python -m daxemu.supervisor DEVICE MOUNTPOINT READY_FD [OPTIONS]``: a supervisor in the background.

READY_FD is a pipe: one JSON object is written to it, ``{"ok": true}`` when the mount is usable, or the
refusal. OPTIONS are MountOptions as JSON.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec

from daxemu.errors import DaxemuError
from daxemu.protocol import Reply
from daxemu.supervisor.log_handler import RatelimitedHandler
from daxemu.supervisor.settings import MountOptions


def main(device: str, mountpoint: str, ready_fd: int, options: str = "{}") -> int:
    """Run it. Returns the exit status."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[RatelimitedHandler()],
    )

    def report(reply: Reply) -> None:
        os.write(ready_fd, msgspec.json.encode(reply))
        os.close(ready_fd)

    told = False

    def ready() -> None:
        nonlocal told
        told = True
        report(Reply(True))

    try:
        from daxemu.supervisor.run import supervise

        supervise(Path(device), Path(mountpoint), ready, msgspec.json.decode(options, type=MountOptions))
    except DaxemuError as error:
        if told:
            logging.exception("the supervisor failed")
        else:
            report(Reply(False, error=type(error).__name__, message=str(error)))
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
