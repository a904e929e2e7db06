"""Assembler of classic BPF for seccomp(2) filters: loads, jumps to labels, returns.

Counterpart in Linux: uapi/linux/filter.h, uapi/linux/bpf_common.h. Jumps go forward only, and at most 255
instructions far.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# uapi/linux/bpf_common.h
LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_GREATER_EQUAL = 0x35  # BPF_JMP | BPF_JGE | BPF_K
JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K
INSTRUCTION = struct.Struct("=HBBI")

# uapi/linux/seccomp.h: offsets in struct seccomp_data, bytes; little endian
NUMBER, ARCH = 0, 4


def low(argument: int) -> int:
    """Return the offset of the lower 32 bits of an argument of the system call."""
    return 16 + 8 * argument


def high(argument: int) -> int:
    """Return the offset of the upper 32 bits of an argument of the system call."""
    return 20 + 8 * argument


class _Instruction(NamedTuple):
    code: int
    operand: int
    then: str | None = None
    otherwise: str | None = None


class Assembler:
    """A program under construction. A jump without ``then`` or ``otherwise`` goes to the next instruction in
    that case.
    """

    def __init__(self) -> None:
        self._instructions: list[_Instruction] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """Name the next instruction. Precondition: the name is new."""
        assert name not in self._labels, name
        self._labels[name] = len(self._instructions)

    def load(self, offset: int) -> None:
        """Load 32 bits of struct seccomp_data."""
        self._instructions.append(_Instruction(LOAD, offset))

    def if_equal(self, value: int, then: str | None = None, otherwise: str | None = None) -> None:
        """Jump by ``loaded == value``."""
        self._instructions.append(_Instruction(JUMP_EQUAL, value, then, otherwise))

    def if_at_least(self, value: int, then: str | None = None, otherwise: str | None = None) -> None:
        """Jump by ``loaded >= value``, without signs."""
        self._instructions.append(_Instruction(JUMP_GREATER_EQUAL, value, then, otherwise))

    def if_any_bit(self, bits: int, then: str | None = None, otherwise: str | None = None) -> None:
        """Jump by ``loaded & bits != 0``."""
        self._instructions.append(_Instruction(JUMP_ANY_BIT, bits, then, otherwise))

    def give(self, value: int) -> None:
        """Return ``value``: the action of the filter."""
        self._instructions.append(_Instruction(RETURN, value))

    def assemble(self) -> bytes:
        """Return the program as an array of struct sock_filter."""
        return b"".join(
            INSTRUCTION.pack(
                each.code, self._skip(at, each.then), self._skip(at, each.otherwise), each.operand
            )
            for at, each in enumerate(self._instructions)
        )

    def _skip(self, at: int, label: str | None) -> int:
        """Return the number of instructions between a jump and its target."""
        if label is None:
            return 0
        skip = self._labels[label] - at - 1
        assert 0 <= skip <= 255, f"jump to {label} over {skip} instructions"
        return skip
