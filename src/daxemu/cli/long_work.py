"""Shared by verbs with a run time of minutes: progress, and interruption."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from daxemu.cli.output import complain, for_people

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
Done = Callable[[str, str], None]
"""Called after each finished part, with its name and its result."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM, as for Ctrl-C. A second signal of either kind is ignored, so that
    the cleanup after the first signal completes.
    """

    def interrupt(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def progress(total: int, what: str) -> Iterator[Done]:
    """Show progress on stderr: on a terminal a bar with the time left, elsewhere one line for each part."""
    if not sys.stderr.isatty():
        count = 0

        def say(name: str, how: str) -> None:
            nonlocal count
            count += 1
            complain(f"{count}/{total} {name}{how}")

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as shown:
        bar = shown.add_task(what, total=total)

        def advance(name: str, how: str) -> None:
            shown.update(bar, advance=1, description=for_people(name))

        yield advance
