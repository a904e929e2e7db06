"""Damage to a device, drawn from a seed (tests/support/damage.py), and the results that a user may see then.

An image is a copy of one prepared device in shared memory. :func:`check` examines an image as ``fsck``,
``fsck --repair``, ``mount``, ``page-types`` and ``log`` do, without a mount.
"""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from daxemu.cli.main import main
from daxemu.errors import DaxemuError, MediaError
from daxemu.events import Event, MetadataRewritten
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.metadata_page import MetadataFile
from daxemu.fs.offline import check_device
from daxemu.mm.memmap import Memmap
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE
from tests.support.core import ROOT, Core
from tests.support.metadata import Page, metadata_pages, superblocks

Tree = dict[bytes, tuple[Any, ...]]
"""By path: everything that system calls show of a file; ``None`` for bytes that cannot be read."""
PRECIOUS = b"precious"
"""Bytes of a file outside of the device, which no verb may change."""


def fill(core: Core) -> None:
    """Create an example of every kind of content, in rows on many pages."""
    fs = core.fs
    directory = core.dir(b"d")
    inner = core.dir(b"inner", directory.ino)
    first = core.file(b"f", b"data" * 3000)
    core.clone(first, b"clone")
    fs.link(first, inner.ino, b"another name")
    fs.symlink(directory.ino, b"s", b"../f", ROOT)
    fs.mknod(inner.ino, b"null", stat.S_IFCHR | 0o600, 0x103, ROOT)
    fs.setxattr(first, b"user.x", b"value", 0)
    for number in range(60):
        ino = core.file(b"file %d" % number, b"%d" % number if number % 3 else b"", inner.ino)
        if number % 5 == 0:
            fs.setxattr(ino, b"user.long", b"%d" % number * 40, 0)


def change(core: Core) -> None:
    """Change rows on most pages: an earlier copy of a page is then stale."""
    fs = core.fs
    inner = fs.names.lookup(fs.names.lookup(ROOT_INO, b"d").ino, b"inner")
    for number in range(0, 60, 2):
        child = fs.names.lookup(inner.ino, b"file %d" % number)
        fs.write(child.ino, 0, b"changed %d" % number)
        if number % 4 == 0:
            fs.setxattr(child.ino, b"user.new", b"new", 0)


def tree(fs: Filesystem) -> Tree:
    """Walk the tree from the root, by names alone, and read every file."""
    found: Tree = {}
    ahead = [(b"", ROOT_INO)]
    while ahead:
        path, ino = ahead.pop()
        inode = fs.names.get(ino)
        data: bytes | None = b""
        if inode.extents is not None:
            try:
                # The beginning of a huge file: all of its blocks exist.
                data = bytes(fs.read(ino, 0, min(inode.size, 1 << 20)))
            except MediaError:
                data = None
        times = (inode.atime, inode.mtime, inode.ctime)
        plain = (inode.mode, inode.uid, inode.gid, inode.nlink, inode.rdev, inode.size, times)
        found[path or b"/"] = (ino, *plain, inode.target, sorted(inode.xattrs.items()), inode.sectors, data)
        ahead += [(path + b"/" + name, child) for name, child in (inode.entries or {}).items()]
    for inode in fs.names:
        fs.names.path_bytes(inode.ino)  # a ring would have no end
    return found


