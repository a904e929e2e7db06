"""Gates: locks at which accesses to the mount wait. Open most of the time."""

from __future__ import annotations

from dataclasses import dataclass, field

from daxemu.host.fuse.freeze import Freeze
from daxemu.host.fuse.io_lock import IoLock


@dataclass(eq=False)
class Gates:
    """The gates of one mount. None: open. Belongs to the trio thread."""

    freeze: Freeze | None = None
    """Holds reads and writes back while the device is removed."""
    io_lock: IoLock = field(default_factory=IoLock)
    """Keeps reads, writes and other verbs away from a file while a verb changes its extents in pieces."""
