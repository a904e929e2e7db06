"""Paths below a DEVICE directory, opened so that no other user chooses the file.

No other module opens, makes, renames or removes anything below DEVICE (tests/test_private_path.py follows
such paths through the other modules). DEVICE is opened once. Each path below is walked from the descriptor
of DEVICE, one name at a time, with O_NOFOLLOW. The type of a file is read through an O_PATH descriptor
before the file is opened: a FIFO does not block and a device node is not touched.

A file must be regular, have one link and belong to the owner of DEVICE. A directory must belong to the owner
of DEVICE. Everything else raises NotADevice or PermissionDenied.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from daxemu.errors import NotADevice, PermissionDenied

PRIVATE = 0o700
"""Mode of a DEVICE directory that only its owner may enter."""
_NOGROUP = 65534
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class _Root:
    """An open DEVICE directory. New directories get ``mode``; new files get ``mode`` without the x bits."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.uid = os.fstat(fd).st_uid
        self.mode = PRIVATE
        self.close = weakref.finalize(self, os.close, fd)


def _by_fd(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


class PrivatePath:
    """A path below an open DEVICE directory; without parts, the directory itself.

    ``str()`` is for messages. OSErrors of the host propagate: FileNotFoundError, ENOSPC, EACCES.
    """

    def __init__(self, root: _Root, parts: tuple[str, ...] = ()) -> None:
        self._root = root
        self._parts = parts

    @classmethod
    def at(cls, device: Path, *, reading: bool = False) -> PrivatePath:
        """Open the directory ``device``. With ``reading``, the DEVICE may belong to another user than the
        caller.

        Raises NotADevice for anything but a directory, PermissionDenied for a directory of another user.
        """
        try:
            fd = os.open(device, _DIRECTORY)
        except NotADirectoryError as error:  # the kernel checks O_DIRECTORY before O_NOFOLLOW
            what = "a symbolic link: give the directory itself" if device.is_symlink() else "not a directory"
            raise NotADevice(
                f"{device} is {what}; make a device with: daxemu mkfs {device} --size 1G"
            ) from error
        except PermissionError as error:
            raise PermissionDenied(
                f"{device}: {error.strerror}; the device belongs to another user: use it as that user"
            ) from error
        root = _Root(device, fd)
        user = os.geteuid()
        if root.uid != user and (user == 0 or not reading):
            root.close()
            hint = "run this as that user, or give --as-owner" if user == 0 else "use it as that user"
            raise PermissionDenied(f"{device} belongs to uid {root.uid}, not to uid {user}: {hint}")
        return cls(root)

    def close(self) -> None:
        """Close the DEVICE directory. Paths below DEVICE cannot be used afterwards."""
        self._root.close()

    # -- as a path

    def __truediv__(self, name: str) -> PrivatePath:
        parts = tuple(name.split("/"))
        if not all(part not in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} cannot be the name of a file below a device")
        return PrivatePath(self._root, self._parts + parts)

    def __str__(self) -> str:
        return str(self._root.path.joinpath(*self._parts))

    def __repr__(self) -> str:
        return f"PrivatePath({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrivatePath) and (self._root, self._parts) == (other._root, other._parts)

    def __hash__(self) -> int:
        return hash((id(self._root), self._parts))

    @property
    def name(self) -> str:
        """Last part of the path, or the name of DEVICE."""
        return self._parts[-1] if self._parts else self._root.path.name

    @property
    def parent(self) -> PrivatePath:
        """The directory above."""
        return PrivatePath(self._root, self._parts[:-1])

    def with_name(self, name: str) -> PrivatePath:
        """Sibling called ``name``."""
        return self.parent / name

    # -- modes

    @property
    def mode(self) -> int:
        """Mode of directories made below DEVICE; files get the mode without the x bits."""
        return self._root.mode

    def share(self, mode: int) -> None:
        """Set the mode of files and directories made below DEVICE from now on."""
        self._root.mode = mode

    def chmod_new(self) -> None:
        """Set the mode of a new DEVICE directory, independent of the umask."""
        os.fchmod(self._root.fd, self._root.mode)

    # -- looking

    def _check(self, found: os.stat_result, kind: int) -> None:
        if stat.S_IFMT(found.st_mode) != kind:
            is_a = _KINDS.get(stat.S_IFMT(found.st_mode), "of an unknown kind")
            raise NotADevice(f"{self} is {is_a}, not {_KINDS[kind]}: remove it, or restore it")
        if found.st_uid != self._root.uid:
            raise PermissionDenied(
                f"{self} belongs to uid {found.st_uid}, the device to uid {self._root.uid}: "
                f"chown {self._root.uid} it, or remove it"
            )
        if kind != stat.S_IFDIR and found.st_nlink > 1:
            raise NotADevice(f"{self} has {found.st_nlink} hard links, not one: copy it, or remove it")

    @contextmanager
    def _directory(self, parts: tuple[str, ...]) -> Iterator[int]:
        """Open the directory ``parts`` below DEVICE. Yields its descriptor, which is closed afterwards."""
        fd, at = os.dup(self._root.fd), PrivatePath(self._root)
        try:
            for name in parts:
                at = at / name
                inner = at._look(fd)
                try:
                    at._check(os.fstat(inner), stat.S_IFDIR)
                    below = os.open(_by_fd(inner), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                finally:
                    os.close(inner)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _look(self, directory: int) -> int:
        return os.open(self.name, _LOOK, dir_fd=directory)

    @contextmanager
    def _held(self) -> Iterator[int]:
        """Open the parent directory. Yields its descriptor, which is closed afterwards."""
        with self._directory(self._parts[:-1]) as fd:
            yield fd

    @contextmanager
    def reachable(self) -> Iterator[Path]:
        """Yield a path to the directory for a library with an interface of paths only. Precondition:
        ``audit`` passed, or the directory is new.
        """
        with self._directory(self._parts) as fd:
            yield Path(_by_fd(fd))

    def as_path(self) -> Path:
        """Return a path for code that keeps the path. Valid while DEVICE is open in the process."""
        return Path(_by_fd(self._root.fd)).joinpath(*self._parts)

    def lstat(self) -> os.stat_result:
        """``lstat(2)``."""
        with self._held() as directory:
            return os.stat(self.name, dir_fd=directory, follow_symlinks=False)

    def exists(self) -> bool:
        """Return True if a file of any type has the name."""
        try:
            self.lstat()
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """Names in the directory."""
        with self._directory(self._parts) as fd:
            return os.listdir(fd)

    def audit(self) -> None:
        """Check the file, or the directory and everything below. A missing file passes.

        Raises NotADevice, PermissionDenied.
        """
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(self.lstat().st_mode):
                self.audit_directory()
            else:
                self.audit_file()

    def audit_file(self) -> None:
        """Check an existing file: regular, of the owner of DEVICE, one link. A missing file passes."""
        with suppress(FileNotFoundError):
            self._check(self.lstat(), stat.S_IFREG)

    def audit_socket(self) -> None:
        """Check an existing file: a socket of the owner of DEVICE. A missing file passes."""
        with suppress(FileNotFoundError):
            self._check(self.lstat(), stat.S_IFSOCK)

    def audit_directory(self) -> None:
        """Check an existing directory: of the owner of DEVICE; audit everything below. A missing directory
        passes.
        """
        with suppress(FileNotFoundError):
            self._check(self.lstat(), stat.S_IFDIR)
            for name in self.names():
                (self / name).audit()

    def tighten(self) -> int:
        """Remove mode bits beyond the mode of DEVICE from the path and everything below. For DEVICE itself,
        change only the directory. Return the number of changed files.
        """
        try:
            with self._held() as directory:
                fd = self._look(directory) if self._parts else os.dup(directory)
        except FileNotFoundError:
            return 0
        try:
            found = os.fstat(fd)
            is_directory = stat.S_ISDIR(found.st_mode)
            if self._parts:
                self._check(found, stat.S_IFDIR if is_directory else stat.S_IFREG)
            kept = stat.S_IMODE(found.st_mode) & (self.mode if is_directory else self.mode & 0o666)
            is_changed = kept != stat.S_IMODE(found.st_mode)
            if is_changed:
                os.chmod(_by_fd(fd), kept)  # noqa: PTH101 - O_PATH
        finally:
            os.close(fd)
        below = self.names() if is_directory and self._parts else ()
        return is_changed + sum((self / name).tighten() for name in below)

    # -- opening

    def open(self, flags: int, *, create: bool = False) -> int:
        """Open the regular file. With ``create``, make a missing file, empty and with the mode of DEVICE.

        Raises NotADevice if the file is not regular or has several links, PermissionDenied if the file
        belongs to another user.
        """
        with self._held() as directory:
            if create:
                with suppress(FileExistsError):
                    return self._make(directory, flags)
            look = self._look(directory)
        try:
            self._check(os.fstat(look), stat.S_IFREG)
            return os.open(_by_fd(look), flags | os.O_CLOEXEC)
        finally:
            os.close(look)

    def make(self, flags: int) -> int:
        """Make and open a new file. Raises FileExistsError."""
        with self._held() as directory:
            return self._make(directory, flags)

    def _make(self, directory: int, flags: int) -> int:
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.name, flags, 0o600, dir_fd=directory)
        os.fchmod(fd, self.mode & 0o666)
        return fd

    def read_bytes(self) -> bytes:
        """All bytes of the file."""
        with open(self.open(os.O_RDONLY), "rb") as file:
            return file.read()

    def write_bytes(self, data: bytes) -> None:
        """Replace the contents of the file, or make the file."""
        with open(self.open(os.O_WRONLY | os.O_TRUNC, create=True), "wb") as file:
            file.write(data)

    def touch(self) -> None:
        """Make an empty file, unless the file exists."""
        os.close(self.open(os.O_RDONLY, create=True))

    # -- changing the directory

    def mkdir(self) -> None:
        """Make the directory and each missing parent; an existing directory is checked."""
        for depth in range(len(self._parts)):
            at = PrivatePath(self._root, self._parts[: depth + 1])
            with at._held() as directory:
                with suppress(FileExistsError):
                    os.mkdir(at.name, PRIVATE, dir_fd=directory)
                look = at._look(directory)
            try:
                at._check(os.fstat(look), stat.S_IFDIR)
                os.chmod(_by_fd(look), self.mode)  # noqa: PTH101 - O_PATH
            finally:
                os.close(look)

    def adopt(self) -> None:
        """Set the mode of the files in the directory, after a library wrote the files."""
        with self._directory(self._parts) as fd:
            for name in os.listdir(fd):
                os.chmod(name, self.mode & 0o666, dir_fd=fd)

    def rename(self, name: str) -> None:
        """Rename to ``name`` in the same directory; an existing file is replaced."""
        with self._held() as directory:
            os.rename(self.name, name, src_dir_fd=directory, dst_dir_fd=directory)

    def unlink(self) -> None:
        """Remove the file, if the file exists."""
        with suppress(FileNotFoundError), self._held() as directory:
            os.unlink(self.name, dir_fd=directory)

    def rmtree(self) -> None:
        """Remove the directory and everything below, if the directory exists. Links are removed, never
        followed.
        """
        with suppress(FileNotFoundError), self._held() as directory:
            shutil.rmtree(self.name, dir_fd=directory)

    def remove(self) -> None:
        """Remove the file, or the directory and everything below."""
        if self.exists() and stat.S_ISDIR(self.lstat().st_mode):
            self.rmtree()
        else:
            self.unlink()

    def bind_path(self) -> tuple[int, str]:
        """Return a descriptor to close after bind(2), and the path to bind a socket to."""
        with self._held() as directory:
            fd = os.dup(directory)
        return fd, f"{_by_fd(fd)}/{self.name}"


def become_owner(device: Path) -> None:
    """Become the owner of the directory ``device``, permanently, with the groups of the owner
    (``--as-owner``).

    Precondition: nothing below ``device`` is open. Raises NotADevice, PermissionDenied.
    """
    if os.geteuid() != 0:
        return
    try:
        fd = os.open(device, _LOOK | os.O_DIRECTORY)
    except OSError as error:
        raise NotADevice(f"{device}: {error.strerror}; --as-owner needs a directory that exists") from error
    try:
        uid = os.fstat(fd).st_uid
    finally:
        os.close(fd)
    if uid == 0:
        return
    try:
        entry = pwd.getpwuid(uid)
        gid, groups = entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
    except KeyError:
        # Not st_gid: in a setgid directory, st_gid may be a group that the user is not in.
        gid, groups = _NOGROUP, []
    try:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise PermissionDenied(f"{device}: cannot become its owner, uid {uid}: {error.strerror}") from error