def outside_domains(found: Tree) -> list[str]:
    """Return values that no filesystem can show, although no constraint of a table excludes them."""
    wrong: list[str] = []
    kinds = {0o100000, 0o040000, 0o120000, 0o010000, 0o140000, 0o020000, 0o060000}
    for path, (ino, mode, uid, gid, nlink, rdev, size, times, target, xattrs, sectors, _) in found.items():
        name = path.rpartition(b"/")[2]
        sound = {
            "ino": 0 < ino < 1 << 63,
            "mode": 0 <= mode < 1 << 16 and mode & 0o170000 in kinds,
            "owner": 0 <= uid < (1 << 32) - 1 and 0 <= gid < (1 << 32) - 1,
            "nlink": 0 < nlink < 1 << 31,
            "rdev": 0 <= rdev < 1 << 32,
            "size": 0 <= size <= (1 << 63) - 1 and (target is None or size == len(target)),
            "times": all(-(1 << 63) <= time < 1 << 63 for time in times),
            "target": (mode & 0o170000 == 0o120000) == (target is not None) and b"\0" not in (target or b""),
            "xattrs": all(0 < len(key) < 256 and b"\0" not in key for key, _ in xattrs),
            "sectors": 0 <= sectors < 1 << 62,
            "name": path == b"/" or (0 < len(name) < 256 and b"\0" not in name and name not in (b".", b"..")),
        }
        wrong += [f"{path!r}: {what}" for what, is_sound in sound.items() if not is_sound]
    return wrong


class Pristine:
    """Device from which images are copied, ended cleanly or (``is_clean`` False) killed after a commit, with
    records in the log alone.
    """

    def __init__(self, core: Core, *, is_clean: bool) -> None:
        self.path, self.size, self.is_clean = core.path, core.config.size, is_clean
        core.reopen()
        fill(core)
        core.close()
        self.old = (self.path / "media").read_bytes()
        core.open()
        change(core)
        self._end(core)
        (self.path / "media").write_bytes(self.media)
        self.tree = Seen(self.path, write=False).tree or {}
        (self.path / "media").write_bytes(self.media)
        self.pages: list[Page] = metadata_pages(self.path)
        self.supers = superblocks(self.path)
        self.live = [page for page in self.pages if self._is_live(page)]
        parts = ((at, self.media[at : at + PAGE_SIZE]) for at in range(0, self.size, PAGE_SIZE))
        self.parts = runs_of([(at, data) for at, data in parts if any(data)])

    def _end(self, core: Core) -> None:
        core.pmem.make_struct_pages()
        sysfs = core.pmem.show_in_sysfs()
        (self.path / "events.jsonl").write_bytes(
            b'{"event":"Unmounted","seq":1,"time":1.0,"mountpoint":"/m"}\n' * 9
        )
        core.fs.commit()
        memmap = core.pmem.pgmap.memmap if core.pmem.pgmap is not None else None
        assert memmap is not None
        self.struct_pages = memmap.count()
        self.files = {
            file.relative_to(self.path): file.read_bytes()
            for file in self.path.rglob("*")
            if file.is_file() and file.name != "media"
        }
        if self.is_clean:
            core.close()
            self.media = (self.path / "media").read_bytes()
        else:
            self.media = (self.path / "media").read_bytes()
            core.close()
        sysfs.close()

    def _is_live(self, page: Page) -> bool:
        """Return True if SQLite reads the page: in the database the pages that its header counts, in the log
        the pages written since the last restart.
        """
        payload = PAGE_SIZE - 24
        if page.file is MetadataFile.DB:
            first = self.pages[0].offsets[0]
            count = int.from_bytes(self.media[first + 28 : first + 32], "big")
            return page.number * payload < count * 4096
        at = page.offsets[0]
        return not self.is_clean and self.media[at : at + payload] != self.old[at : at + payload]


