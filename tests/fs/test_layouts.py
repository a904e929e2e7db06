"""Layouts, verb by verb. tests/fs/test_model.py checks layouts after random sequences of verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from daxemu.fs import layouts
from daxemu.fs.inode import ROOT_INO
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, Ino
from tests.support.core import Core, core_at, pages
from tests.support.layouts import Holder


@pytest.fixture
def core() -> Iterator[Core]:
    with core_at() as made:
        yield made


@pytest.fixture
def holder(core: Core) -> Holder:
    return Holder(core.fs)


@pytest.fixture
def ino(core: Core, holder: Holder) -> Ino:
    """A file of four pages, all granted."""
    made = core.file(b"f", pages("ABCD"))
    core.read(made)
    core.fs.layouts.grant_attributes(core.fs.names.get(made))
    assert covered(holder, made) == {0, 1, 2, 3}
    assert made in holder.attributes
    return made


def covered(holder: Holder, ino: Ino) -> set[int]:
    """Return the pages of a file in the holder's layouts."""
    return {
        page
        for run in holder.runs.get(ino, [])
        for page in range(run.start // PAGE_SIZE, run.end // PAGE_SIZE)
    }


VERBS: dict[str, Callable[[Core, Ino], object]] = {
    "truncate": lambda core, ino: core.fs.set_size(ino, PAGE_SIZE),
    "append": lambda core, ino: core.fs.write(ino, 4 * PAGE_SIZE, pages("E")),
    "punch": lambda core, ino: core.fs.fallocate(
        ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE_SIZE
    ),
    "share": lambda core, ino: core.clone(ino, b"clone"),
    "chmod": lambda core, ino: core.fs.setattr(ino, mode=0o600),
    "setxattr": lambda core, ino: core.fs.setxattr(ino, b"user.a", b"b", 0),
    "link": lambda core, ino: core.fs.link(ino, ROOT_INO, b"g"),
    "unlink": lambda core, ino: core.fs.unlink(ROOT_INO, b"f"),
    "poison": lambda core, ino: core.poison(ino, 1),
    "latent poison": lambda core, ino: core.poison(ino, 1, latent=True),
    "shutdown": lambda core, ino: core.fs.shutdown("a test"),
    "power failure": lambda core, ino: core.fs.abandon(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_that_changes_a_layout_breaks_it(core: Core, holder: Holder, ino: Ino, verb: str) -> None:
    VERBS[verb](core, ino)
    assert covered(holder, ino) == set()
    assert ino not in holder.attributes


def test_poison_anywhere_breaks_the_layouts_of_other_files(core: Core, holder: Holder, ino: Ino) -> None:
    other = core.file(b"other", pages("X"))
    core.poison(other, 0)
    assert holder.runs == {}


def test_a_store_in_place_revokes_the_attributes_only(core: Core, holder: Holder, ino: Ino) -> None:
    core.fs.write(ino, 10, b"x")
    assert covered(holder, ino) == {0, 1, 2, 3}
    assert ino not in holder.attributes


def test_pages_beside_poison_are_granted(core: Core, holder: Holder, ino: Ino) -> None:
    core.poison(ino, 1)
    core.fs.read(ino, 0, PAGE_SIZE)
    core.fs.read(ino, 3 * PAGE_SIZE, PAGE_SIZE)
    assert covered(holder, ino) == {0, 2, 3}
    assert holder.wrong() == []


def test_shared_blocks_are_granted_for_reading_only(core: Core, holder: Holder, ino: Ino) -> None:
    core.clone(ino, b"clone")
    core.read(ino)
    assert covered(holder, ino) == {0, 1, 2, 3}
    assert not any(run.may_write for run in holder.runs[ino])


@pytest.mark.parametrize("mode", [0o4755, 0o2644])
def test_files_with_set_id_bits_are_granted_for_reading_only(
    core: Core, holder: Holder, ino: Ino, mode: int
) -> None:
    core.fs.setattr(ino, mode=mode)
    core.read(ino)
    assert not any(run.may_write for run in holder.runs[ino])


def test_stores_of_the_holder_change_bytes_times_and_size(core: Core, holder: Holder, ino: Ino) -> None:
    before = core.fs.names.get(ino).mtime
    assert holder.store(ino, PAGE_SIZE, b"held")
    assert core.read(ino)[PAGE_SIZE:][:4] == b"held"
    assert core.fs.names.get(ino).mtime > before
    core.fs.write(ino, 4 * PAGE_SIZE, b"tail")  # the file ends inside a block, which the holder may fill
    assert holder.store(ino, 4 * PAGE_SIZE + 4, b", more")
    assert core.read(ino)[4 * PAGE_SIZE :] == b"tail, more"
    core.fs.fsync()
    core.reopen()
    assert core.read(ino)[4 * PAGE_SIZE :] == b"tail, more"


def test_no_layout_is_granted_while_suspended(core: Core, holder: Holder, ino: Ino) -> None:
    with core.fs.layouts.suspended():
        assert holder.runs == {}
        core.read(ino)
        assert holder.runs == {}
    core.read(ino)
    assert covered(holder, ino) == {0, 1, 2, 3}


def test_no_layout_is_granted_without_a_holder(core: Core, holder: Holder, ino: Ino) -> None:
    core.fs.layouts.hold(None)
    assert holder.runs == {}
    core.read(ino)
    assert holder.runs == {}


def test_at_most_max_files_have_layouts(
    core: Core, holder: Holder, ino: Ino, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "MAX_FILES", 3)
    others = [core.file(b"%d" % number, pages("X")) for number in range(4)]
    for other in others:
        core.read(other)
    assert 0 < len(holder.runs) <= 3
    assert covered(holder, others[-1]) == {0}
    assert ino not in holder.runs
