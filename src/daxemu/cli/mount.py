"""mount, umount, status, set: verbs for the mount as a whole."""

from __future__ import annotations

import json
import logging
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from daxemu.cli.common import DEVICE, absolute_strategy, as_owner_option, emit, human, json_option
from daxemu.cli.progress import choose, describe, line
from daxemu.client import Client
from daxemu.errors import Busy, InvalidArgument, NotMounted, PermissionDenied
from daxemu.host.device_lock import PATIENCE, wait_for_last_mount
from daxemu.host.mountinfo import Mount, mount_at, mounts
from daxemu.pmem.device_dir import DeviceDir
from daxemu.supervisor import settings as limits
from daxemu.supervisor.settings import LOG_SIZE, MountOptions, seconds

Value = TypeVar("Value")

STATUS_PATIENCE = 5.0
"""Seconds that one of several supervisors has to answer: none must keep the others from being shown."""


@click.command()
@click.argument("device", type=DEVICE)
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--foreground", is_flag=True, help="Stay and serve until unmounted; Ctrl-C unmounts.")
@click.option(
    "--repair",
    default="none",
    show_default=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="What is done about data that goes bad: see daxemu repair --help.",
)
@click.option(
    "--scrub-interval",
    metavar="SECONDS",
    default="0",
    help="Look for latent poison every so often, as set scrub_interval does. 0, the default: never.",
)
@click.option(
    "--log-size",
    metavar="SIZE",
    default=human(LOG_SIZE),
    show_default=True,
    help="Bytes that events.jsonl, and supervisor.log, may have, as set log_size does.",
)
@click.option(
    "--layouts/--no-layouts",
    default=True,
    envvar="DAXEMU_LAYOUTS",
    help="Answer reads and writes of healthy bytes in C, or all of them in Python: slower, same answers.",
)
@as_owner_option
@json_option
def mount(
    device: Path,
    mountpoint: Path,
    foreground: bool,
    repair: str,
    scrub_interval: str,
    log_size: str,
    layouts: bool,
    as_json: bool,
) -> None:
    """Mount DEVICE on MOUNTPOINT. Returns when the mount is usable; a supervisor serves it in the background.

    \b
    Example:
      daxemu mount /dev/shm/pmem0 /tmp/pmem
    """
    mountpoint = mountpoint.absolute()
    options = MountOptions(
        absolute_strategy(repair),
        _option("--scrub-interval", seconds, scrub_interval),
        layouts,
        _option("--log-size", limits.log_size, log_size),
    )
    DeviceDir.load(device).close()
    wait_for_last_mount(device)

    def say(pid: int) -> None:
        emit(
            {"device": str(device), "mountpoint": str(mountpoint), "pid": pid},
            as_json,
            f"{device} is mounted on {mountpoint} (supervisor {pid})",
        )

    if foreground:
        from daxemu.supervisor.log_handler import RatelimitedHandler
        from daxemu.supervisor.run import supervise

        logging.basicConfig(
            level=logging.WARNING, format="daxemu: %(message)s", handlers=[RatelimitedHandler()]
        )
        supervise(device, mountpoint, lambda: say(os.getpid()), options)
        return
    from daxemu.host.session import check_mountpoint
    from daxemu.supervisor.spawn import spawn

    check_mountpoint(mountpoint)
    with line(repair) as show:
        pid = spawn(device, mountpoint, options, show)
    say(pid)


def _option(name: str, read: Callable[[str], Value], text: str) -> Value:
    try:
        return read(text)
    except InvalidArgument as error:
        raise InvalidArgument(f"{name} {text}: {error}") from error


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Although files are open, or the supervisor is dead or hangs.")
@json_option
def umount(mountpoint: Path, force: bool, as_json: bool) -> None:
    """Unmount, and wait until everything is on the device.

    \b
    Example:
      daxemu umount /tmp/pmem
    """
    found = mount_at(Path(os.path.abspath(mountpoint)))
    if found is None:
        raise NotMounted(f"{mountpoint} is not a daxemu mountpoint: see daxemu status")
    try:
        _ask_to_end(found, "unmount", force=force)
    except NotMounted:
        _clear_away(found)
    except Busy:
        if not force:
            raise
        _clear_away(found)
    emit({"mountpoint": str(mountpoint), "device": str(found.device)}, as_json, f"{mountpoint} is unmounted")


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@json_option
def powerfail(mountpoint: Path, as_json: bool) -> None:
    """Lose power: every page-cache page and every store that was not synced is gone, and so is the mount.

    What fsync had promised is there at the next mount; nothing else is promised. sync(1), sync -f and
    syncfs(2) promise nothing here: the kernel does not forward them to FUSE. The command counts the changed
    inodes and names that were dropped, without stores through mappings, of which only the kernel knew.

    \b
    Example:
      daxemu powerfail /tmp/pmem
    """
    found = mount_at(Path(os.path.abspath(mountpoint)))
    if found is None:
        raise NotMounted(f"{mountpoint} is not a daxemu mountpoint: see daxemu status")
    answer = _ask_to_end(found, "powerfail")
    text = f"{mountpoint} lost power"
    if answer.get("dropped"):
        plural = "s" if answer["dropped"] > 1 else ""
        age = f", the oldest {answer['oldest']:.1f} s old" if answer["oldest"] is not None else ""
        text += f"; dropped {answer['dropped']} change{plural}{age}"
    emit({"mountpoint": str(mountpoint), "device": str(found.device), **answer}, as_json, text)


