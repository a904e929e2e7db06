"""The table of FUSE requests against what is registered with libfuse, pyfuse3 and the C parts."""

from __future__ import annotations

import errno
import inspect
import re
from pathlib import Path

import pytest
import trio

from daxemu.host.fuse import extra_operations, opcodes
from daxemu.host.fuse.opcodes import REQUESTS, ServedBy
from daxemu.host.fuse.operations import Operations
from daxemu.host.fuse.pyfuse3_internals import HANDLERS

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

TOP = Path(__file__).resolve().parents[2]
SOURCES = Path(opcodes.__file__).parent
KERNEL = Path("/usr/include/linux/fuse.h")
ANSWERED_WITHOUT_A_TASK = {"forget"}  # pyfuse3 calls it without a wrapper of its own


def served_by(part: ServedBy) -> set[str]:
    return {each.handler for each in REQUESTS if each.served_by is part}


BY_DEFAULT = sorted(
    {each.name.lower() for each in REQUESTS if each.error} & HANDLERS - served_by(ServedBy.PYFUSE3)
)
"""Handlers that pyfuse3 has, and Operations leaves as they are."""


def test_the_page_is_of_this_table() -> None:
    assert (TOP / "docs" / "fuse-requests.md").read_text() == opcodes.table(), "run: make protocol"


@pytest.mark.skipif(not KERNEL.exists(), reason="no kernel headers")
def test_every_opcode_of_the_kernel_has_its_line() -> None:
    text = KERNEL.read_text().partition("enum fuse_opcode {")[2].partition("};")[0]
    known = {int(number): name for name, number in re.findall(r"FUSE_(\w+)\s*=\s*(\d+),", text)}
    ours = {each.number: each.name for each in REQUESTS}
    assert {number: name for number, name in known.items() if number < 4096} == {
        number: name for number, name in ours.items() if number in known
    }
    assert list(ours) == sorted(ours)
    assert len(ours) == len(REQUESTS)


def test_pyfuse3_serves_what_operations_implements() -> None:
    implemented = {name for name, verb in vars(Operations).items() if inspect.iscoroutinefunction(verb)}
    assert served_by(ServedBy.PYFUSE3) == implemented & HANDLERS


def test_pyfuse3_registers_what_the_table_says_of_it() -> None:
    registered = {
        found[1] for name in vars(pyfuse3) if (found := re.fullmatch(r"fuse_(\w+)_async", name)) is not None
    } - {"write_buf"}
    expected = (served_by(ServedBy.PYFUSE3) - {"readdir"}) | {"readdirplus"} | {*BY_DEFAULT}
    assert registered == expected - ANSWERED_WITHOUT_A_TASK


def test_the_supplement_registers_what_the_table_says_of_it() -> None:
    text = (SOURCES / "supplement.c").read_text()
    passed_on = {"init", "read", "write", "write_buf", "fsync"}  # to pyfuse3, with the thread
    added = set(re.findall(r"ours\.(\w+) = supplement_\w+;", text)) - passed_on
    assert added == served_by(ServedBy.SUPPLEMENT) == set(extra_operations._NAMES.values())


def test_c_answers_what_the_table_says_of_it() -> None:
    answered = re.findall(r"in->opcode == FUSE_(\w+)", (SOURCES / "answers.c").read_text())
    assert sorted(answered) == sorted(each.name for each in REQUESTS if each.in_c)


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_requests_that_no_part_serves_get_the_errno_of_the_table(name: str) -> None:
    verb = getattr(Operations, name)
    arguments = [None] * (len(inspect.signature(verb).parameters))
    with pytest.raises(pyfuse3.FUSEError) as error:
        trio.run(verb, *arguments)
    (expected,) = [each.error for each in REQUESTS if each.name.lower() == name]
    assert error.value.errno == expected == errno.ENOSYS
