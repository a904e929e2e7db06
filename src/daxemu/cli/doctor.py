"""doctor: what this machine lacks, and how to mend it."""

from __future__ import annotations

import click

from daxemu.cli.common import json_option
from daxemu.cli.output import say, say_json
from daxemu.client import Client
from daxemu.errors import Unsupported
from daxemu.host.checkup import Finding, check_up
from daxemu.host.proc.mountinfo import Mount

PATIENCE = 5.0
"""Seconds that each supervisor has to answer."""
_COLORS = {"ok": "green", "worse": "yellow", "missing": "red"}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what daxemu needs of this machine, and say how to mend what is missing. Changes nothing.

    Exit status 8 if nothing can be mounted here; what only works worse is no failure.

    \b
    Example:
      daxemu doctor
    """
    findings = list(check_up(_ask))
    if as_json:
        say_json({"findings": [finding._asdict() for finding in findings]})
    else:
        for finding in findings:
            _show(finding)
    missing = [finding.subject for finding in findings if finding.verdict == "missing"]
    if missing:
        raise Unsupported(f"nothing can be mounted here before this is mended: {', '.join(missing)}")


def _ask(mount: Mount) -> None:
    with Client(mount, patience=PATIENCE) as client:
        client.request("status")


def _show(finding: Finding) -> None:
    say(f"{finding.verdict:8}", fg=_COLORS[finding.verdict], end="")
    say(f"{finding.subject}: {finding.found}")
    if finding.mend:
        say(f"{'':8}mend: {finding.mend}")