def _ask_to_end(found: Mount, op: str, **arguments: bool) -> dict[str, Any]:
    with Client(found, patience=PATIENCE) as client:
        pid = client.request("status")["pid"]
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return {}
        try:
            answer = client.request(op, **arguments)
            ended, _, _ = select.select([process], [], [], PATIENCE)
            if not ended:
                raise Busy(f"the supervisor (pid {pid}) does not end: see {found.device}/supervisor.log")
            return answer
        finally:
            os.close(process)


def _clear_away(found: Mount) -> None:
    """Nobody serves the mount any more; whoever waits for an answer is let go."""
    from daxemu.host.session import Session, abort_connection

    abort_connection(found)
    still = mount_at(found.mountpoint)
    if still is not None:
        Session(-1, still).detach()
    if mount_at(found.mountpoint) is not None:
        raise Busy(f"{found.mountpoint} cannot be unmounted: try as root: umount -l {found.mountpoint}")


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@json_option
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show one mount, or all of them.

    \b
    Example:
      daxemu status /tmp/pmem --json
    """
    if mountpoint is not None:
        with Client.at(mountpoint) as client:
            report = client.request("status")
        emit(report, as_json, lambda: _describe(report))
        return
    reports = []
    for found in mounts():
        try:
            with Client(found, patience=STATUS_PATIENCE) as client:
                reports.append(client.request("status"))
        except (NotMounted, Busy, PermissionDenied) as error:
            dead = {
                "device": str(found.device),
                "mountpoint": str(found.mountpoint),
                "state": "not ours" if isinstance(error, PermissionDenied) else "dead",
                "reason": str(error),
            }
            reports.append(dead)
    if as_json:
        click.echo(json.dumps(reports))
    elif not reports:
        click.echo("no daxemu mounts")
    else:
        click.echo("\n\n".join(_describe(report) for report in reports))


def _describe(report: dict[str, Any]) -> str:
    state = report["state"] + (f": {report['reason']}" if report.get("reason") else "")
    lines = [f"{report['mountpoint']}  ({report['device']})  {state}"]
    if "size" in report:
        used = (report["blocks"] - report["free_blocks"]) * 4096
        counters = ", ".join(f"{count} {name}" for name, count in report["counters"].items())
        settings = " ".join(f"{name}={value}" for name, value in report["settings"].items())
        lines += [
            f"  size        {human(report['size'])}, {human(used)} used, first pfn {report['base_pfn']:#x}",
            "  files       {inodes} inodes, {extents} extents, {open_files} open".format_map(report),
            "  poison      {poisoned_sectors} sectors, {badblocks} of them known (badblocks), "
            "{scrubs} background scrubs".format_map({"scrubs": 0, **report}),
            f"  failures    {counters}",
            f"  settings    {settings}",
            f"  repair      {_describe_repair(report.get('repair'))}",
            f"  supervisor  pid {report['pid']}, {report['events']} events, tracer {report['tracer']}",
            f"  supplement  {report['supplement']}, layouts {report.get('layouts', 'off')}",
        ]
    return "\n".join(lines)


def _describe_repair(repair: dict[str, Any] | None) -> str:
    if repair is None:
        return "none"  # as said by a supervisor of an earlier version
    if repair["broken"]:
        return f"{repair['strategy']}, which failed: {repair['broken']}"
    if progress := repair.get("progress"):
        return f"{repair['strategy']}: begins, {describe(**progress)}"
    counts = ", ".join(f"{repair[word]} {word}" for word in ("recovered", "lost", "cannot", "failed"))
    return f"{repair['strategy']}: {counts}; {human(repair['space_bytes'])} kept for it"


@click.command(name="set")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.argument("settings", nargs=-1, required=True, metavar="NAME=VALUE...")
@json_option
def set_setting(mountpoint: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Change settings of a mount, as sysctl would.

    \b
    early_kill=0|1         tell processes of poison they map at once (vm.memory_failure_early_kill)
    log_size=SIZE          bytes that events.jsonl, and supervisor.log, may have; 1M to 1T
    lost_store=silent|eio  what fsync says of a mapped store lost to poison: nothing (DAX), or EIO once
    repair=NAME[:...]      what is done about data that goes bad: see daxemu repair --help
    scrub_interval=SECONDS look for latent poison in the background, as daxemu scrub does; 0: never

    \b
    Example:
      daxemu set /tmp/pmem early_kill=1
    """
    pairs = [setting.partition("=") for setting in settings]
    for name, equals, _ in pairs:
        if not equals:
            raise InvalidArgument(f"{name!r}: give NAME=VALUE, such as early_kill=1")
    wanted = {name: absolute_strategy(value) if name == "repair" else value for name, _, value in pairs}
    with Client.at(mountpoint) as client:
        choose(client, wanted.get("repair"), "set", settings=wanted)
    emit(wanted, as_json, "")
