"""Mounts like tests/support/mount.py's, made in a tenth of the time.

No command line is run, and supervisors are forked (see zygote.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daxemu.errors import NotMounted
from daxemu.fs.offline import Report, check_device
from daxemu.host.proc.mountinfo import mount_at
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.uapi import PAGE_SIZE
from tests.support import kinds
from tests.support.mount import DaxMount, clear_away
from tests.support.zygote import Zygote, wait_for_end

SHM = Path("/dev/shm")


def sweep() -> None:
    """Remove devices left by killed test runs."""
    for stale in SHM.glob("daxemu-quick-*"):
        if not Path("/proc", stale.name.split("-")[2]).exists():
            shutil.rmtree(stale, ignore_errors=True)


sweep()


@dataclass
class QuickMount(DaxMount):
    """Mount with supervisor process ``pid``."""

    zygote: Zygote | None = None
    pid: int = 0
    repair: str = "none"
    """Repair strategy of the next mount."""

    def mount(self, *sabotage: Any) -> None:
        """Mount the device.

        ``sabotage``: a function of tests/support/sabotage.py and its arguments, for the supervisor.
        """
        kinds.require("mount")
        assert self.zygote is not None
        self.pid = self.zygote.supervise(self.device, self.path, sabotage, self.repair, direct=self.is_direct)

    def _end(self, op: str, **arguments: bool) -> None:
        with self.client() as client:
            self.pid = client.request("status")["pid"]
            client.request(op, **arguments)
        wait_for_end(self.pid)

    def umount(self, *options: str) -> None:
        """Unmount the device."""
        try:
            self._end("unmount", force="--force" in options)
        except NotMounted:
            self.bury()

    def mount_again(self) -> None:
        """See DaxMount.mount_again."""
        self.mount()

    def remount(self) -> None:
        """Unmount and mount."""
        self.umount()
        self.mount()

    def powerfail(self) -> None:
        """Emulate a loss of power, as ``daxemu powerfail`` does, and assert that the mount is gone."""
        self._end("powerfail")
        assert mount_at(self.path) is None

    def kill(self) -> None:
        """Kill the supervisor with SIGKILL and detach the dead mount."""
        assert self.pid, "no supervisor: kill(0) would end this process group"
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.bury()

    def bury(self) -> None:
        """Detach the mount of a dead or dying supervisor, then wait for the supervisor's end.

        Order: a supervisor thread that waits on its own mount ends only after the connection is aborted.
        """
        clear_away(self.path)
        wait_for_end(self.pid)

    def crash(self, how: str) -> None:
        """Kill or powerfail, check the filesystem, and mount again. ``how``: "kill" or "powerfail"."""
        {"kill": self.kill, "powerfail": self.powerfail}[how]()
        self.check()
        self.mount()

    def fsck(self, *, repair: bool = False) -> Report:
        """Run fsck. Precondition: not mounted."""
        with DeviceDir.open(self.device) as directory:
            return check_device(directory, repair=repair)

    def check(self) -> None:
        """Assert that fsck finds no problem. Precondition: not mounted."""
        wrong = self.fsck().wrong
        assert not wrong, wrong


@contextmanager
def quick_mount_at(
    directory: Path,
    zygote: Zygote,
    size: int = 1 << 30,
    *,
    align: int = PAGE_SIZE,
    mount: bool = True,
    direct: bool = False,
    where: Path = SHM,
) -> Iterator[QuickMount]:
    """Make a device of ``size`` bytes in a directory of shared memory, and mount it below ``directory``.

    The device is checked with fsck at the end, unless ``sound`` is False. ``direct``: for direct mappings.
    """
    device = where / f"daxemu-quick-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path = directory / "mnt"
    path.mkdir()
    made = QuickMount(device, path, zygote=zygote, is_direct=direct)
    try:
        DeviceDir.create(device, DeviceConfig(size, align=align))
        if mount:
            made.mount()
        yield made
        if mount_at(path) is not None:
            made.umount("--force")
        if made.sound:
            made.check()
    finally:
        clear_away(path)
        shutil.rmtree(device, ignore_errors=True)
