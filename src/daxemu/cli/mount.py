"""mount, umount, status, set: verbs for the mount as a whole."""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from daxemu.cli.common import (
    DEVICE,
    PATH,
    absolute_strategy,
    as_owner_option,
    connect,
    emit,
    human,
    json_option,
)
from daxemu.cli.patience import PATIENCE as STATUS_PATIENCE
from daxemu.cli.patience import PatientClient
from daxemu.cli.progress import choose, describe, line
from daxemu.cli.rules import RuleOptions, add_rule, rule_options
from daxemu.client import Client
from daxemu.client.connection import no_answer, state_of
from daxemu.errors import Busy, DaxemuError, InvalidArgument, NotASupervisor, NotMounted, PermissionDenied
from daxemu.host.deadline import Deadline
from daxemu.host.descriptors import check_limit
from daxemu.host.direct_needs import check_direct
from daxemu.host.proc.device_lock import PATIENCE, end_holder, wait_for_last_mount
from daxemu.host.proc.mountinfo import Mount, mount_at, mounts
from daxemu.host.proc.pins import Pin, copies, named, pins_of, pins_of_device
from daxemu.internals_report import InternalsReport
from daxemu.pmem.device_dir import DeviceDir
from daxemu.rule import PowerFailAction
from daxemu.supervisor import settings as limits
from daxemu.supervisor.settings import LOG_SIZE, MountOptions, seconds
from daxemu.text import name_text

Value = TypeVar("Value")

FORCE_PATIENCE = 10.0
"""Maximum duration of ``umount --force`` in seconds."""
CUT_PATIENCE, KILL_PATIENCE = 4.0, 1.5
"""Seconds left of FORCE at which ``umount --force`` cuts the mount and sends SIGTERM, and at which it sends
SIGKILL.
"""


@click.command()
@click.argument("device", type=DEVICE)
@click.argument("mountpoint", type=PATH)
@click.option("--foreground", is_flag=True, help="Serve in this process until unmounted; Ctrl-C unmounts.")
@click.option(
    "--repair",
    default="none",
    show_default=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="Repair strategy for data that fails: see daxemu repair --help.",
)
@click.option(
    "--scrub-interval",
    metavar="SECONDS",
    default="0",
    help="Seconds between background scrubs, as set scrub_interval does. 0, the default: no scrub.",
)
@click.option(
    "--log-size",
    metavar="SIZE",
    default=human(LOG_SIZE),
    show_default=True,
    help="Limit in bytes of events.jsonl, and of supervisor.log, as set log_size does.",
)
@click.option(
    "--layouts/--no-layouts",
    default=True,
    envvar="DAXEMU_LAYOUTS",
    help="Answer reads and writes of healthy bytes in C, or all in Python: slower, same answers.",
)
@click.option(
    "--direct",
    is_flag=True,
    help="Have programs under daxemu run map the media itself, as on DAX; elsewhere MAP_SHARED is ENODEV. "
    "Needs root, with CAP_SYS_PTRACE.",
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
    direct: bool,
    as_json: bool,
) -> None:
    """Mount DEVICE on MOUNTPOINT. The command returns when the mount can be used; a supervisor serves the
    mount in the background.

    With --direct, programs under daxemu run MOUNTPOINT -- COMMAND map the media itself. Programs started
    elsewhere have read(2), write(2) and MAP_PRIVATE.

    \b
    Example:
      daxemu mount /dev/shm/pmem0 /tmp/pmem
      daxemu mount --direct /dev/shm/pmem0 /tmp/pmem
    """
    mountpoint = mountpoint.absolute()
    options = MountOptions(
        absolute_strategy(repair),
        _option("--scrub-interval", seconds, scrub_interval),
        layouts,
        _option("--log-size", limits.log_size, log_size),
        direct,
    )
    check_limit()
    if direct:
        check_direct()
    DeviceDir.load(device).close()
    wait_for_last_mount(device)

    def say(pid: int) -> None:
        emit(
            {"device": device, "mountpoint": mountpoint, "pid": pid},
            as_json,
            f"{device} is mounted on {mountpoint} (supervisor {pid})",
        )

    if foreground:
        from daxemu.supervisor.log_handler import log_to_stderr
        from daxemu.supervisor.run import supervise

        log_to_stderr("daxemu: %(message)s", logging.WARNING)
        supervise(device, mountpoint, lambda: say(os.getpid()), options)
        return
    from daxemu.host.fuse.session import check_mountpoint
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
@click.argument("mountpoint", type=PATH)
@click.option(
    "--force", is_flag=True, help="Unmount also if files are open, or the supervisor is dead or hangs."
)
@json_option
def umount(mountpoint: Path, force: bool, as_json: bool) -> None:
    """Unmount, and wait until all data is on the device.

    If only other mount namespaces still have the mount, give the DEVICE in place of the mountpoint. With
    --force the mount ends within 10 seconds, even if the supervisor is stopped.

    \b
    Example:
      daxemu umount /tmp/pmem
    """
    deadline = Deadline(FORCE_PATIENCE)
    found = mount_at(Path(os.path.abspath(mountpoint))) or _mounted_elsewhere(
        mountpoint, deadline, force=force
    )
    if found is None:
        raise NotMounted(f"{mountpoint} is not a daxemu mountpoint: see daxemu status")
    try:
        if force:
            _ask_to_end(found, "unmount", deadline, force=True)
        else:
            _ask_to_end(found, "unmount")
    except NotMounted:
        _clear_away(found, deadline if force else Deadline(FORCE_PATIENCE), end=force)
    except Busy:
        if not force:
            raise
        _clear_away(found, deadline, end=True)
    emit({"mountpoint": mountpoint, "device": found.device}, as_json, f"{mountpoint} is unmounted")


