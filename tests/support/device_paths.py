"""Rule: code that touches a path derived from the path of a DEVICE.

A value is derived if its name, or its attribute, is ``device``; if a path operation made the value of a
derived value; if a derived value was assigned, or passed to a parameter of a function of the project. A touch
is a call in which the kernel walks the path: open(), most of os and shutil, the methods of Path that do I/O.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = {"device"}
PURE_ATTRIBUTES = {"parent", "parents", "path"}
PURE_METHODS = {
    "absolute",
    "joinpath",
    "with_name",
    "with_suffix",
    "relative_to",
    "encode",
    "__fspath__",
    "socket",
}
PURE_CALLS = {
    "Path",
    "PurePath",
    "str",
    "fspath",
    "fsencode",
    "fsdecode",
    "abspath",
    "join",
    "normpath",
    "dirname",
}
OPENERS = {"DeviceDir.open", "DeviceDir.look", "DeviceDir.load", "DeviceDir.create", "PrivatePath.at"}
"""Functions whose argument is the path of a DEVICE."""
TOUCHING_METHODS = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "exists",
    "stat",
    "lstat",
    "unlink",
    "mkdir",
    "touch",
    "rename",
    "replace",
    "iterdir",
    "glob",
    "rglob",
    "walk",
    "chmod",
    "lchmod",
    "rmdir",
    "symlink_to",
    "hardlink_to",
    "readlink",
    "resolve",
    "samefile",
    "owner",
    "group",
    "is_dir",
    "is_file",
    "is_symlink",
    "is_socket",
    "is_fifo",
    "is_mount",
    "is_block_device",
    "is_char_device",
}
TOUCHING_MODULES = {"os", "shutil", "sqlite3", "tempfile", "glob", "io"}
TOUCHING_PATH_CALLS = {
    "exists",
    "lexists",
    "realpath",
    "isdir",
    "isfile",
    "islink",
    "ismount",
    "getsize",
    "samefile",
}
TOUCHING_NAMES = {"open", "memmap", "fromfile"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Touch(NamedTuple):
    """Call that touches a derived path, in ``function`` (with the class of a method) of ``module``."""

    module: str
    function: str
    line: int
    call: str


class _Unit:
    """A function, or the body of a module."""

    def __init__(self, module: str, name: str, body: list[ast.stmt], parameters: list[str]) -> None:
        self.module = module
        self.name = name
        self.body = body
        self.parameters = parameters
        self.derived = {name for name in parameters if name in SOURCES}

    def nodes(self) -> Iterator[ast.AST]:
        """Return all nodes, without nodes of inner functions."""
        stack: list[ast.AST] = list(self.body)
        while stack:
            node = stack.pop()
            if isinstance(node, Function | ast.ClassDef):
                continue
            yield node
            stack += ast.iter_child_nodes(node)

    def is_derived(self, node: ast.AST) -> bool:
        """Return True for a path derived from the path of a DEVICE."""
        match node:
            case ast.Name(id=name):
                return name in self.derived or name in SOURCES
            case ast.Attribute(value=value, attr=attr):
                return attr in SOURCES or (attr in PURE_ATTRIBUTES | {"socket"} and self.is_derived(value))
            case ast.BinOp(op=ast.Div() | ast.Add(), left=left, right=right):
                return self.is_derived(left) or self.is_derived(right)
            case ast.JoinedStr(values=values):
                # Other text beside it makes a message, or the source of a mount: only a path begins so.
                return (
                    isinstance(values[0], ast.FormattedValue)
                    and self.is_derived(values[0].value)
                    and all(
                        isinstance(part, ast.FormattedValue) or " " not in str(getattr(part, "value", ""))
                        for part in values
                    )
                )
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in PURE_METHODS:
                return self.is_derived(value)
            case ast.Call(func=func, args=args) if _last(func) in PURE_CALLS:
                return any(map(self.is_derived, args))
            case ast.Call(func=ast.Name(id="reversed" | "sorted" | "list" | "tuple"), args=args):
                return any(map(self.is_derived, args))
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return any(map(self.is_derived, elements))
            case ast.Subscript(value=value):
                return self.is_derived(value)
            case ast.Starred(value=value) | ast.NamedExpr(value=value) | ast.Await(value=value):
                return self.is_derived(value)
            case ast.IfExp(body=body, orelse=orelse):
                return self.is_derived(body) or self.is_derived(orelse)
        return False

    def spread(self) -> bool:
        """Follow assignments. Return True if another name became derived."""
        before = len(self.derived)
        for node in self.nodes():
            match node:
                case ast.Assign(targets=targets, value=value) if self.is_derived(value):
                    self.derived |= {target.id for target in targets if isinstance(target, ast.Name)}
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self.derived |= {name} if self.is_derived(value) else set()
                case ast.NamedExpr(target=ast.Name(id=name), value=value) if self.is_derived(value):
                    self.derived.add(name)
                case ast.For(target=ast.Name(id=name), iter=value) if self.is_derived(value):
                    self.derived.add(name)
                case ast.comprehension(target=ast.Name(id=name), iter=value) if self.is_derived(value):
                    self.derived.add(name)
                case ast.Call(func=func, args=[first, *_]) if ast.unparse(func) in OPENERS:
                    self.derived |= {each.id for each in ast.walk(first) if isinstance(each, ast.Name)}
        return len(self.derived) > before

    def touches(self) -> Iterator[Touch]:
        """Return the calls that touch a derived path."""
        for node in self.nodes():
            if isinstance(node, ast.Call) and self._is_touch(node):
                yield Touch(self.module, self.name, node.lineno, ast.unparse(node))

    def _is_touch(self, call: ast.Call) -> bool:
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        match call.func:
            case ast.Name(id=name) if name in TOUCHING_NAMES:
                return any(map(self.is_derived, given))
            case ast.Attribute(value=value, attr=attr):
                if attr in TOUCHING_METHODS and self.is_derived(value):
                    return (attr, len(call.args)) != ("replace", 2)  # the method of str and bytes
                where = ast.unparse(value)
                if where == "os.path":
                    return attr in TOUCHING_PATH_CALLS and any(map(self.is_derived, given))
                is_module = where in TOUCHING_MODULES or attr in TOUCHING_NAMES - {"open"}
                return is_module and attr not in PURE_CALLS and any(map(self.is_derived, given))
        return False


def _last(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _units(module: str, tree: ast.Module) -> Iterator[_Unit]:
    yield _Unit(module, "", tree.body, [])
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                arguments = child.args
                names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
                names = names[1:] if names[:1] in (["self"], ["cls"]) else names
                yield _Unit(module, prefix + child.name, child.body, names)
            name = f"{prefix}{child.name}." if isinstance(child, Function | ast.ClassDef) else prefix
            stack.append((name, child))


def _called(func: ast.expr, unit: _Unit, by_name: dict[str, list[_Unit]]) -> _Unit | None:
    """Return the function of the project that a call calls; None if ambiguous, as for a method name of
    several classes.
    """
    found = by_name.get(_last(func), [])
    same = [each for each in found if each.name == ast.unparse(func)]
    if isinstance(func, ast.Name):
        same = [each for each in same if each.module == unit.module] or same
    found = same or found
    return found[0] if len(found) == 1 else None


def touches(sources: dict[str, str]) -> list[Touch]:
    """Every touch of a derived path in modules, given as name -> text."""
    units = [unit for name, text in sources.items() for unit in _units(name, ast.parse(text))]
    by_name: dict[str, list[_Unit]] = {}
    for unit in units:
        by_name.setdefault(unit.name.rpartition(".")[2], []).append(unit)
    changed = True
    while changed:
        changed = False
        for unit in units:
            changed |= unit.spread()
            for node in unit.nodes():
                if not isinstance(node, ast.Call):
                    continue
                target = _called(node.func, unit, by_name)
                if target is None:
                    continue
                passed = dict(zip(target.parameters, node.args, strict=False))
                passed |= {key.arg: key.value for key in node.keywords if key.arg is not None}
                found = {name for name, value in passed.items() if unit.is_derived(value)}
                changed |= not found <= target.derived
                target.derived |= found
    return sorted({touch for unit in units for touch in unit.touches()})


def modules(top: Path) -> dict[str, str]:
    """The modules of the project."""
    return {str(path.relative_to(top)): path.read_text() for path in sorted(top.rglob("*.py"))}
