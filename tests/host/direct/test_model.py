"""Mappings, stores, clones, truncations and holes in any order, against a model of pages.

Real media, real userfaultfds, real filesystem; the address spaces are the test's own (support/own_space).
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from daxemu.fs.fsck import fsck
from daxemu.host.direct.calls import MAP_FIXED, MAP_PRIVATE, MAP_SHARED
from daxemu.host.direct.syscalls import MADV_DONTNEED
from daxemu.host.run.filters import Nr
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE
from tests.support.core import core_at
from tests.support.own_space import HostInThread, Process

FILES, PROCESSES, PAGES = 3, 2, 8
EXAMPLES = int(os.environ.get("DAXEMU_MODEL_EXAMPLES", "40"))

page = st.integers(0, PAGES - 1)
count = st.integers(1, PAGES)
file = st.integers(0, FILES - 1)


@dataclass
class Mapped:
    """A mapping of the model: page ``index`` of the mapping shows page ``first + index`` of the file."""

    process: Process
    address: int
    file: int
    first: int
    pages: int
    is_shared: bool
    copies: dict[int, str] = field(default_factory=dict)


class Machine(RuleBasedStateMachine):
    """A file of the model is a list with a letter for each page; "." is a page of zeros."""

    def __init__(self) -> None:
        super().__init__()
        with ExitStack() as stack:
            self.core = stack.enter_context(core_at())
            self.inos = [self.core.file(b"%d" % number) for number in range(FILES)]
            self.files = [[] for _ in range(FILES)]  # type: list[list[str]]
            self.mapped: list[Mapped] = []
            thread = stack.enter_context(closing(HostInThread(self.core)))
            self.do, self.now, self.host = thread.do, thread.now, thread.host
            self.processes = [self.now(self.host.process) for _ in range(PROCESSES)]
            self.stack = stack.pop_all()

    def letter(self) -> str:
        """Return a letter not used before, of one byte."""
        code = getattr(self, "_code", 0x21)
        self._code = 0x21 if code >= 0x7E else code + 1
        return "#" if chr(code) in ".!" else chr(code)

    def size(self, file: int) -> int:
        return len(self.files[file])

    # -- changes of files

    @rule(file=file, at=page, pages=count)
    def write(self, file: int, at: int, pages: int) -> None:
        letter, pages = self.letter(), min(pages, PAGES - at)
        self.do(self.host.write, self.inos[file], at * PAGE_SIZE, letter.encode() * PAGE_SIZE * pages)
        content = self.files[file]
        content += ["."] * (at + pages - len(content))
        content[at : at + pages] = [letter] * pages

    @rule(file=file, pages=st.integers(0, PAGES))
    def truncate(self, file: int, pages: int) -> None:
        self.do(self.host.truncate, self.inos[file], pages * PAGE_SIZE)
        self.files[file] = (self.files[file] + ["."] * pages)[:pages]
        for mapped in self.mapped:  # truncate_pagecache() unmaps private copies, too
            if mapped.file == file:
                kept = {at: copy for at, copy in mapped.copies.items() if mapped.first + at < pages}
                mapped.copies = kept

    @rule(file=file, at=page, pages=count)
    def punch(self, file: int, at: int, pages: int) -> None:
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        self.do(self.host.fallocate, self.inos[file], mode, at * PAGE_SIZE, pages * PAGE_SIZE)
        for index in range(at, min(at + pages, self.size(file))):
            self.files[file][index] = "."

    @rule(source=file, to=file)
    def clone(self, source: int, to: int) -> None:
        if source != to and self.files[source]:
            self.do(self.host.clone, self.inos[source], self.inos[to])
            rest = self.files[to][self.size(source) :]
            self.files[to] = self.files[source] + rest

    @rule()
    def commit(self) -> None:
        self.now(self.host.fs.fsync)

    # -- changes of mappings

    @rule(process=st.integers(0, PROCESSES - 1), file=file, at=page, pages=count, is_shared=st.booleans())
    def mmap(self, process: int, file: int, at: int, pages: int, is_shared: bool) -> None:
        if len(self.mapped) < 6:
            where = self.processes[process]
            flags = MAP_SHARED if is_shared else MAP_PRIVATE
            address = self.do(where.mmap, self.inos[file], pages, 3, flags, at)
            assert address > 0, os.strerror(-address)
            self.mapped.append(Mapped(where, address, file, at, pages, is_shared))

    @precondition(lambda self: self.mapped)
    @rule(data=st.data(), file=file, at=page, is_shared=st.booleans())
    def mmap_over(self, data: st.DataObject, file: int, at: int, is_shared: bool) -> None:
        """Map a file in place of the first pages of a mapping."""
        mapped = data.draw(st.sampled_from(self.mapped))
        pages = data.draw(st.integers(1, mapped.pages))
        process, start = mapped.process, mapped.address
        flags = MAP_FIXED | (MAP_SHARED if is_shared else MAP_PRIVATE)
        assert self.do(process.mmap, self.inos[file], pages, 3, flags, at, start) == start
        self._cut(mapped, pages)
        self.mapped.append(Mapped(process, start, file, at, pages, is_shared))

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def munmap(self, data: st.DataObject) -> None:
        mapped = data.draw(st.sampled_from(self.mapped))
        first = data.draw(st.integers(0, mapped.pages - 1))
        assert self.do(mapped.process.call, Nr.MUNMAP, mapped.address, (first + 1) * PAGE_SIZE) == 0
        self._cut(mapped, first + 1)

    def _cut(self, mapped: Mapped, pages: int) -> None:
        """Remove the first ``pages`` of a mapping of the model."""
        if pages == mapped.pages:
            self.mapped.remove(mapped)
        mapped.address += pages * PAGE_SIZE
        mapped.first += pages
        mapped.pages -= pages
        mapped.copies = {at - pages: kept for at, kept in mapped.copies.items() if at >= pages}

    @precondition(lambda self: self.mapped)
    @rule(data=st.data(), pages=count)
    def mremap(self, data: st.DataObject, pages: int) -> None:
        mapped = data.draw(st.sampled_from(self.mapped))
        old, new = mapped.pages * PAGE_SIZE, pages * PAGE_SIZE
        address = self.do(mapped.process.call, Nr.MREMAP, mapped.address, old, new, 1)
        assert address > 0, os.strerror(-address)
        mapped.address, mapped.pages = address, pages
        mapped.copies = {at: kept for at, kept in mapped.copies.items() if at < pages}

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Give up the private copies of some pages."""
        mapped = data.draw(st.sampled_from(self.mapped))
        first = data.draw(st.integers(0, mapped.pages - 1))
        start, length = mapped.address + first * PAGE_SIZE, (mapped.pages - first) * PAGE_SIZE
        assert self.do(mapped.process.call, Nr.MADVISE, start, length, MADV_DONTNEED) == 0
        mapped.copies = {at: kept for at, kept in mapped.copies.items() if at < first}

    # -- accesses

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        mapped = data.draw(st.sampled_from(self.mapped))
        at = data.draw(st.integers(0, mapped.pages - 1))
        letter, index = self.letter(), mapped.first + at
        done = self.do(mapped.process.store, mapped.address + at * PAGE_SIZE, letter.encode())
        assert done == (index < self.size(mapped.file) or at in mapped.copies)
        if done and mapped.is_shared:
            self.files[mapped.file][index] = letter
        elif done:
            mapped.copies[at] = letter

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        mapped = data.draw(st.sampled_from(self.mapped))
        at = data.draw(st.integers(0, mapped.pages - 1))
        assert self.do(mapped.process.letters, mapped.address + at * PAGE_SIZE, 1) == self.shown(mapped, at)

    def shown(self, mapped: Mapped, at: int) -> str:
        content = self.files[mapped.file]
        beyond = mapped.first + at >= len(content)
        return mapped.copies.get(at) or ("!" if beyond else content[mapped.first + at])

    @invariant()
    def files_are_as_stored(self) -> None:
        for ino, content in zip(self.inos, self.files, strict=True):
            found = self.now(self.core.read, ino)[::PAGE_SIZE].decode().replace("\0", ".")
            assert found == "".join(content)

    def teardown(self) -> None:
        """The host ends whatever a check finds: a second host in this process would use its addresses."""
        with self.stack:
            self.core.sound = False  # checked here
            for mapped in self.mapped:
                shown = "".join(self.shown(mapped, at) for at in range(mapped.pages))
                assert self.do(mapped.process.letters, mapped.address, mapped.pages) == shown
            assert self.now(fsck, self.core.fs) == []


@pytest.mark.timeout(200 + 15 * EXAMPLES)  # for shrinking a failing example; a passing run takes 5 s
@pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd(2) needs root")
def test_mappings_show_what_the_model_shows() -> None:
    machine = settings(
        max_examples=EXAMPLES,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=machine)