@click.command()
@click.argument("mountpoint", type=PATH)
@json_option
@rule_options
def powerfail(mountpoint: Path, as_json: bool, rule: RuleOptions | None) -> None:
    """Lose power. The page cache and each unsynced store are lost, and the mount ends.

    Data and names after an fsync(2) are present at the next mount; nothing else is certain. sync(1), sync -f
    and syncfs(2) make nothing durable: the kernel does not forward these to FUSE. The command prints the
    number of changed inodes and names that were lost. Stores through mappings are not counted: only the
    kernel knew the dirty pages. With --on, the power failure waits for an operation of a program.

    \b
    Example:
      daxemu powerfail /tmp/pmem
      daxemu powerfail /tmp/pmem --on 'fsync:*.wal:2' --after
    """
    found = mount_at(Path(os.path.abspath(mountpoint)))
    if found is None:
        raise NotMounted(f"{mountpoint} is not a daxemu mountpoint: see daxemu status")
    if rule is not None:
        with connect(mountpoint) as client:
            add_rule(client, rule, PowerFailAction(), as_json=as_json)
        return
    answer = _ask_to_end(found, "powerfail")
    text = f"{mountpoint} lost power"
    if answer.get("dropped"):
        plural = "s" if answer["dropped"] > 1 else ""
        age = f", the oldest {answer['oldest']:.1f} s old" if answer["oldest"] is not None else ""
        text += f"; dropped {answer['dropped']} change{plural}{age}"
    emit({"mountpoint": mountpoint, "device": found.device, **answer}, as_json, text)


def _mounted_elsewhere(device: Path, deadline: Deadline, *, force: bool) -> Mount | None:
    """Return the mount of a DEVICE that only other mount namespaces still have. Without ``force``, raise Busy
    with the names of these processes.
    """
    try:
        pins = deadline.run(lambda: pins_of_device(device))
    except TimeoutError as error:
        raise Busy("the mounts of all processes could not be read from /proc in time: try again") from error
    if pins and not force:
        raise Busy(f"{device} is mounted as {named(pins)}: end that process, or use --force")
    return pins[0].mount if pins else None


