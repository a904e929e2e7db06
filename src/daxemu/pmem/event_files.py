"""Reading DEVICE/events.jsonl and the rotated file DEVICE/events.jsonl.1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from daxemu.errors import PermissionDenied
from daxemu.pmem.device_dir import DeviceDir

NAME = "events.jsonl"


def events_of(device: DeviceDir) -> Iterator[bytes]:
    """Yield the lines of the events of all mounts of ``device``, oldest first. Raises PermissionDenied."""
    with ExitStack() as opened:
        # The newer file is opened first: a rotation in between gives the same file twice, but no gap.
        files: list[BinaryIO] = []
        for name in (NAME, f"{NAME}.1"):
            path = device.root / name
            try:
                files.append(opened.enter_context(open(path.open(os.O_RDONLY), "rb")))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise PermissionDenied(
                    f"{path}: {error.strerror}; read the log as the device's owner"
                ) from error
        if len({os.fstat(file.fileno()).st_ino for file in files}) == 1:
            del files[1:]
        for file in reversed(files):
            yield from (line.rstrip(b" \n") for line in file)
