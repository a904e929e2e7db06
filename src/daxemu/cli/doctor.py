"""doctor: the missing requirements of daxemu on a machine, and the fix for each."""

from __future__ import annotations

import click

from daxemu.cli.common import json_option
from daxemu.cli.output import say, say_json
from daxemu.client import Client
from daxemu.errors import Unsupported
from daxemu.host.checkup import Finding, check_up
from daxemu.host.proc.mountinfo import Mount

PATIENCE = 5.0
"""Limit in seconds for the answer of each supervisor."""
_COLORS = {"ok": "green", "worse": "yellow", "missing": "red"}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check the requirements of daxemu on this machine, and print a fix for each missing requirement. Changes
    nothing.

    Exit status 8 if no mount is possible. A requirement without which daxemu only works worse
    does not change the exit status.

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
        raise Unsupported(f"no mount is possible on this machine: fix first: {', '.join(missing)}")


def _ask(mount: Mount) -> None:
    with Client(mount, patience=PATIENCE) as client:
        client.request("status")


def _show(finding: Finding) -> None:
    say(f"{finding.verdict:8}", fg=_COLORS[finding.verdict], end="")
    say(f"{finding.subject}: {finding.found}")
    if finding.mend:
        say(f"{'':8}fix: {finding.mend}")