def _ask_to_end(found: Mount, op: str, deadline: Deadline | None = None, **arguments: bool) -> dict[str, Any]:
    """Have the supervisor end, and wait for its end. Raises Busy if the supervisor does not end. With
    ``deadline`` (of --force), Busy comes early enough to cut the mount, and at once if another mount
    namespace pins the mount.
    """

    def left() -> float:
        return STATUS_PATIENCE if deadline is None else deadline.left(CUT_PATIENCE)

    kind = PatientClient if deadline is None else Client
    with kind(found, patience=left()) as client:
        if deadline is not None and state_of(client.pid) in ("T", "t"):
            raise no_answer(found, client.pid)  # a stopped process does not answer, however long the wait
        pid = client.pid or client.request("status")["pid"]
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return {}
        try:
            client.set_patience(left())
            answer = client.request(op, **arguments)
            _wait_for_end(found, pid, process, deadline)
            return answer
        finally:
            os.close(process)


def _wait_for_end(found: Mount, pid: int, process: int, deadline: Deadline | None) -> None:
    """Wait for the end of a supervisor after its agreement to end. See _ask_to_end for the exceptions."""
    until = Deadline(PATIENCE) if deadline is None else deadline
    kept = 0.0 if deadline is None else CUT_PATIENCE
    pinned_since: float | None = None
    while not select.select([process], [], [], min(1.0, until.left(kept)))[0]:
        pinned_since = (pinned_since or time.monotonic()) if (pins := _pins(found, until, kept)) else None
        limit = STATUS_PATIENCE if deadline is None else 0.0
        if pinned_since is not None and time.monotonic() - pinned_since >= limit:
            raise Busy(f"{found.device} is still mounted as {named(pins)}: umount --force {found.device}")
        if not until.left(kept):
            raise Busy(f"the supervisor (pid {pid}) does not end: see {found.device}/supervisor.log")


def _pins(found: Mount, until: Deadline, kept: float) -> list[Pin]:
    """Return :func:`pins_of`; nothing if the time limit comes first."""
    with suppress(TimeoutError):
        return until.run(lambda: pins_of(found), kept)
    return []


def _clear_away(found: Mount, deadline: Deadline, *, end: bool) -> None:
    """Cut the connection of a mount whose supervisor does not answer, and unmount. With ``end``, end the
    supervisor too.
    """
    from daxemu.host.fuse.session import Session, abort_connection, is_same

    still = mount_at(found.mountpoint)
    try:
        deadline.run(lambda: abort_connection(found), KILL_PATIENCE)
        if still is not None and is_same(still, found):
            deadline.run(Session(-1, still).detach, KILL_PATIENCE)
        if end and not end_holder(found, deadline, KILL_PATIENCE):
            raise Busy(f"the supervisor that holds {found.device}/lock does not end: see {found.device}")
    except TimeoutError as error:
        raise Busy(
            f"{found.device}: the filesystem that holds the device, or the mountpoint, does not answer: "
            "end that filesystem first"
        ) from error
    left = mount_at(found.mountpoint)
    if left is not None and is_same(left, found):
        raise Busy(f"{found.mountpoint} cannot be unmounted: try as root: umount -l {found.mountpoint}")


_STATES: dict[type[DaxemuError], str] = {PermissionDenied: "not ours", NotASupervisor: "not a supervisor"}


