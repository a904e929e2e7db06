"""The directory of a device: ``device.toml``, and the lock against a second mount."""

from __future__ import annotations

import errno
import fcntl
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from daxemu.errors import Busy, InvalidArgument, NoSpace, NotADevice, PermissionDenied
from daxemu.malformed import NOT_TOML, toml_line, why_not_text
from daxemu.pmem.backing import check_mappable
from daxemu.pmem.media import Media
from daxemu.private_path import PRIVATE, PrivatePath
from daxemu.uapi import PAGE_SIZE, PMD_SIZE, Pfn
from daxemu.units import PHYS_PFN, round_up

FORMAT_VERSION = 1
MIN_SIZE = 8 << 20
MAX_SIZE = 1 << 50
DEFAULT_BASE_PFN: Pfn = 0x100000  # 4 GiB: where a memmap=nn!4G namespace begins
STRUCT_PAGE_SIZE = 64
OWN_FILES = frozenset(
    (
        *("media", "kept", "poison", "poison.new", "device.toml", "lock", "control.sock"),
        *("events.jsonl", "events.jsonl.1", "supervisor.log", "supervisor.log.1"),
    )
)
OWN_DIRECTORIES = frozenset(("struct_page", "struct_page.new", "sysfs", "repair"))
"""State of the running machine, created at every mount, and ``repair``, the data of a repair strategy."""


@dataclass(frozen=True)
class DeviceConfig:
    """The contents of ``device.toml``.

    ``size``: bytes. ``altmap``: bytes reserved at the start of the media. ``align``: bytes, 4K or 2M.
    ``struct_pages``: with False the memory is a pfn address space instead of a dev_pagemap. ``mode``: of the
    directory; files get the same mode without the x bits.
    """

    size: int
    base_pfn: Pfn = DEFAULT_BASE_PFN
    altmap: int = 0
    align: int = PAGE_SIZE
    struct_pages: bool = True
    mode: int = PRIVATE

    def validate(self) -> None:
        """Raise InvalidArgument for a size, alignment, pfn or mode out of range."""
        if self.size % PAGE_SIZE or not MIN_SIZE <= self.size <= MAX_SIZE:
            raise InvalidArgument(
                f"size {self.size}: must be whole pages of 4K, from {MIN_SIZE >> 20}M to {MAX_SIZE >> 40}T"
            )
        if self.align not in (PAGE_SIZE, PMD_SIZE):
            raise InvalidArgument(f"alignment {self.align}: must be 4K or 2M")
        if self.base_pfn * PAGE_SIZE % self.align:
            raise InvalidArgument(
                f"base pfn {self.base_pfn:#x}: must be a multiple of {self.align // PAGE_SIZE:#x}"
            )
        if self.altmap % self.align or not 0 <= self.altmap <= self.size - MIN_SIZE:
            raise InvalidArgument(
                f"altmap {self.altmap}: must be whole pages of {self.align >> 10}K "
                f"and leave {MIN_SIZE >> 20}M of data"
            )
        if self.altmap and not self.struct_pages:
            raise InvalidArgument(
                "an altmap is room for struct pages: give --altmap or --no-struct-pages, not both"
            )
        if not 0 <= self.base_pfn < 1 << 52:
            raise InvalidArgument(f"base pfn {self.base_pfn:#x}: must be from 0 to {(1 << 52) - 1:#x}")
        if self.mode & PRIVATE != PRIVATE or self.mode & ~0o755:
            raise InvalidArgument(
                f"mode {self.mode:04o}: must be from 0700 to 0755, and nothing for others to write"
            )


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or "input/output error"
    if isinstance(error, tomllib.TOMLDecodeError):
        return f"line {toml_line(error, '')} is {NOT_TOML}"
    return why_not_text(error, NOT_TOML)


def altmap_bytes(size: int, align: int = PAGE_SIZE) -> int:
    """Return the size in bytes of a memmap on the device itself: one struct page (64 bytes) for each page."""
    return round_up(PHYS_PFN(size) * STRUCT_PAGE_SIZE, align)


def _integer(table: dict[str, object], name: str) -> int:
    value = table.get(name)
    if value is None:
        raise InvalidArgument(f"{name} is missing")
    if type(value) is not int:
        raise InvalidArgument(f"{name} is {value!r}, not a whole number")
    return value


def _is_own(name: str) -> bool:
    return name != "control.sock" and name in OWN_FILES | OWN_DIRECTORIES


