"""QEMU: a guest whose memory is a file on the mount."""

from __future__ import annotations

import re
import struct

from daxemu.apps.application import Application, Needs, Place, Spot, find_record, number_of
from daxemu.apps.process import Process
from daxemu.apps.records import COUNT, ReadBack, compare, text
from daxemu.apps.situations import Part

MEMORY = 64 << 20
AT = 16 << 20
"""Guest address of the records (drivers/guest.S)."""
WIDTH = 512
_SUM = re.compile(r"([0-9a-f]{8}) ([0-9a-f]{8})")


def _checksum(number: int) -> int:
    value = 0
    for word in struct.unpack(f"<{WIDTH // 4}I", text(number).encode().ljust(WIDTH, b"\0")):
        value = (value << 5 | value >> 27) + word & 0xFFFFFFFF
    return value


class Qemu(Application):
    """QEMU: the guest computes a checksum of each record, and prints all checksums on the serial port."""

    name = "qemu"
    note = (
        "QEMU sets early kill for itself (PR_MCE_KILL), so AO arrives whatever the sysctl is. Its signal "
        "handler is made for KVM; without KVM an AO signal fails an assertion."
    )
    about = (
        "QEMU (TCG), the guest's memory a memory-backend-file with share=on; the guest sums up its records"
    )
    needs = Needs(
        debian=("qemu-system-x86", "seabios"),
        programs=("qemu-system-x86_64", "gcc"),
        build=("gcc", "libc6-dev"),
    )

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        with open(place.root / "ram", "wb") as memory:
            memory.seek(AT)
            for number in range(COUNT):
                memory.write(text(number).encode().ljust(WIDTH, b"\0"))
            memory.truncate(MEMORY)

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        return find_record(number_of(part), [place.root / "ram"])

    def start(self, place: Place) -> Process:
        """See Application.start."""
        link = (
            "-Wl,-Ttext=0x7c00,--oformat=binary,--build-id=none,-e,_start",
            "-m32",
            "-nostdlib",
            "-static",
        )
        boot = place.compile("guest.S", options=link)
        backend = f"memory-backend-file,id=ram,size={MEMORY},mem-path={place.root / 'ram'},share=on"
        process = place.start(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-machine", "pc,memory-backend=ram"),
                *("-m", f"{MEMORY >> 20}M", "-object", backend, "-nodefaults", "-display", "none"),
                *("-serial", "stdio", "-boot", "a"),
                *("-drive", f"file={boot},format=raw,if=floppy,readonly=on"),
            ]
        )
        process.until("ready")
        return process

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read."""
        process.send("read\n")
        found = {
            int(match[1], 16): int(match[2], 16)
            for line in process.until("end")
            if (match := _SUM.fullmatch(line)) is not None
        }
        return compare(found, {number: _checksum(number) for number in range(COUNT)}, [])

    def stop(self, place: Place, process: Process) -> int:
        """See Application.stop."""
        return process.ask_to_end()
