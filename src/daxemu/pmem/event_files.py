"""Reading DEVICE/events.jsonl, and the file that was rotated out of its place."""

from __future__ import annotations

import os
from collections.abc import Iterator

from daxemu.errors import PermissionDenied
from daxemu.pmem.device_dir import DeviceDir

NAME = "events.jsonl"


def events_of(device: DeviceDir) -> Iterator[bytes]:
    """Lines of the events of all mounts of ``device``, oldest first. Raises PermissionDenied."""
    for name in (f"{NAME}.1", NAME):
        path = device.root / name
        try:
            fd = path.open(os.O_RDONLY)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise PermissionDenied(f"{path}: {error.strerror}; read it as its owner") from error
        with open(fd, "rb") as file:
            yield from (line.rstrip(b"\n") for line in file)
