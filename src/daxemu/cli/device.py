"""mkfs and fsck: verbs for an unmounted DEVICE."""

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
    "--size",
    type=SIZE,
    required=True,
    help="Size of the media, such as 6T. The media is a sparse file: only used bytes take memory.",
)
@click.option(
    "--base-pfn",
    default=hex(DEFAULT_BASE_PFN),
    show_default=True,
    help="Page frame number of the first page.",
)
@click.option(
    "--altmap",
    is_flag=True,
    help="Reserve room for the struct pages on the device itself (ndctl --map=dev).",
)
@click.option(
    "--no-struct-pages",
    "pageless",
    is_flag=True,
    help="Memory without struct pages: a pfn_address_space, as memory of an accelerator has.",
)
@click.option(
    "--align",
    type=SIZE,
    default="4K",
    show_default=True,
    help="Alignment of extents. 2M places files so that 2 MiB pages can map them.",
)
@click.option(
    "--mode",
    metavar="OCTAL",
    default="0700",
    show_default=True,
    help="Mode of the directory. 0755 lets every user read every byte of every file on the mount.",
)
@click.option("--force", is_flag=True, help="Replace an existing, unmounted device; all its data is lost.")
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

    DEVICE is a new directory, best on a tmpfs such as /dev/shm.

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
    help="Rewrite each bad copy of a metadata page from its other copy; upgrade metadata of format 2.",
)
@as_owner_option
@json_option
def fsck(device: Path, repair: bool, as_json: bool) -> None:
    """Check the filesystem of an unmounted DEVICE. Exit status 9 if problems are left.

    Without --repair, nothing on the device changes.

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
    changes = [f"rewrote {report.healed} metadata pages from their other copy"] if report.healed else []
    if report.upgraded:
        changes.append("upgraded the metadata to the current format, with checksums")
    emit(
        {"device": device, **asdict(report)},
        as_json,
        [*changes, *report.wrong, *report.damaged, summary],
    )
    if report.wrong:
        raise CorruptMetadata(f"{device}: {len(report.wrong)} problems{_hint(report, repair=repair)}")


def _hint(report: Report, *, repair: bool) -> str:
    """Return the end of the error line: the action for the problems found, or left by a repair."""
    by_hand = "save what can be read, then mkfs --force"
    if repair:
        return f" are left: {by_hand}"
    if report.mendable == len(report.wrong):
        return "; try fsck --repair"
    if report.mendable:
        return f"; fsck --repair fixes {report.mendable} of them, for the rest {by_hand}"
    return f", which fsck --repair cannot fix: {by_hand}"
