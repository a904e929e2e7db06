"""A real mount and a plain model side by side: the same steps, the same tree and bytes after each step.

After a crash the mount may match the model at any moment since the last fsync. Exception: the bytes of a file
stored to through a mapping, promised only by an fsync of the same file. From there on mount and model go on
together.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.aftermath import Tree, look, why_not
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.workload import DIRECTORY, MOST, PAGE, Op, State, after, do
from tests.support.zygote import Zygote

PHASES = [Phase.explicit, Phase.generate, *([Phase.shrink] if os.environ.get("DAXEMU_SHRINK") else [])]
"""Shrinking takes minutes: only for the investigation of a failure."""
EXAMPLES = int(os.environ.get("DAXEMU_MODEL_EXAMPLES", "15"))
NAMES = ["a", "b", "c", "d", "dir/a", "dir/b"]
pytestmark = [pytest.mark.mount, pytest.mark.timeout(200 + 15 * EXAMPLES)]

_zygotes: list[Zygote] = []


@pytest.fixture(scope="module", autouse=True)
def _one_zygote(zygote: Zygote) -> Iterator[None]:
    """A machine of hypothesis can have no fixtures."""
    _zygotes.append(zygote)
    yield
    _zygotes.remove(zygote)


which = st.integers(0, 63)
seeds = st.integers(0, 1 << 20)
offsets = st.one_of(st.integers(0, 5).map(lambda page: page * PAGE), st.integers(0, 6 * PAGE))
lengths = st.one_of(st.integers(1, 3).map(lambda pages: pages * PAGE), st.integers(1, 3 * PAGE))


class MountAgainstModel(RuleBasedStateMachine):
    """``states``: the model at each moment to which a crash may lead back, the present one last. ``older``:
    other allowed bytes of files. ``handles``: descriptors and the inode numbers of their files.
    """

    @initialize()
    def start(self) -> None:
        self._stack = ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="daxemu-model-")))
        self.mount: QuickMount = self._stack.enter_context(quick_mount_at(directory, _zygotes[0], 64 << 20))
        self.states = [State()]
        self.older: dict[int, list[bytes]] = {}
        self.handles: list[tuple[int, int]] = []
        self.views: list[tuple[int, mmap.mmap]] = []
        self.done = 0
        self.step(Op("mkdir", "dir"))
        self.step(Op("fsyncdir", ""))
        for name in NAMES[:2]:
            self.step(Op("create", name))
            self.step(Op("write", name, b=0, c=3 * PAGE, seed=len(name)))

    def teardown(self) -> None:
        if hasattr(self, "_stack"):
            self.close_handles()
            self._stack.close()

    # -- both sides

    @property
    def state(self) -> State:
        return self.states[-1]

    @property
    def files(self) -> list[str]:
        return sorted(name for name, number in self.state.names.items() if number is not DIRECTORY)

    def step(self, op: Op) -> None:
        """Apply a step to both."""
        event(op.verb)
        then = after(self.state, op, self.done)
        self.done += 1
        number = self.state.names.get(op.name)
        if op.verb == "stored" and number is not None:
            versions = [state.files[number] for state in self.states if number in state.files]
            self.older[number] = [*self.older.get(number, []), *versions]
        self.states.append(then)
        if op.verb == "stored":
            self.keep_dirty(op)
        elif do(self.mount.path, op):
            self.promised(number)

    def keep_dirty(self, op: Op) -> None:
        """Store through a mapping and keep the file open: closing any descriptor of the file would write the
        page back.
        """
        fd = os.open(self.mount.path / op.name, os.O_RDWR)
        view = mmap.mmap(fd, 0)
        self.views.append((fd, view))
        data = op.data()[: len(view) - op.b]
        view[op.b : op.b + len(data)] = data

    def promised(self, number: int | None = None) -> None:
        """Names and sizes as of now, and the bytes of the file; other files may keep older versions."""
        for other, versions in self.older.items():
            versions += [state.files[other] for state in self.states if other in state.files]
        if number is not None:
            self.older.pop(number, None)
        self.states = [self.state]

    def pick(self, index: int) -> str:
        return self.files[index % len(self.files)]

    # -- names

    @rule(name=st.sampled_from(NAMES))
    def create(self, name: str) -> None:
        if name not in self.state.names:
            self.step(Op("create", name))

    @precondition(lambda self: self.files)
    @rule(index=which, new=st.sampled_from(NAMES))
    def link(self, index: int, new: str) -> None:
        if new not in self.state.names:
            self.step(Op("link", self.pick(index), new))

    @precondition(lambda self: self.files)
    @rule(index=which, new=st.sampled_from(NAMES), verb=st.sampled_from(["rename", "rename", "exchange"]))
    def rename(self, index: int, new: str, verb: str) -> None:
        if verb == "rename" or new in self.state.names:
            self.step(Op(verb, self.pick(index), new))

    @precondition(lambda self: len(self.files) > 1)
    @rule(index=which)
    def unlink(self, index: int) -> None:
        self.step(Op("unlink", self.pick(index)))

    # -- bytes

    @precondition(lambda self: self.files)
    @rule(
        index=which,
        verb=st.sampled_from(["write", "write", "punch", "zero", "allocate"]),
        at=offsets,
        length=lengths,
        seed=seeds,
    )
    def change(self, index: int, verb: str, at: int, length: int, seed: int) -> None:
        self.step(Op(verb, self.pick(index), b=at, c=min(length, MOST - at), seed=seed))

    @precondition(lambda self: self.files)
    @rule(
        index=which,
        verb=st.sampled_from(["mapped", "stored", "stored"]),
        at=offsets,
        length=lengths,
        seed=seeds,
    )
    def store(self, index: int, verb: str, at: int, length: int, seed: int) -> None:
        name = self.pick(index)
        size = len(self.state.files[self.state.names[name] or 0])
        if at < size:
            self.step(Op(verb, name, b=at, c=length, seed=seed))

    @precondition(lambda self: self.files)
    @rule(index=which, size=offsets)
    def truncate(self, index: int, size: int) -> None:
        self.step(Op("truncate", self.pick(index), b=size))

    @precondition(lambda self: self.files)
    @rule(index=which, other=which, verb=st.sampled_from(["clone", "copy"]))
    def clone(self, index: int, other: int, verb: str) -> None:
        one, two = self.pick(index), self.pick(other)
        if self.state.names[one] != self.state.names[two]:
            self.step(Op(verb, one, two))

    @precondition(lambda self: len(self.files) > 1)
    @rule(
        index=which,
        other=which,
        stored=st.booleans(),
        give_up=st.sampled_from(["unlink", "truncate", "write"]),
    )
    def snapshot(self, index: int, other: int, stored: bool, give_up: str) -> None:
        """Make and delete a synced clone during writes to the source."""
        one, two = self.pick(index), self.pick(other)
        if self.state.names[one] == self.state.names[two]:
            return
        if stored and self.state.files[self.state.names[one] or 0]:
            self.step(Op("stored", one, b=0, c=2 * PAGE, seed=index))
        self.step(Op("clone", two, one))
        self.step(Op("fsync", two))
        self.step(Op(give_up, two, b=0, c=3 * PAGE, seed=7))
        self.step(Op("write", one, b=0, c=3 * PAGE, seed=other))

    # -- open files

    @precondition(lambda self: self.files)
    @rule(index=which)
    def open(self, index: int) -> None:
        name = self.pick(index)
        number = self.state.names[name]
        assert number is not None
        self.handles.append((os.open(self.mount.path / name, os.O_RDWR), number))

    @precondition(lambda self: self.handles)
    @rule(index=which)
    def close(self, index: int) -> None:
        os.close(self.handles.pop(index % len(self.handles))[0])

    def close_handles(self) -> None:
        while self.handles:
            with suppress(OSError):
                os.close(self.handles.pop()[0])
        while self.views:
            fd, view = self.views.pop()
            view.close()
            with suppress(OSError):
                os.close(fd)

    # -- durability

    @precondition(lambda self: self.files)
    @rule(index=which)
    def fsync(self, index: int) -> None:
        self.step(Op("fsync", self.pick(index)))

    @rule(name=st.sampled_from(["", "dir"]))
    def fsync_directory(self, name: str) -> None:
        self.step(Op("fsyncdir", name))

    @rule()
    def remount(self) -> None:
        event("remount")
        self.close_handles()
        self.mount.remount()
        self.states = [self.state]
        self.older = {}

    @rule(how=st.sampled_from(["kill", "powerfail"]))
    def crash(self, how: str) -> None:
        event(how)
        try:
            self.mount.crash(how)
        finally:
            self.close_handles()
        found = look(self.mount.path)
        wrong = why_not(found, self.states, self.older)
        assert wrong is None, wrong
        self.adopt(found)

    def adopt(self, found: Tree) -> None:
        """Take the tree found after a crash for the model's only state."""
        state = next(state for state in reversed(self.states) if state.shape() == found.shape).copy()
        for name, data in found.data.items():
            number = state.names[name]
            if number is not DIRECTORY and data is not None:
                state.files[number] = data
        self.states = [state]
        self.older = {}

    # -- the same?

    @invariant()
    def trees_are_the_same(self) -> None:
        expected = {n: None if i is DIRECTORY else self.state.files[i] for n, i in self.state.names.items()}
        assert look(self.mount.path).data == expected

    @invariant()
    def links_are_the_same(self) -> None:
        found = {name: (self.mount.path / name).stat() for name in self.files}
        for name, stat in found.items():
            same = {other for other in self.files if self.state.names[other] == self.state.names[name]}
            assert stat.st_nlink == len(same)
            assert {other for other in self.files if found[other].st_ino == stat.st_ino} == same

    @invariant()
    def open_files_are_the_same(self) -> None:
        for fd, number in self.handles:
            assert os.pread(fd, 2 * MOST, 0) == self.state.files[number]


MountAgainstModel.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestMountAgainstModel = MountAgainstModel.TestCase
