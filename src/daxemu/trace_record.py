"""Records of a trace: operations of programs, and the steps of each failure. See supervisor/trace.py."""

from __future__ import annotations

import msgspec

from daxemu.fields import FileOffset, Ino, Length, Pages, Pfn, Pid, Seconds, Tid, Time


class OperationTrace(msgspec.Struct, tag_field="type", tag="operation", gc=False):
    """An operation of a program. ``time``: its beginning. ``seconds``: the time of its service, without the
    way through the kernel. ``path`` is null for a file without a name. ``offset`` and ``length``: bytes, 0 if
    the operation has no range. ``errno``: 0 for success.
    """

    time: Time
    seconds: Seconds
    op: str
    path: str | None
    ino: Ino | None
    offset: FileOffset
    length: Length
    pid: Pid
    tid: Tid
    comm: str
    errno: int


class StepTrace(msgspec.Struct, tag_field="type", tag="step", gc=False):
    """A step of a failure: memory_failure, collect, revoke, repair, signal. ``failure``: number of the
    failure; the step ``memory_failure`` encloses the others of the number. ``what``: the result in words.
    """

    time: Time
    seconds: Seconds
    failure: int
    step: str
    pfn: Pfn
    nr_pages: Pages
    what: str = ""


class TraceLost(msgspec.Struct, tag_field="type", tag="lost", gc=False):
    """``count`` records were lost here: the reader was too slow."""

    time: Time
    count: int


TraceRecord = OperationTrace | StepTrace | TraceLost
