"""State of a running supervisor, to see why a program waits: SIGUSR1, ``daxemu status --internals``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import trio

from daxemu.fs.filesystem import Filesystem
from daxemu.host.mappings import Mappings
from daxemu.host.tracer.link import TracerLink
from daxemu.internals_report import InternalsReport
from daxemu.supervisor.failures import Failures

log = logging.getLogger(__name__)

MOST = 1000
"""Most entries of one list: the report is made within one step of the event loop."""


def internals(fs: Filesystem, mappings: Mappings, failures: Failures, tracer: TracerLink) -> InternalsReport:
    """Return the state at this moment. Precondition: called in the trio thread."""
    return InternalsReport(
        tasks=_limited(_tasks()),
        turns=_limited(failures.describe_turns()),
        held=_limited(mappings.describe_held()),
        armed=_limited(tracer.describe_waiting()),
        layouts=fs.layouts.count,
    )


def log_internals(report: InternalsReport) -> None:
    """Write a report to supervisor.log as one message, because messages are rate limited."""
    log.warning("internals:", extra={"details": "\n".join(report.lines())})


def _limited(entries: Iterator[str]) -> list[str]:
    kept = [entry for _, entry in zip(range(MOST), entries, strict=False)]
    if next(entries, None) is not None:
        kept.append(f"(more than {MOST})")
    return kept


def _tasks() -> Iterator[str]:
    """Yield a line for each task, indented below its parent, with the place where the task waits."""
    root = trio.lowlevel.current_root_task()
    stack = [(0, root)] if root is not None else []
    while stack:
        depth, task = stack.pop()
        yield f"{'  ' * depth}{task.name} at {_place(task)}"
        children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        stack += [(depth + 1, child) for child in reversed(children)]


def _place(task: trio.lowlevel.Task) -> str:
    """Return FILE:LINE of the innermost frame of daxemu in which a task waits, or else of the innermost."""
    frames = [(frame.f_code.co_filename, number) for frame, number in task.iter_await_frames()]
    own = [(name, number) for name, number in frames if "daxemu" in Path(name).parts]
    name, number = (own or frames or [("(running)", 0)])[-1]
    return f"{Path(name).name}:{number}"
