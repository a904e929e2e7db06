"""mkfs and fsck: verbs for a DEVICE that is not mounted."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from daxemu.cli.common import DEVICE, SIZE, as_owner_option, emit, human, json_option
from daxemu.errors import CorruptMetadata
from daxemu.host.proc.device_lock import wait_for_last_mount
from daxemu.pmem.device_dir import DEFAULT_BASE_PFN, DeviceConfig, DeviceDir, altmap_bytes

if TYPE_CHECKING:
    from daxemu.fs.offline import Report


@click.command()
@click.argument("device", type=DEVICE)
@click.option(
    "--size", type=SIZE, required=True, help="Of the media, such as 6T; a sparse file takes what is used."
)
@click.option(
    "--base-pfn",
    default=hex(DEFAULT_BASE_PFN),
    show_default=True,
    help="Page frame number of its first page.",
)
@click.option(
    "--altmap", is_flag=True, help="Reserve room for the struct pages on the device itself (as --map=dev)."
)
@click.option(
    "--no-struct-pages",
    "pageless",
    is_flag=True,
    help="Memory that the kernel has no struct pages for: a pfn_address_space (as an accelerator's).",
)
@click.option(
    "--align",
    type=SIZE,
    default="4K",
    show_default=True,
    help="Of extents: 2M places files so that they can be mapped by 2 MiB pages.",
)
@click.option(
    "--mode",
    metavar="OCTAL",
    default="0700",
    show_default=True,
    help="Of the directory. 0755 lets every user read every byte of every file on the mount.",
)
@click.option("--force", is_flag=True, help="Replace an unmounted device that is there; all on it is lost.")
@as_owner_option
@json_option
def mkfs(
    device: Path,
    size: int,
    base_pfn: str,
    altmap: bool,
    pageless: bool,
    align: int,
    mode: str,
    force: bool,
    as_json: bool,
) -> None:
    """Make a new device with an empty filesystem.

    DEVICE is a directory to make, best on a tmpfs such as /dev/shm.

    \b
    Example:
      daxemu mkfs /dev/shm/pmem0 --size 6T
    """
    try:
        pfn = int(base_pfn, 0)
    except ValueError as error:
        raise click.BadParameter(
            f"{base_pfn!r} is not a page frame number", param_hint="--base-pfn"
        ) from error
    if not re.fullmatch("0?[0-7]{3}", mode):
        raise click.BadParameter(f"{mode!r} is not an octal mode such as 0700", param_hint="--mode")
    config = DeviceConfig(size=size, base_pfn=pfn, align=align, struct_pages=not pageless, mode=int(mode, 8))
    config.validate()
    if altmap:
        config = replace(config, altmap=altmap_bytes(size, align))
    path = device
    wait_for_last_mount(path)
    DeviceDir.create(path, config, force=force)
    last = config.base_pfn + config.size // 4096 - 1
    emit(
        {
            "device": path,
            "size": size,
            "base_pfn": pfn,
            "altmap": config.altmap,
            "align": align,
            "struct_pages": config.struct_pages,
            "mode": f"{config.mode:04o}",
        },
        as_json,
        f"{path}: {human(size)}, pfns {pfn:#x}-{last:#x}"
        + (f", {human(config.altmap)} of them for struct pages" if altmap else "")
        + (", without struct pages" if pageless else ""),
    )


@click.command()
@click.argument("device", type=DEVICE)
@click.option(
    "--repair",
    is_flag=True,
    help="Rewrite bad copies of metadata pages from their other copy; upgrade metadata of format 2.",
)
@as_owner_option
@json_option
def fsck(device: Path, repair: bool, as_json: bool) -> None:
    """Check the filesystem of a DEVICE that is not mounted; exit status 9 if something is wrong.

    Without --repair nothing on the device is changed.

    \b
    Example:
      daxemu fsck /dev/shm/pmem0 --repair
    """
    from daxemu.fs.offline import check_device

    wait_for_last_mount(device)
    with DeviceDir.open(device) as directory:
        report = check_device(directory, repair=repair)
    counts = f"{len(report.wrong)} problems, {len(report.damaged)} damaged ranges"
    summary = f"{device}: {report.inodes} inodes, {counts}"
    healed = [f"healed {report.healed} metadata pages from their other copy"] if report.healed else []
    if report.upgraded:
        healed.append("upgraded the metadata to today's format, with checksums")
    emit(
        {"device": device, **asdict(report)},
        as_json,
        [*healed, *report.wrong, *report.damaged, summary],
    )
    if report.wrong:
        raise CorruptMetadata(f"{device}: {len(report.wrong)} problems{_hint(report, repair=repair)}")


def _hint(report: Report, *, repair: bool) -> str:
    """What to do about the problems that were found, or that a repair has left."""
    by_hand = "save what can be read, then mkfs --force"
    if repair:
        return f" are left: {by_hand}"
    if report.mendable == len(report.wrong):
        return "; try fsck --repair"
    if report.mendable:
        return f"; fsck --repair mends {report.mendable} of them, for the rest {by_hand}"
    return f", which no repair can mend: {by_hand}"
