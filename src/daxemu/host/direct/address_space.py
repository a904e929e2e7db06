"""Address space with direct mappings, and the interfaces of those who make and watch address spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from daxemu.host.direct.agent import ProcessAgent
from daxemu.host.direct.userfaultfd import Event, Userfaultfd
from daxemu.host.run.seccomp import Answer, NotifiedCall


class NotifiedCalls(Protocol):
    """The calls of one ``daxemu run``: ``host.run.attached.AttachedRun``."""

    @property
    def listener(self) -> int:
        """Descriptor of the listener; -1 after the end of the run."""

    @property
    def filters(self) -> int:
        """Number of seccomp(2) filters of a program that installed none."""

    def is_last(self, call: NotifiedCall) -> bool:
        """Return True if no other supervisor must see the call."""

    def restarted(self, call: NotifiedCall) -> None:
        """Note that the call was answered by ``listener``, and is made again."""

    def add_fd(self, call: NotifiedCall, fd: int, *, number: int | None = None) -> int:
        """Copy a descriptor into the process that waits."""

    def answer(self, call: NotifiedCall, answer: Answer) -> bool:
        """Let the call return."""


class AddressSpace:
    """Memory of one process. ``is_gone``: ended, with agent and userfaultfd."""

    def __init__(self, agent: ProcessAgent, uffd: Userfaultfd) -> None:
        self.agent = agent
        self.uffd = uffd
        self.outside = Userfaultfd()
        """Userfaultfd of the mappings outside the zone; closed while the space has none."""
        self.is_gone = False
        self.fork_turn = trio.Lock()
        self.next_agent: ProcessAgent | None = None
        """Agent of the child, while a fork is under way."""
        self.child: AddressSpace | None = None
        """Child of the fork under way, once its event was read."""
        self.process = -1
        """pidfd of the process."""

    @property
    def tgid(self) -> int:
        """Process id; 0 for the child of a fork that is not complete yet."""
        return self.agent.tgid


class Watcher(Protocol):
    """Decides faults. Every method is called in the trio thread, and must not wait."""

    def on_events(self, space: AddressSpace, events: Sequence[Event]) -> bool:
        """Take events of the userfaultfd, in order; no ``Forked`` is among them. Return True if all are
        answered already.
        """

    def on_forked(self, parent: AddressSpace, child: AddressSpace) -> None:
        """Copy what is known of ``parent``: ``child`` has the same mappings, in place of any event before
        this call and none after. The agent of ``child`` may be used from now on; batches wait until the agent
        is made.
        """

    def on_gone(self, space: AddressSpace) -> None:
        """Forget the space: its process has ended or runs another program."""
