"""The rules of a mount: operations of programs that inject failures, lose power, or remove the device."""

from __future__ import annotations

from random import Random

from daxemu import protocol as p
from daxemu.errors import DaxemuError, InvalidArgument
from daxemu.events import Emit
from daxemu.events.rules import RuleFailed, RuleFired
from daxemu.fs.filesystem import Filesystem
from daxemu.host.observer import Operation
from daxemu.host.proc.processes import comm_of, process_of
from daxemu.pmem.inject import check_range
from daxemu.rule import (
    FAULT,
    GROUPS,
    RANGED,
    ClearAction,
    InjectAction,
    Op,
    Rule,
    RuleAdded,
    RuleList,
    RuleReport,
)
from daxemu.supervisor.observation import Observation
from daxemu.supervisor.rule_actions import RuleActions
from daxemu.uapi import U64_MAX, Ino

MOST = 1000
"""Maximum of rules of a mount: each operation is compared with every rule."""


class _Counted:
    """A rule, and the numbers of its matches."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.ops = rule.on.ops
        self.matched = 0
        self.fired = 0
        self._random = Random(rule.seed)

    def fires(self) -> bool:
        """Count a match. Return whether the match fires."""
        self.matched += 1
        is_fired = self.rule.on.when.fires(self.matched, self._random)
        self.fired += is_fired
        return is_fired


class Rules:
    """Observer that takes the actions of rules. Belongs to the trio thread."""

    def __init__(self, fs: Filesystem, actions: RuleActions, observation: Observation, emit: Emit) -> None:
        self._fs = fs
        self._actions = actions
        self._observation = observation
        self._emit = emit
        self._rules: dict[str, _Counted] = {}
        self._made = 0

    # -- requests

    async def add(self, request: p.AddRule) -> RuleAdded:
        """Add a rule. Raises InvalidArgument for a name that is in use, or a rule that cannot fire."""
        name = request.name or self._new_name()
        rule = Rule(name, request.on, request.then, request.seed)
        if name in self._rules:
            raise InvalidArgument(f"there is a rule {name!r} already: choose another name, or delete it")
        if len(self._rules) >= MOST:
            raise InvalidArgument(f"the mount has {MOST} rules already: delete some")
        _check(rule, self._fs.dax.size)
        counted = _Counted(rule)
        is_first = not self._rules
        self._rules[name] = counted
        if is_first:
            self._fs.layouts.withhold(self._names_file)
            await self._observation.add(self)
        else:
            self._fs.layouts.break_all()
            await self._observation.changed()
        return RuleAdded(name)

    async def report(self, request: p.ListRules) -> RuleList:
        """List the rules, in the order of their addition."""
        return RuleList([_report(counted) for counted in self._rules.values()])

    async def delete(self, request: p.DeleteRules) -> RuleList:
        """Delete rules by name, all if none is named. Return the deleted ones. Raises InvalidArgument."""
        names = request.names or list(self._rules)
        for name in names:
            if name not in self._rules:
                raise InvalidArgument(f"there is no rule {name!r}: see daxemu rules")
        deleted = [_report(self._rules.pop(name)) for name in dict.fromkeys(names)]
        if deleted and not self._rules:
            await self._observation.remove(self)
            self._fs.layouts.withhold(None)
        return RuleList(deleted)

    def _new_name(self) -> str:
        while True:
            self._made += 1
            if (name := f"rule{self._made}") not in self._rules:
                return name

    def _names_file(self, ino: Ino) -> bool:
        if self._actions.ending is not None:
            return True
        path = self._fs.names.path_of(ino)
        return any(counted.rule.on.names(path) for counted in self._rules.values())

    # -- observer

    def wants(self, ino: Ino) -> bool:
        """See Observer."""
        path = self._fs.names.path_of(ino)
        of_faults = [found.rule.on for found in self._rules.values() if found.ops & GROUPS[FAULT]]
        return any(on.names(path) for on in of_faults)

    async def before(self, operation: Operation) -> None:
        """See Observer. Waits while the mount or the device ends after an earlier operation."""
        if self._actions.ending is not None:
            await self._actions.ending.wait()
        await self._match(operation, after=False)

    async def after(self, operation: Operation, seconds: float, error: int) -> None:
        """See Observer. An operation that failed fires no rule."""
        if operation.op is Op.RENAME:
            self._fs.layouts.break_all()  # a rule may name the file by its new name
        if not error:
            await self._match(operation, after=True)

    async def _match(self, operation: Operation, *, after: bool) -> None:
        paths = operation.paths(self._fs.names.path_of)
        for counted in tuple(self._rules.values()):
            on = counted.rule.on
            does = operation.op in counted.ops or not counted.ops.isdisjoint(operation.also)
            is_here = does and on.after is after and any(map(on.names, paths))
            if is_here and _is_by(operation.tid, on.by) and counted.fires():
                await self._fire(counted, operation, paths[0])

    async def _fire(self, counted: _Counted, operation: Operation, path: str) -> None:
        rule = counted.rule
        pid = process_of(operation.tid) if operation.tid else 0
        then = [str(action) for action in rule.then]
        self._emit(
            RuleFired(
                rule=rule.name,
                number=counted.matched,
                op=operation.op.value,
                ino=operation.ino,
                path=path,
                pid=pid,
                tid=operation.tid,
                comm=comm_of(pid) if pid else "?",
                offset=operation.offset,
                length=operation.length,
                then=then,
            )
        )
        for action in rule.then:
            try:
                await self._actions.take(action, operation, after=rule.on.after)
            except (DaxemuError, OSError) as error:
                self._emit(RuleFailed(rule=rule.name, action=str(action), reason=str(error)))


def _check(rule: Rule, device_size: int) -> None:
    """Raise InvalidArgument for a rule that cannot fire, or cannot do what it should. ``device_size``: bytes.
    A file may grow until the rule fires.
    """
    if not rule.then:
        raise InvalidArgument("a rule without an action: give at least one")
    for action in rule.then:
        if not isinstance(action, InjectAction | ClearAction):
            continue
        is_of_device = action.ino is None and not action.of_file
        for offset, length in action.ranges:
            check_range(offset, length, device_size if is_of_device else U64_MAX, "the device")
        if not action.ranges and not rule.on.ops & RANGED:
            raise InvalidArgument(
                f"{rule.on.op} is no operation on bytes: give the bytes to poison by --offset or --length"
            )
    _ = rule.on.ops


def _is_by(tid: int, by: int | str | None) -> bool:
    """Return whether a thread belongs to the process ``by``: an id, or a comm."""
    if by is None:
        return True
    if not tid:
        return False
    pid = process_of(tid)
    return pid == by if isinstance(by, int) else comm_of(pid) == by


def _report(counted: _Counted) -> RuleReport:
    rule = counted.rule
    then = [str(action) for action in rule.then]
    return RuleReport(rule.name, str(rule.on), then, counted.matched, counted.fired)