def _make_directories(path: Path, made: list[Path]) -> None:
    """Create ``path`` and its missing parents.

    The created directories are appended to ``made``, outermost first, even if a later one fails.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for directory in reversed(missing):
        directory.mkdir(PRIVATE if directory == path else 0o777)
        made.append(directory)


class DeviceDir:
    """A DEVICE directory. ``open()`` takes the lock, which the holder keeps until ``close()`` or death."""

    def __init__(self, root: PrivatePath, path: Path, config: DeviceConfig) -> None:
        self.root = root
        self.path = path
        self.config = config
        root.share(config.mode)
        self._lock: int | None = None

    @property
    def name(self) -> str:
        """The device's name in log lines, such as ``pmem0``."""
        return self.path.name

    @classmethod
    def create(cls, path: Path, config: DeviceConfig, *, force: bool = False) -> DeviceDir:
        """Create a new device at ``path``. On failure no file is left behind.

        Raises Busy if ``path`` exists (unless with ``force`` and ``path`` is an unmounted device),
        InvalidArgument, NoSpace, PermissionDenied, Unsupported if the device is too large to be mapped on
        this machine.
        """
        config.validate()
        check_mappable(config.size)
        if os.path.lexists(path):
            if not force:
                raise Busy(f"{path} exists already: give --force to make a new, empty device in its place")
            with cls.open(path) as old:
                old.wipe()
        made: list[Path] = []
        device: DeviceDir | None = None
        try:
            _make_directories(path, made)
            device = cls(PrivatePath.at(path), path, config)
            device.root.chmod_new()
            Media.create(device.root, config.size)
            (device.root / "device.toml").write_bytes(device._toml().encode())
        except OSError as error:
            if device is not None:
                device.wipe()
            for parent in reversed(made):
                if device is None or parent != path:
                    parent.rmdir()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NoSpace(f"{path}: no room for the device ({error.strerror})") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise PermissionDenied(
                    f"{path}: {error.strerror}; choose a place that you can write to, such as /dev/shm"
                ) from error
            raise InvalidArgument(f"{path}: {error.strerror}") from error
        return device

    @classmethod
    def load(cls, path: Path) -> DeviceDir:
        """Read ``device.toml`` without taking the lock, and check every file of the device.

        Raises NotADevice; PermissionDenied for a device, or a file in one, of another user.
        """
        return cls._read(path, reading=False)

    @classmethod
    def look(cls, path: Path) -> DeviceDir:
        """As :meth:`load`, for reading: an ordinary user may read a shared device of another user."""
        return cls._read(path, reading=True)

    @classmethod
    def _read(cls, path: Path, *, reading: bool) -> DeviceDir:
        try:
            root = PrivatePath.at(path, reading=reading)
            table = tomllib.loads((root / "device.toml").read_bytes().decode())
            device = cls(root, path, cls._config(path, table))
            device.audit()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotADevice(
                f"{path} is not a daxemu device: make one with: daxemu mkfs {path} --size 1G"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise NotADevice(
                f"{path}/device.toml cannot be read: {_why_unreadable(error)}; "
                "restore it, or make a new device elsewhere"
            ) from error
        return device

    @staticmethod
    def _config(path: Path, table: dict[str, object]) -> DeviceConfig:
        if table.get("version") != FORMAT_VERSION:
            raise NotADevice(
                f"{path} is of format version {table.get('version')!r}, this daxemu reads {FORMAT_VERSION}: "
                "use the daxemu that made it, or make a new one elsewhere"
            )
        try:
            struct_pages = table.get("struct_pages", True)
            if not isinstance(struct_pages, bool):
                raise InvalidArgument(f"struct_pages is {struct_pages!r}, not true or false")
            config = DeviceConfig(
                **{name: _integer(table, name) for name in ("size", "base_pfn", "altmap", "align")},
                struct_pages=struct_pages,
                mode=_integer({"mode": PRIVATE, **table}, "mode"),
            )
            config.validate()
        except InvalidArgument as error:
            raise NotADevice(
                f"{path}/device.toml is damaged: {error}; correct that line, or make a new device elsewhere"
            ) from error
        return config

    def audit(self) -> None:
        """Check the kind, owner and links of each file of the device. Raises NotADevice, PermissionDenied."""
        for name in OWN_FILES - {"control.sock"}:
            (self.root / name).audit_file()
        (self.root / "control.sock").audit_socket()
        for name in OWN_DIRECTORIES:
            (self.root / name).audit_directory()

    def tighten(self) -> int:
        """Remove permissions beyond ``mode`` of device.toml. Return the number of changed files.

        Devices of releases without a ``mode`` were readable by every user. Precondition: the lock is held.
        """
        changed = self.root.tighten()
        self.audit()  # before tighten() other users may have had the directory open for writing
        return changed + sum((self.root / name).tighten() for name in self.root.names() if _is_own(name))

    @classmethod
    def open(cls, path: Path) -> DeviceDir:
        """Read the device and take the lock.

        Raises NotADevice, PermissionDenied, or Busy if the device is mounted.
        """
        device = cls.load(path)
        try:
            lock = (device.root / "lock").open(os.O_RDWR, create=True)
        except OSError as error:
            raise PermissionDenied(
                f"{path}/lock: {error.strerror}; the device is its owner's: use it as that user"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise Busy(f"{path} is mounted already: see daxemu status") from error
        device._lock = lock
        return device

    def close(self) -> None:
        """Drop the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self.root.close()

    def __enter__(self) -> DeviceDir:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wipe(self) -> None:
        """Remove the device's own files and the directory.

        Raises Busy if the directory holds any other file. Then no file is removed.
        """
        strangers = {*self.root.names()} - OWN_FILES - OWN_DIRECTORIES
        if strangers:
            raise Busy(
                f"{self.path} holds {min(strangers)}, which is no file of a device: move it away first"
            )
        for name in OWN_FILES:
            (self.root / name).unlink()
        for name in OWN_DIRECTORIES:
            (self.root / name).rmtree()
        self.path.rmdir()

    def _toml(self) -> str:
        config = self.config
        return (
            "# A daxemu device. Sizes are bytes.\n"
            f"version = {FORMAT_VERSION}\n"
            f"size = {config.size}\n"
            f"base_pfn = {config.base_pfn:#x}\n"
            f"altmap = {config.altmap}\n"
            f"align = {config.align}\n"
            f"struct_pages = {str(config.struct_pages).lower()}\n"
            "# The directory's mode. More than 0o700 lets others read every byte of every file there.\n"
            f"mode = 0o{config.mode:o}\n"
        )
