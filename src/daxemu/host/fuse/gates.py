"""Gates: locks at which accesses to the mount wait. Open most of the time."""

from __future__ import annotations

from dataclasses import dataclass

from daxemu.host.fuse.freeze import Freeze


@dataclass(eq=False)
class Gates:
    """The gates of one mount. None: open. Belongs to the trio thread."""

    freeze: Freeze | None = None
    """Holds reads and writes back while the device is removed."""
