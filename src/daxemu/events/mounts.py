"""Events of a mount and of its supervisor."""

from __future__ import annotations

from typing import Literal

from daxemu.events.base import Event
from daxemu.fields import Files, Length, Pid, Seconds, Tid, Time

Mode = Literal["page cache", "direct"]
"""What a shared mapping of a file is: the kernel's page cache, or the media itself."""


class Mounted(Event):
    device: str
    mountpoint: str
    size: Length
    mode: Mode = "page cache"

    def summary(self) -> str:
        direct = ", for direct mappings" if self.mode == "direct" else ""
        return f"mounted {self.device} on {self.mountpoint}{direct}"


class DirectMappingRefused(Event):
    """An mmap(2) of a file of a direct mount failed with ENODEV, for ``reason``."""

    pid: Pid
    tid: Tid
    comm: str
    path: str
    reason: str

    def summary(self) -> str:
        return f"{self.comm}:{self.pid} got no direct mapping of {self.path} (ENODEV): {self.reason}"


class Unmounted(Event):
    mountpoint: str

    def summary(self) -> str:
        return f"unmounted {self.mountpoint}"


class DeviceTightened(Event):
    """Other users could open ``files`` files of DEVICE, against ``mode`` (octal) of device.toml. The mount
    took the permission away.
    """

    device: str
    mode: str
    files: Files

    def summary(self) -> str:
        return f"{self.device}: others no longer have access to {self.files} of its files (mode {self.mode})"


class SettingChanged(Event):
    name: str
    value: str

    def summary(self) -> str:
        return f"set {self.name}={self.value}"


class EventsRepeated(Event):
    """``count`` events equal to the event before, numbers ``first`` to ``seq``, since ``since``. Only in
    events.jsonl. ``what``: the summary of each.
    """

    first: int
    since: Time
    what: str
    count: int = 0

    def summary(self) -> str:
        return f"{self.what}: {self.count} times more, events {self.first} to {self.seq}"


class UnexpectedError(Event):
    """The exception ``error``, which no code expects, ended a request or a round of a task (``where``). The
    traceback is in supervisor.log.
    """

    where: str
    error: str

    def summary(self) -> str:
        return f"{self.where} failed inside the supervisor: {self.error}"


class LoopStalled(Event):
    """A step of the event loop took ``seconds``. The supervisor answered no request meanwhile, and the
    watchdog cut the mount. ``task``: the running task. ``step``: the innermost function. The stack is in
    supervisor.log.
    """

    task: str
    step: str
    seconds: Seconds

    def summary(self) -> str:
        return f"the mount was cut: {self.task} stood still for {self.seconds:.0f} s in {self.step}"


class MetadataRewritten(Event):
    """A bad copy of a metadata page was rewritten from the good copy.

    ``file``: db, wal or superblock. ``page``: the page's number in the file, or the superblock's first block
    on the device. ``copy``: 1 or 2. ``reason``: "has a wrong checksum" or "is older than the other".
    """

    device: str
    file: str
    page: int
    copy: int
    reason: str

    def summary(self) -> str:
        where = "" if self.file == "superblock" else f"page {self.page} of "
        found = f"metadata {where}{self.file}: copy {self.copy} {self.reason}"
        return f"{found}; rewritten from the other copy"


class MetadataUpgraded(Event):
    """Metadata of an earlier format was rewritten. ``before`` and ``now``: numbers of the formats."""

    device: str
    before: int
    now: int

    def summary(self) -> str:
        return f"metadata upgraded from format {self.before} to format {self.now}"


class FilesystemShutdown(Event):
    device: str
    reason: str

    def dmesg(self) -> str:
        return f"daxemu ({self.device}): {self.reason}"

    def printed_by(self) -> str:
        return "xfs_do_force_shutdown"
