"""The files of a device and its failures in the kernel's /sys, kept under ``DEVICE/sysfs``.

``memory_failure/{total,ignored,failed,delayed,recovered}``: as /sys/devices/system/node/node0/memory_failure.
``badblocks``: as /sys/block/pmem0/badblocks, where the kernel, too, shows no more than one page.

The code that changes a value writes the file. An error of the write is ignored: a failure must be handled
even if the host filesystem is full.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from contextlib import suppress

from daxemu.errors import NoSpace
from daxemu.events import Outcome
from daxemu.pmem.badblocks import Badblocks
from daxemu.private_path import PrivatePath
from daxemu.uapi import PAGE_SIZE


class Sysfs:
    """The files of one device. All counters count from the start of the machine, as from a boot."""

    def __init__(self, directory: PrivatePath) -> None:
        """Create the files anew, all counters 0. Raises NoSpace."""
        self._shown: dict[str, bytes] = {}
        self._files: dict[str, int] = {}
        try:
            directory.rmtree()
            (directory / "memory_failure").mkdir()
            for name in ("total", *(outcome.value.lower() for outcome in Outcome)):
                self._open(directory, f"memory_failure/{name}", b"0\n")
            self._open(directory, "badblocks", b"")
        except OSError as error:
            self.close()
            raise NoSpace(f"{directory}: {error.strerror}; make room there") from error

    def _open(self, directory: PrivatePath, name: str, text: bytes) -> None:
        self._files[name] = (directory / name).make(os.O_RDWR)
        os.write(self._files[name], text)
        self._shown[name] = text

    def close(self) -> None:
        """Close the files. The files stay, with the last values."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def show_counters(self, counters: Mapping[Outcome, int]) -> None:
        """``update_per_node_mf_stats()``: write the counters."""
        for outcome, count in counters.items():
            self._show(f"memory_failure/{outcome.value.lower()}", b"%d\n" % count)
        self._show("memory_failure/total", b"%d\n" % sum(counters.values()))

    def show_badblocks(self, badblocks: Badblocks) -> None:
        """``badblocks_show()``: write as many whole lines as one page holds."""
        text = b""
        for sectors in itertools.islice(badblocks, PAGE_SIZE // len(b"0 1\n")):
            line = b"%d %d\n" % (sectors.start, sectors.length)
            if len(text) + len(line) > PAGE_SIZE:
                break
            text += line
        self._show("badblocks", text)

    def _show(self, name: str, text: bytes) -> None:
        if name not in self._files or self._shown[name] == text:
            return
        with suppress(OSError):
            os.pwrite(self._files[name], text, 0)
            if len(text) < len(self._shown[name]):
                os.ftruncate(self._files[name], len(text))
            self._shown[name] = text