def runs_of(pages: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Return offsets and bytes of pages, adjacent pages joined."""
    runs: list[tuple[int, bytearray]] = []
    for at, data in pages:
        if runs and runs[-1][0] + len(runs[-1][1]) == at:
            runs[-1][1].extend(data)
        else:
            runs.append((at, bytearray(data)))
    return [(at, bytes(data)) for at, data in runs]


class Image:
    """A copy of a pristine device below ``scratch``, with damage as ``seed`` says. ``kind`` names the damage.

    ``is_sealed``: checksums are right and values may be wrong. ``is_refused``: a mount must be refused.
    ``is_running``: files besides media and poison are damaged, which page-types, log and a mount look at.
    """

    def __init__(self, pristines: list[Pristine], scratch: Path, seed: int) -> None:
        from tests.support.damage import DAMAGE

        self.path = path = scratch / "device"
        self.random = random.Random(seed)
        self.pristine = pristine = self.random.choice(pristines)
        self.is_sealed = self.is_refused = self.is_running = False
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        path.mkdir(0o700)
        for name, data in pristine.files.items():
            (path / name).parent.mkdir(exist_ok=True, parents=True, mode=0o700)
            (path / name).write_bytes(data)
        self.outside = scratch / "outside"
        self.outside.write_bytes(PRECIOUS)
        with (path / "media").open("wb") as media:
            for offset, data in pristine.parts:
                media.seek(offset)
                media.write(data)
            media.truncate(pristine.size)
        damage = self.random.choice(DAMAGE)
        self.kind = damage.__name__
        damage(self)
        self.bad = self._bad_copies()

    def page(self, offset: int) -> bytes:
        """Bytes of one page of the pristine device."""
        return self.pristine.media[offset : offset + PAGE_SIZE]

    def pages(self) -> list[Page]:
        """Choose one page or a few, most of them in use."""
        draw = self.random
        among = self.pristine.live if draw.random() < 0.9 else self.pristine.pages
        return draw.sample(among, min(len(among), draw.choice((1, 1, 2, 5, 20))))

    def _bad_copies(self) -> list[int]:
        """Return the number of damaged copies of each page and of the superblock."""
        media = self.path / "media"
        if not media.is_file() or media.is_symlink() or media.stat().st_size != self.pristine.size:
            return []
        now, was = media.read_bytes(), self.pristine.media
        poisoned = self._poisoned()
        used = 20 + int.from_bytes(was[:4], "little")
        pieces = [[(at, PAGE_SIZE) for at in page.offsets] for page in self.pristine.pages]
        pieces.append([(at, used) for at in self.pristine.supers])
        if poisoned:
            blot = bytearray(now)
            for start, end in poisoned:
                blot[start:end] = bytes(byte ^ 0xFF for byte in was[start:end])
            now = bytes(blot)
        return [sum(now[at : at + size] != was[at : at + size] for at, size in copies) for copies in pieces]

    def _poisoned(self) -> list[tuple[int, int]]:
        """Return the byte ranges that the file ``poison`` names, if the file can be read."""
        if not (self.path / "poison").is_file():
            return []
        with suppress(OSError, ValueError):
            lines = [line.split() for line in (self.path / "poison").read_bytes().split(b"\n") if line]
            ranges = [(int(at) * 512, (int(at) + int(count)) * 512) for at, count in lines]
            return ranges if all(0 <= at < end <= self.pristine.size for at, end in ranges) else []
        return []


class Seen:
    """Result of one mount of an image: events, fsck's report, the tree or the error."""

    def __init__(self, path: Path, *, write: bool, running: bool = False) -> None:
        """``running``: with struct pages and sysfs, as a machine has them."""
        self.events: list[Event] = []
        self.wrong: list[str] = []
        self.tree: Tree | None = None
        self.lost = 0
        self.struct_pages: dict[Any, int] | None = None
        try:
            with DeviceDir.open(path) as directory, closing(Pmem(directory)) as pmem:
                mm = MemoryFailures(self.events.append)
                pmem.attach(mm)
                if running:
                    pmem.make_struct_pages()
                    pmem.show_in_sysfs()
                    with closing(Memmap.open(directory.root / "struct_page")) as memmap:
                        self.struct_pages = memmap.count()
                self._mount(Filesystem(pmem.dax, mm, self.events.append), write)
        except DaxemuError as error:
            self.wrong.append(str(error))

    def _mount(self, fs: Filesystem, write: bool) -> None:
        try:
            self.wrong += fsck(fs)
            self.tree = tree(fs)
            self.lost = len(fs.damaged())
            if write:
                ino = fs.mknod(ROOT_INO, b"new", stat.S_IFREG | 0o644, 0, ROOT).ino
                fs.write(ino, 0, b"new" * 5000)
                fs.fsync()
                for name, child in list(fs.names.directory(ROOT_INO)[1].items()):
                    if not fs.names.get(child).is_dir:
                        fs.unlink(ROOT_INO, name)
        finally:
            fs.close()

    @property
    def said_something(self) -> bool:
        """Return True if an event or an error names a problem."""
        return bool(self.wrong or self.lost or any(type(event) is MetadataRewritten for event in self.events))


def look_from_outside(path: Path) -> list[str]:
    """Run page-types and log on a device; return their errors."""
    said: list[str] = []
    for verb in (("page-types",), ("page-types", "--list"), ("log",)):
        done = CliRunner().invoke(main, [*verb, str(path)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code in (0, 3, 5, 9), f"{verb}: exit status {done.exit_code}: {done.output}"
        said += done.stderr.splitlines()
    return said


def _fsck(image: Image, *, repair: bool) -> list[str]:
    try:
        with DeviceDir.open(image.path) as directory:
            report = check_device(directory, repair=repair)
        return [*report.wrong, *report.damaged]
    except DaxemuError as error:
        return [str(error)]


def check(image: Image) -> None:
    """Run fsck, page-types, log, mount, walk, repair, mount again and write. Fail where wrong data is shown
    without a report, or a good copy was not used.
    """
    found = _fsck(image, repair=False)
    is_mendable = not image.is_sealed and not image.is_refused and max(image.bad, default=0) == 1
    if is_mendable and image.pristine.is_clean:
        assert len(found) >= sum(image.bad), (
            f"fsck names {len(found)} of {sum(image.bad)} bad copies: {found[:3]}"
        )
    said = [*found, *(look_from_outside(image.path) if image.is_running else [])]
    for repair in image.random.choice(((False, True), (True,))):
        if repair:
            found = _fsck(image, repair=True)
            said += found
            assert not is_mendable or not [line for line in found if " are poison" not in line], found[:3]
        seen = Seen(image.path, write=repair, running=image.is_running)
        said += seen.wrong
        assert not is_mendable or seen.tree is not None, (
            f"refused with a good copy of each page: {seen.wrong}"
        )
        assert not image.is_refused or seen.tree is None, "mounted"
        _check_tree(image, seen, said=bool(said or seen.said_something))
        # A device.toml of another base_pfn or altmap is sound, and has other pfns.
        if seen.struct_pages is not None and image.kind != "config":
            assert seen.struct_pages == image.pristine.struct_pages, "struct pages of another machine"
        if image.is_sealed and seen.tree is not None and repair and not said:
            after = Seen(image.path, write=False)
            assert after.tree is not None, f"lost by a write: {after.wrong}"
            assert not after.wrong, f"sound before a write: {after.wrong}"
    assert not (many := [line for line in said if "\n" in line]), f"more than a line: {many[0]}"
    assert image.outside.read_bytes() == PRECIOUS, "a file outside of the device was changed"


def _check_tree(image: Image, seen: Seen, *, said: bool) -> None:
    if seen.tree is None:
        return
    assert not (wrong := outside_domains(seen.tree)), wrong[:3]
    if image.is_sealed:
        return
    right = image.pristine.tree
    differ = {path for path in right.keys() | seen.tree.keys() if right.get(path) != seen.tree.get(path)}
    lost = {path for path in differ if _is_lost(right.get(path), seen.tree.get(path))}
    assert differ == lost, f"wrong: {sorted(differ - lost)[:5]}"
    assert said or not differ, f"lost without a word: {sorted(differ)[:5]}"


def _is_lost(was: Iterable[Any] | None, now: Iterable[Any] | None) -> bool:
    """Return True if the only difference is bytes that cannot be read."""
    return was is not None and now is not None and [*was][:-1] == [*now][:-1] and [*now][-1] is None
