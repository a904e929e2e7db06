"""evaluate: repair strategies compared on the same faults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from daxemu.cli.common import WholeRange, emit, json_option
from daxemu.cli.long_work import INTERRUPTED, interruptible, progress
from daxemu.cli.output import complain
from daxemu.errors import DaxemuError
from daxemu.sizes import counted

if TYPE_CHECKING:
    from daxemu.evaluate.scheduler import Scheduler
    from daxemu.evaluate.trial import Result


@click.command()
@click.argument("plan", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="PLAN.toml")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The report, REPORT.html; REPORT.json and REPORT.csv are written beside it.",
)
@click.option(
    "-j",
    "--jobs",
    type=WholeRange(1),
    help="NumberRange of trials at a time. Default: half the number of processors.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Run the trials on this Dask cluster.")
@json_option
def evaluate(plan: Path, output: Path, jobs: int | None, scheduler: str | None, as_json: bool) -> None:
    """Compare repair strategies. Runs every strategy of PLAN on every workload under the same faults, each
    trial on a fresh mount, and writes a report.

    Ctrl-C keeps the finished trials; the same command continues with the rest.

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
                with interruptible(), progress(len(left), "trials") as done:
                    campaign.run(made, lambda result: done(str(result.key), _how(result)))
            except KeyboardInterrupt:
                kept = counted(len(campaign.good()), "trial")
                complain(f"daxemu: stopped; {kept} kept in {outputs.trials}: the same command continues")
                sys.exit(INTERRUPTED)
        good, failed = campaign.good(), campaign.failed()
        if not good:
            raise DaxemuError(f"no trial succeeded: {failed[0].key}: {failed[0].failed}")
        write_reports(loaded, good, failed, outputs)
    for result in failed:
        complain(f"daxemu: no result: {result.key}: {result.failed}")
    emit(
        {"report": str(outputs.html), "trials": len(good), "failed": len(failed)},
        as_json,
        f"{outputs.html}: {counted(len(good), 'trial')}"
        + (f", {len(failed)} failed: the same command tries them again" if failed else ""),
    )
    if failed:
        sys.exit(1)


def _how(result: Result) -> str:
    return f": {result.failed}" if result.failed else f", {result.wall:.1f} s"