@click.command()
@click.argument("mountpoint", type=PATH, required=False)
@click.option("--internals", is_flag=True, help="Show the supervisor's tasks and all waits, of one mount.")
@json_option
def status(mountpoint: Path | None, internals: bool, as_json: bool) -> None:
    """Show the state of one mount, or of all mounts. On SIGUSR1 a supervisor writes its --internals to
    supervisor.log.

    \b
    Example:
      daxemu status /tmp/pmem --json
    """
    if internals:
        if mountpoint is None:
            raise InvalidArgument("--internals needs one mount: daxemu status MOUNTPOINT --internals")
        with connect(mountpoint) as client:
            inside = client.request("internals")
        emit(inside, as_json, lambda: msgspec.convert(inside, InternalsReport).lines())
        return
    if mountpoint is not None:
        with connect(mountpoint) as client:
            report = client.request("status")
        emit(report, as_json, lambda: _describe(report))
        return
    reports = []
    for found in mounts():
        try:
            with PatientClient(found, patience=STATUS_PATIENCE) as client:
                reports.append(client.request("status"))
        except DaxemuError as error:
            dead = {
                "device": found.device,
                "mountpoint": found.mountpoint,
                "state": _STATES.get(type(error), "dead"),
                "reason": str(error),
            }
            reports.append(dead)
    reports += _elsewhere()
    emit(reports, as_json, lambda: _describe_all(reports) or "no daxemu mounts")


def _elsewhere() -> list[dict[str, Any]]:
    """Return the reports of mounts that only other mount namespaces have."""
    here = {found.dev for found in mounts()}
    pins = {pin.mount.dev: pin for pin in copies() if pin.mount.dev not in here}
    return [
        {
            "device": pin.mount.device,
            "mountpoint": pin.mount.mountpoint,
            "state": "elsewhere",
            "reason": f"only {named([pin])}: daxemu umount --force {name_text(pin.mount.device)}",
        }
        for pin in pins.values()
    ]


def _describe_all(reports: list[dict[str, Any]]) -> list[str]:
    lines = [line for report in reports for line in ("", *_describe(report))]
    return lines[1:]


_MODES = {
    "page cache": "of the kernel's page cache",
    "direct": "direct, of programs under daxemu run; elsewhere MAP_SHARED is ENODEV",
}


def _describe(report: dict[str, Any]) -> list[str]:
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
            f"  mappings    {_MODES[report.get('mode', 'page cache')]}",
            f"  supplement  {report['supplement']}, layouts {report.get('layouts', 'off')}",
        ]
    return lines


def _describe_repair(repair: dict[str, Any] | None) -> str:
    if repair is None:
        return "none"  # a supervisor of an earlier version reports no repair
    if repair["broken"]:
        return f"{repair['strategy']}, which failed: {repair['broken']}"
    if progress := repair.get("progress"):
        return f"{repair['strategy']}: begins, {describe(**progress)}"
    counts = ", ".join(f"{repair[word]} {word}" for word in ("recovered", "lost", "cannot", "failed"))
    return f"{repair['strategy']}: {counts}; {human(repair['space_bytes'])} kept for it"


@click.command(name="set")
@click.argument("mountpoint", type=PATH)
@click.argument("settings", nargs=-1, required=True, metavar="NAME=VALUE...")
@json_option
def set_setting(mountpoint: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Change settings of a mount, as sysctl(8) does.

    \b
    early_kill=0|1         1: signal processes that map poison at once (vm.memory_failure_early_kill)
    log_size=SIZE          limit in bytes of events.jsonl, and of supervisor.log; 1M to 1T
    lost_store=silent|eio  result of fsync after a mapped store was lost to poison: 0 (DAX), or EIO once
    repair=NAME[:...]      repair strategy for data that fails: see daxemu repair --help
    scrub_interval=SECONDS seconds between background scrubs for latent poison; 0: no scrub

    \b
    Example:
      daxemu set /tmp/pmem early_kill=1
    """
    pairs = [setting.partition("=") for setting in settings]
    for name, equals, _ in pairs:
        if not equals:
            raise InvalidArgument(f"{name!r}: give NAME=VALUE, such as early_kill=1")
    wanted = {name: absolute_strategy(value) if name == "repair" else value for name, _, value in pairs}
    with connect(mountpoint) as client:
        choose(client, wanted.get("repair"), "set", settings=wanted)
    emit(wanted, as_json, "")
