"""The size of a commit has a limit in changes, not in time: no host calls commit() here."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest

from daxemu.fs.inode import ROOT_INO
from daxemu.fs.pieces import PIECE_LINKS
from daxemu.fs.store import Store
from daxemu.fs.super import MUCH
from daxemu.uapi import PAGE_SIZE, Ino
from tests.support.core import ROOT, Core
from tests.support.steps import rows_of

Change = Callable[[], object]
COUNT = 2 * MUCH
"""Number of changes of a case."""
MOST = MUCH + 2 * PIECE_LINKS
"""Rows of one commit: the changes of the verbs before, and of the last piece."""


def _files(core: Core) -> list[Ino]:
    return [core.file(b"%d" % number, b"x") for number in range(COUNT)]


def _fragmented(core: Core) -> Ino:
    ino = core.file(b"fragmented")
    for number in range(COUNT):
        core.fs.write(ino, number * 2 * PAGE_SIZE, b"x")
    return ino


def _each(inos: list[Ino], verb: Callable[[Ino], object]) -> Change:
    return lambda: [verb(ino) for ino in inos]


def _scattered_writes(core: Core) -> Change:
    return lambda: _fragmented(core)


def _new_files(core: Core) -> Change:
    return lambda: _files(core)


def _overwrites(core: Core) -> Change:
    return _each(_files(core), lambda ino: core.fs.write(ino, 0, b"y"))


def _stores_in_c(core: Core) -> Change:
    return _each(_files(core), lambda ino: core.fs.wrote(ino, 1))


def _growth_in_c(core: Core) -> Change:
    return _each(_files(core), lambda ino: core.fs.grew(ino, 2))


def _store_faults(core: Core) -> Change:
    ino = core.file()
    core.fs.set_size(ino, 2 * COUNT * PAGE_SIZE)

    def faults() -> None:
        for number in range(COUNT):
            core.fs.fault(ino, 2 * number, is_store=True, limit=1)

    return faults


def _attributes(core: Core) -> Change:
    inos = _files(core)

    def change() -> None:
        for ino in inos:
            core.fs.setxattr(ino, b"user.a", b"b", 0)
            core.fs.setattr(ino, mode=0o600)

    return change


def _unlinks(core: Core) -> Change:
    _files(core)
    return lambda: [core.fs.unlink(ROOT_INO, b"%d" % number) for number in range(COUNT)]


def _last_closes(core: Core) -> Change:
    inos = _files(core)
    for number, ino in enumerate(inos):
        core.fs.open(core.fs.names.get(ino))
        core.fs.unlink(ROOT_INO, b"%d" % number)
    return _each(inos, core.fs.release)


def _frees_in_pieces(core: Core) -> Change:
    _fragmented(core)

    def frees() -> None:
        with core.fs.reclaimer.served(lambda: None):
            core.fs.unlink(ROOT_INO, b"fragmented")
            while core.fs.inactivate():
                pass

    return frees


def _renames(core: Core) -> Change:
    _files(core)

    def renames() -> None:
        for number in range(COUNT):
            core.fs.rename((ROOT_INO, b"%d" % number), (ROOT_INO, b"n%d" % number), 0, ROOT)

    return renames


def _a_name_for_a_file_of_many_extents(core: Core) -> Change:
    inode = core.fs.tmpfile(ROOT_INO, stat.S_IFREG | 0o600, ROOT)
    core.fs.open(inode)

    def names_it() -> None:
        for number in range(2 * COUNT):
            core.fs.write(inode.ino, number * 2 * PAGE_SIZE, b"x")
        core.fs.link(inode.ino, ROOT_INO, b"f")
        core.fs.fsync()
        core.fs.release(inode.ino)

    return names_it


CASES = [
    _scattered_writes,
    _new_files,
    _overwrites,
    _stores_in_c,
    _growth_in_c,
    _store_faults,
    _attributes,
    _unlinks,
    _last_closes,
    _frees_in_pieces,
    _renames,
    _a_name_for_a_file_of_many_extents,
]


@pytest.mark.parametrize("core", [256 << 20], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_commit_writes_more_than_much(
    core: Core, monkeypatch: pytest.MonkeyPatch, case: Callable[[Core], Change]
) -> None:
    change = case(core)
    core.fs.commit()
    rows: list[int] = []
    commit = Store.commit

    def counting(self: Store, *args: object, **kwargs: object) -> None:
        rows.append(rows_of(core.fs.names, core.fs.rmap))
        commit(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", counting)
        change()
        core.fs.commit()
    assert sum(rows) >= COUNT
    assert max(rows) <= MOST
