"""Rules: when an operation of a program on the mount matches, do something.

A rule is written ``OP:FILE[:WHEN]``. OP is one of the words of Op. FILE is a glob over paths on the mount; a
glob without a slash matches the last name of a path. WHEN has the grammar of ``strace -e inject=...:when=``,
or is a probability (``5%``). The supervisor keeps the rules of a mount (supervisor/rules.py).
"""

from __future__ import annotations

import re
from enum import StrEnum
from fnmatch import fnmatchcase
from random import Random
from typing import Union

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.failure_kind import FailureKind
from daxemu.fields import FileOffset, Ino, Length, Pid


class Op(StrEnum):
    """Operation of a program on a file. The value is the word in rules, events and traces."""

    READ = "read"
    """read(2) or read-ahead."""
    WRITE = "write"
    WRITE_BACK = "write-back"
    """Pages of the page cache that the kernel writes to the file."""
    LOAD = "load"
    """Page fault of a load."""
    STORE = "store"
    """Page fault of a store."""
    OPEN = "open"
    CREATE = "create"
    """open(2) that makes the file."""
    FSYNC = "fsync"
    RENAME = "rename"
    UNLINK = "unlink"
    TRUNCATE = "truncate"
    FALLOCATE = "fallocate"
    CLONE = "clone"
    """FICLONERANGE of daxemu, or copy_file_range(2)."""
    LSEEK = "lseek"
    IOCTL = "ioctl"
    LOOKUP = "lookup"
    GETATTR = "getattr"
    SETATTR = "setattr"
    MKDIR = "mkdir"
    RMDIR = "rmdir"
    LINK = "link"
    SYMLINK = "symlink"
    MKNOD = "mknod"
    READLINK = "readlink"
    OPENDIR = "opendir"
    SETXATTR = "setxattr"
    GETXATTR = "getxattr"
    LISTXATTR = "listxattr"
    REMOVEXATTR = "removexattr"


ANY = "any"
FAULT = "fault"
GROUPS: dict[str, frozenset[Op]] = {
    ANY: frozenset(Op),
    FAULT: frozenset({Op.LOAD, Op.STORE}),
    Op.OPEN: frozenset({Op.OPEN, Op.CREATE}),
}
"""Words of rules that stand for several operations."""
RANGED = frozenset({Op.READ, Op.WRITE, Op.WRITE_BACK, Op.LOAD, Op.STORE, Op.FALLOCATE, Op.CLONE})
"""Operations on a range of a file: the only ones that can name the bytes of a fault."""


class When(msgspec.Struct, frozen=True):
    """Which matches of a rule fire: number ``first``, then each ``step``-th one up to ``last`` (null: without
    end). With ``percent``, each match fires with that probability instead.
    """

    first: int = 1
    last: int | None = 1
    step: int = 1
    percent: float | None = None

    def __str__(self) -> str:
        if self.percent is not None:
            return f"{self.percent:g}%"
        if self.last == self.first:
            return str(self.first)
        end = "+" if self.last is None else f"..{self.last}"
        return f"{self.first}{end}" + (
            f"{'' if self.last is None else '+'}{self.step}" if self.step > 1 else ""
        )

    def fires(self, number: int, random: Random) -> bool:
        """Return whether match ``number`` (from 1) fires. Draws one number from ``random`` if ``percent``."""
        if self.percent is not None:
            return random.random() * 100 < self.percent
        past = number - self.first
        return past >= 0 and past % self.step == 0 and (self.last is None or number <= self.last)


_WHEN = re.compile(r"(?P<first>\d+)(\.\.(?P<last>\d+))?(?P<plus>\+(?P<step>\d+)?)?")


def parse_when(text: str) -> When:
    """Parse WHEN: ``3`` (the third match), ``3+`` (the third and all later), ``3+2`` (the third, fifth, ...),
    ``1..5`` (the first five), ``1..9+2``, or ``5%``. Raises InvalidArgument.
    """
    if text.endswith("%"):
        try:
            percent = float(text[:-1])
        except ValueError:
            percent = -1.0
        if not 0 < percent <= 100:
            raise InvalidArgument(f"{text!r} is no probability: give more than 0%, at most 100%")
        return When(percent=percent)
    found = _WHEN.fullmatch(text)
    if found is None:
        raise InvalidArgument(f"{text!r} does not say when: give 3, 3+, 3+2, 1..5, 1..9+2 or 5%")
    first, step = int(found["first"]), int(found["step"] or 1)
    last = int(found["last"]) if found["last"] else None if found["plus"] else first
    if first < 1 or step < 1 or (last is not None and last < first):
        raise InvalidArgument(f"{text!r} never fires: count from 1 on, and upwards")
    return When(first, last, step)


