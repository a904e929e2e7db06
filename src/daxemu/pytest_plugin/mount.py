"""A device and a mount for one test. The supervisor is a child that ends with its parent."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daxemu.cli.common import SIZE
from daxemu.client import Client
from daxemu.errors import DaxemuError, NotMounted
from daxemu.events import Event, decode
from daxemu.host.fuse.session import Session, abort_connection
from daxemu.host.proc.mountinfo import Mount, mount_at
from daxemu.pmem.device_dir import DEFAULT_BASE_PFN, DeviceConfig, DeviceDir, altmap_bytes
from daxemu.pmem.event_files import events_of
from daxemu.private_path import PrivatePath
from daxemu.protocol import Clear, Damaged, Inject, Injected, PowerFail, Remove, Removed, Set, Status
from daxemu.text import for_people

PATIENCE = 60.0
"""Seconds that the supervisor has to mount, and to end."""
STORY_PATIENCE = 5.0
"""Seconds that it has to answer for a failed test's report."""
PAGE = 4096
_NAME = "daxemu-pytest-{pid}-{token}"
_WITH_PARENT = (
    "import ctypes, signal; ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG
    "from daxemu.cli.main import main; main(prog_name='daxemu')"
)


@contextmanager
def fresh_device(
    size: str | int,
    fallback: Path,
    *,
    altmap: bool = False,
    struct_pages: bool = True,
    base_pfn: int = DEFAULT_BASE_PFN,
) -> Iterator[Path]:
    """A new device in shared memory, or below ``fallback`` where there is none. Raises InvalidArgument."""
    shared = Path("/dev/shm")
    parent = shared if os.access(shared, os.W_OK) else fallback
    _sweep(parent)
    device = parent / _NAME.format(pid=os.getpid(), token=uuid.uuid4().hex[:8])
    in_bytes = SIZE(size)
    reserved = altmap_bytes(in_bytes) if altmap else 0
    config = DeviceConfig(in_bytes, base_pfn=base_pfn, altmap=reserved, struct_pages=struct_pages)
    config.validate()
    try:
        DeviceDir.create(device, config)
        yield device
    finally:
        shutil.rmtree(device, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove the devices of test runs that were killed."""
    for stale in parent.glob(_NAME.format(pid="*", token="*")):
        found = re.fullmatch(_NAME.format(pid=r"(\d+)", token=r"\w+"), stale.name)
        if found and not Path("/proc", found[1]).exists():
            shutil.rmtree(stale, ignore_errors=True)


class DaxMount:
    """``path`` is the mountpoint, ``device`` what is mounted there. Can be used as a path itself."""

    def __init__(self, device: Path, path: Path, settings: dict[str, str], repair: str | None) -> None:
        self.device = device
        self.path = path
        self._settings = settings
        self._repair = repair
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        return self.path / name

    def client(self) -> Client:
        """A connection to the supervisor, which has a limited time for each answer."""
        return Client.at(self.path, patience=PATIENCE)

    def mount(self) -> None:
        """Mount, again after ``umount`` or ``powerfail``. Raises what daxemu refuses with."""
        root = PrivatePath.at(self.device)
        log = root / "supervisor.log"
        with open(log.open(os.O_WRONLY | os.O_APPEND, create=True), "ab") as output:
            self._supervisor = subprocess.Popen(
                self.mount_command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        assert self._supervisor.stdout is not None
        ready, _, _ = select.select([self._supervisor.stdout], [], [], PATIENCE)
        if not ready or not self._supervisor.stdout.readline():
            self.end()
            said = log.read_bytes().decode(errors="backslashreplace").strip().splitlines()
            raise DaxemuError(said[-1] if said else f"daxemu mount {self.device} did not begin: see {log}")
        if self._settings:
            with self.client() as client:
                client.ask(Set(self._settings))

    def mount_command(self) -> list[str]:
        """``daxemu mount`` in the foreground, told to end when its parent does."""
        repair = [] if self._repair is None else ["--repair", self._repair]
        mount = ["mount", str(self.device), str(self.path), "--foreground", "--json"]
        return [sys.executable, "-c", _WITH_PARENT, *mount, *repair]

    def umount(self) -> None:
        """Unmount; whoever still uses the mount loses it."""
        self.end()

    def powerfail(self) -> None:
        """Lose power: what was not synced is gone, and so is the mount until ``mount()``."""
        with self.client() as client:
            client.ask(PowerFail())
        self.end()

    def remove(self) -> Removed:
        """Surprise removal of the device."""
        with self.client() as client:
            return client.ask(Remove())

    def inject(
        self,
        file: str | os.PathLike[str],
        offset: int = 0,
        length: int | None = None,
        *,
        latent: bool = False,
    ) -> Injected:
        """See daxemu.pytest_plugin.InjectFixture."""
        ino, size = self._file(file)
        if length is None:
            length = PAGE if size is None else max(1, min(PAGE, size - offset))
        with self.client() as client:
            return client.ask(Inject([(offset, length)], ino=ino, latent=latent))

    def clear(self, file: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> int:
        """Heal a range of ``file``, or of the device, to its end if no ``length`` is given; how many bytes
        were bad. What was lost reads as zeros.
        """
        ino, size = self._file(file)
        with self.client() as client:
            if size is None:
                size = client.ask(Status()).size
            return client.ask(Clear([(offset, size - offset if length is None else length)], ino=ino)).bytes

    def _file(self, file: str | os.PathLike[str]) -> tuple[int | None, int | None]:
        if os.path.realpath(file) == os.path.realpath(self.path):
            return None, None
        found = os.stat(file)  # noqa: PTH116 - of a PathLike
        return found.st_ino, found.st_size

    def damaged(self) -> list[tuple[str, int, int]]:
        """(path, offset, length) of what is lost; paths begin at the mountpoint, with a slash."""
        with self.client() as client:
            return [(found.path, found.offset, found.length) for found in client.ask(Damaged()).files]

    def events(self) -> list[Event]:
        """Every event of every time this device was mounted."""
        device = DeviceDir.look(self.device)
        try:
            return [decode(line) for line in events_of(device)]
        finally:
            device.close()

    def story(self, most: int) -> list[tuple[str, str]]:
        """Sections for the report of a failed test. Whatever cannot be had, it says so."""
        events = self.events()
        left_out = [f"({len(events) - most} before these)"] if len(events) > most else []
        told = [for_people(event.summary()) for event in events[-most:]]
        return [
            ("daxemu damaged files", "\n".join(self._lost())),
            ("daxemu events", "\n".join([*left_out, *told])),
        ]

    def _lost(self) -> list[str]:
        try:
            with Client.at(self.path, patience=STORY_PATIENCE) as client:
                state = client.ask(Status())
                lost = client.ask(Damaged()).files
        except DaxemuError as error:
            return [for_people(f"not known: {error}")]
        reason = f": {state.reason}" if state.reason else ""
        lines = [
            f"{state.mountpoint} is {state.state}{reason}",
            *(f"{found.path} {found.offset:#x}+{found.length:#x}" for found in lost),
        ]
        return list(map(for_people, lines))

    def where(self) -> Mount | None:
        """The mount, if there is one."""
        return mount_at(self.path)

    def end(self) -> None:
        """Unmount, by force if need be, and see the supervisor end."""
        process, self._supervisor = self._supervisor, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(PATIENCE / 2 if self._answers() else 1.0)
        except subprocess.TimeoutExpired:
            process.kill()
        while (left := self.where()) is not None:
            abort_connection(left)
            Session(-1, left).detach()
        process.wait(PATIENCE)
        if process.stdout is not None:
            process.stdout.close()

    def _answers(self) -> bool:
        try:
            with Client.at(self.path, patience=1.0) as client:
                client.ask(Status())
        except DaxemuError as error:
            return isinstance(error, NotMounted)
        return True
