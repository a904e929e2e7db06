"""evaluate: repair strategies compared on the same faults."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from daxemu.cli.common import emit, json_option
from daxemu.errors import DaxemuError
from daxemu.sizes import counted

if TYPE_CHECKING:
    from daxemu.evaluate.scheduler import Scheduler
    from daxemu.evaluate.trial import Result

INTERRUPTED = 130


@click.command()
@click.argument("plan", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="PLAN.toml")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="REPORT.html; .json, .csv beside it.",
)
@click.option(
    "-j", "--jobs", type=click.IntRange(1), help="Trials at a time; half the processors if not given."
)
@click.option("--scheduler", metavar="ADDRESS", help="Make the trials on this Dask cluster.")
@json_option
def evaluate(plan: Path, output: Path, jobs: int | None, scheduler: str | None, as_json: bool) -> None:
    """Compare strategies: every strategy of PLAN on every workload under the same faults, each trial on a
    fresh machine, and a report of it.

    Ctrl-C keeps the trials that are done; the same command goes on from there.

    \b
    Example:
      daxemu evaluate examples/compare_strategies.toml -o report.html
    """
    from daxemu.evaluate.campaign import Campaign, Outputs
    from daxemu.evaluate.plan import load
    from daxemu.evaluate.report import write_reports
    from daxemu.evaluate.scheduler import DaskScheduler, LocalScheduler, default_jobs

    loaded = load(plan)
    outputs = Outputs(output)
    with Campaign(loaded, plan.read_text(), outputs.trials) as campaign:
        left = campaign.left()
        if left:
            made: Scheduler = (
                DaskScheduler(scheduler)
                if scheduler
                else LocalScheduler(min(jobs or default_jobs(), len(left)))
            )
            try:
                with _interruptible(), _progress(len(left)) as done:
                    campaign.run(made, done)
            except KeyboardInterrupt:
                kept = counted(len(campaign.good()), "trial")
                click.echo(
                    f"daxemu: stopped; {kept} kept in {outputs.trials}: the same command goes on",
                    err=True,
                )
                sys.exit(INTERRUPTED)
        good, failed = campaign.good(), campaign.failed()
        if not good:
            raise DaxemuError(f"no trial succeeded: {failed[0].key}: {failed[0].failed}")
        write_reports(loaded, good, failed, outputs)
    for result in failed:
        click.echo(f"daxemu: no result: {result.key}: {result.failed}", err=True)
    emit(
        {"report": str(outputs.html), "trials": len(good), "failed": len(failed)},
        as_json,
        f"{outputs.html}: {counted(len(good), 'trial')}"
        + (f", {len(failed)} failed: the same command tries them again" if failed else ""),
    )
    if failed:
        sys.exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is Ctrl-C; a second one of either does not cut short what the first began."""

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
def _progress(total: int) -> Iterator[Callable[[Result], None]]:
    """A bar with the time left on a terminal; elsewhere a line a trial. On stderr."""
    if not sys.stderr.isatty():
        count = 0

        def say(result: Result) -> None:
            nonlocal count
            count += 1
            failed = f": {result.failed}" if result.failed else f", {result.wall:.1f} s"
            click.echo(f"{count}/{total} {result.key}{failed}", err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("trials", total=total)

        def advance(result: Result) -> None:
            progress.update(bar, advance=1, description=str(result.key))

        yield advance