def matches(glob: str, path: str) -> bool:
    """Return whether a glob matches a path on the mount. ``path`` begins with a slash. A glob without a slash
    matches the last name.
    """
    if "/" in glob:
        return fnmatchcase(path, glob if glob.startswith("/") else f"/{glob}")
    return fnmatchcase(path.rpartition("/")[2], glob)


class On(msgspec.Struct, frozen=True):
    """Which operations a rule matches. ``op``: a word of Op or GROUPS. ``file``: a glob. ``by``: a process
    id, or the comm of a process; null for every process. ``after``: fire after the operation instead of
    before.
    """

    op: str
    file: str
    when: When = When()
    by: Pid | str | None = None
    after: bool = False

    def __str__(self) -> str:
        by = "" if self.by is None else f" by {self.by}"
        return f"{'after' if self.after else 'before'} {self.op}:{self.file}:{self.when}{by}"

    @property
    def ops(self) -> frozenset[Op]:
        """The operations of ``op``. Raises InvalidArgument for another word."""
        if (group := GROUPS.get(self.op)) is not None:
            return group
        try:
            return frozenset({Op(self.op)})
        except ValueError:
            words = ", ".join([*Op, FAULT, ANY])
            raise InvalidArgument(f"{self.op!r} is no operation: operations are {words}") from None

    def names(self, path: str) -> bool:
        """Return whether ``file`` matches a path on the mount. ``path`` begins with a slash."""
        return matches(self.file, path)


def parse_on(text: str, by: str | None = None, *, after: bool = False) -> On:
    """Parse ``OP:FILE[:WHEN]``. ``by``: a process id or a comm. Raises InvalidArgument."""
    op, colon, rest = text.partition(":")
    file, colon_when, when = rest.rpartition(":")
    if not colon_when:
        file, when = rest, "1"
    if not (op and colon and file):
        raise InvalidArgument(f"{text!r} is no rule: give OP:FILE[:WHEN], as in 'write:*.log:3'")
    on = On(op, file, parse_when(when), int(by) if by and by.isdecimal() else by or None, after)
    _ = on.ops
    return on


class InjectAction(msgspec.Struct, frozen=True, tag="inject", omit_defaults=True):
    """Inject a failure. ``ranges``: pairs [offset, length] in bytes of the file ``ino``, or of the device if
    ``ino`` is null; of the file of the operation with ``of_file``. Without ``ranges``: the bytes of the
    operation.
    """

    kind: FailureKind = FailureKind.POISON
    ranges: list[tuple[FileOffset, Length]] = []
    ino: Ino | None = None
    of_file: bool = False
    seed: int = 0

    def __str__(self) -> str:
        where = "the bytes of the operation" if not self.ranges else f"{len(self.ranges)} ranges"
        return f"{self.kind} in {where}"


class ClearAction(msgspec.Struct, frozen=True, tag="clear", omit_defaults=True):
    """Clear poison. Fields as in InjectAction."""

    ranges: list[tuple[FileOffset, Length]] = []
    ino: Ino | None = None
    of_file: bool = False

    def __str__(self) -> str:
        where = "the bytes of the operation" if not self.ranges else f"{len(self.ranges)} ranges"
        return f"clear {where}"


class PowerFailAction(msgspec.Struct, frozen=True, tag="powerfail"):
    """Lose power."""

    def __str__(self) -> str:
        return "powerfail"


class RemoveAction(msgspec.Struct, frozen=True, tag="remove"):
    """Remove the device."""

    def __str__(self) -> str:
        return "remove"


class KillAction(msgspec.Struct, frozen=True, tag="kill"):
    """Kill the supervisor by SIGKILL."""

    def __str__(self) -> str:
        return "kill"


class StopAction(msgspec.Struct, frozen=True, tag="stop"):
    """Stop the process of the operation by SIGSTOP, for a debugger."""

    def __str__(self) -> str:
        return "stop"


Action = Union[InjectAction, ClearAction, PowerFailAction, RemoveAction, KillAction, StopAction]  # noqa: UP007
ALONE: dict[str, Action] = {
    str(action): action for action in (PowerFailAction(), RemoveAction(), KillAction(), StopAction())
}
"""Actions without arguments, by their words."""


class Rule(msgspec.Struct, frozen=True):
    """``then``: the actions, in their order. ``seed``: of the probability of ``on.when``."""

    name: str
    on: On
    then: list[Action]
    seed: int = 0


class RuleAdded(msgspec.Struct):
    """``name``: the name by which the rule can be deleted."""

    name: str


class RuleReport(msgspec.Struct):
    """A rule in words. ``matched``: number of matches so far. ``fired``: number of times it has fired."""

    name: str
    on: str
    then: list[str]
    matched: int
    fired: int


class RuleList(msgspec.Struct):
    rules: list[RuleReport]
