"""Device and mount of one test. The supervisor is a child process that ends with its parent."""

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
from daxemu.failure_kind import FailureKind, injected_kind
from daxemu.host.fuse.session import Session, abort_connection
from daxemu.host.proc.mountinfo import Mount, mount_at
from daxemu.pmem.device_dir import DEFAULT_BASE_PFN, DeviceConfig, DeviceDir, altmap_bytes
from daxemu.pmem.event_files import events_of
from daxemu.private_path import PrivatePath
from daxemu.protocol import (
    Clear,
    Damaged,
    Inject,
    Injected,
    PowerFail,
    Remove,
    Removed,
    Set,
    Status,
    kind_fields,
)
from daxemu.text import for_people

PATIENCE = 60.0
"""Limit in seconds for the mount, and for the end of the supervisor."""
STORY_PATIENCE = 5.0
"""Limit in seconds for an answer of the supervisor to the report of a failed test."""
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
    """Make a device in shared memory, or below ``fallback`` without shared memory. Raises InvalidArgument."""
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
    """Mount of a test. ``path`` is the mountpoint, ``device`` the DEVICE. ``is_direct``: mounted with
    ``--direct``, so programs map the media if they run under :meth:`under_run`. The object is a path-like
    object.
    """

    def __init__(
        self,
        device: Path,
        path: Path,
        settings: dict[str, str],
        repair: str | None,
        *,
        is_direct: bool = False,
    ) -> None:
        self.device = device
        self.path = path
        self.is_direct = is_direct
        self._settings = settings
        self._repair = repair
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        return self.path / name

    def client(self) -> Client:
        """Connect to the supervisor, with a time limit for each answer."""
        return Client.at(self.path, patience=PATIENCE)

    def mount(self) -> None:
        """Mount; also again after ``umount`` or ``powerfail``. Raises DaxemuError with the message of
        ``daxemu mount``.
        """
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
        """Return the command of ``daxemu mount`` in the foreground, with SIGTERM at the death of its
        parent.
        """
        repair = [] if self._repair is None else ["--repair", self._repair]
        mount = ["mount", str(self.device), str(self.path), "--foreground", "--json"]
        direct = ["--direct"] if self.is_direct else []
        return [sys.executable, "-c", _WITH_PARENT, *mount, *direct, *repair]

    def under_run(self, *command: str | os.PathLike[str]) -> list[str]:
        """Return the command that runs ``command`` under ``daxemu run`` on this mount, for subprocess. On a
        direct mount, only programs started in this way have shared mappings.
        """
        return [
            sys.executable,
            "-m",
            "daxemu",
            "run",
            str(self.path),
            "--",
            *(os.fspath(word) for word in command),
        ]

    def umount(self) -> None:
        """Unmount, also if processes still use the mount."""
        self.end()

    def powerfail(self) -> None:
        """Lose power: unsynced data is lost, and the mount ends until the next ``mount()``."""
        with self.client() as client:
            client.ask(PowerFail())
        self.end()

    def remove(self) -> Removed:
        """Remove the device while in use (surprise removal)."""
        with self.client() as client:
            return client.ask(Remove())

    def inject(
        self,
        file: str | os.PathLike[str],
        offset: int = 0,
        length: int | None = None,
        *,
        latent: bool = False,
        kind: str | FailureKind = "poison",
        seed: int = 0,
    ) -> Injected:
        """See daxemu.pytest_plugin.InjectFixture."""
        fields = kind_fields(FailureKind.LATENT if latent and kind == "poison" else injected_kind(kind))
        ino, size = self._file(file)
        if length is None:
            length = PAGE if size is None else max(1, min(PAGE, size - offset))
        with self.client() as client:
            return client.ask(Inject([(offset, length)], ino=ino, seed=seed, **fields))

    def clear(self, file: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> int:
        """Clear the poison of a range of ``file`` or, for the mountpoint, of the device. ``offset`` and
        ``length`` are bytes; without ``length``, to the end. Return the number of poisoned bytes. Lost bytes
        read as zeros.
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
        """Return (path, offset, length) of each damaged range, in bytes. Paths begin at the mountpoint, with
        a slash.
        """
        with self.client() as client:
            return [(found.path, found.offset, found.length) for found in client.ask(Damaged()).files]

    def events(self) -> list[Event]:
        """Return every event of every mount of the device."""
        device = DeviceDir.look(self.device)
        try:
            return [decode(line) for line in events_of(device)]
        finally:
            device.close()

    def story(self, most: int) -> list[tuple[str, str]]:
        """Return sections for the report of a failed test, with the last ``most`` events. A section without
        available data states the error.
        """
        events = self.events()
        left_out = [f"({len(events) - most} before these)"] if len(events) > most else []
        lines = [for_people(event.summary()) for event in events[-most:]]
        return [
            ("daxemu damaged files", "\n".join(self._lost())),
            ("daxemu events", "\n".join([*left_out, *lines])),
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
        """Return the mount; None while not mounted."""
        return mount_at(self.path)

    def end(self) -> None:
        """Unmount, by force if necessary, and wait for the end of the supervisor."""
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
