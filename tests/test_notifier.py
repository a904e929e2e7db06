"""Notifier chains: order, removal, and no other way to give an object a callback after its construction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import daxemu
from daxemu.notifier import NotifierChain


def test_functions_are_called_in_order_until_unregistered() -> None:
    calls: list[tuple[str, int]] = []
    chain: NotifierChain[[int]] = NotifierChain()

    def first(value: int) -> None:
        calls.append(("first", value))
        chain.unregister(first)

    def second(value: int) -> None:
        calls.append(("second", value))

    chain.register(first)
    chain.register(second)
    chain.call_chain(1)
    chain.call_chain(2)
    chain.unregister(first)
    assert calls == [("first", 1), ("second", 1), ("second", 2)]


def test_an_exception_of_a_function_propagates() -> None:
    def broken() -> None:
        raise ValueError("broken")

    chain: NotifierChain[[]] = NotifierChain()
    chain.register(broken)
    with pytest.raises(ValueError, match="broken"):
        chain.call_chain()


def public_callables(source: str) -> Iterator[int]:
    """Yield the lines that declare ``self.name: Callable[...]`` for a public name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.AnnAssign(ast.Attribute(ast.Name("self"), name), kind) if not name.startswith("_"):
                if any(isinstance(part, ast.Name) and part.id == "Callable" for part in ast.walk(kind)):
                    yield node.lineno


def test_no_object_takes_a_callback_by_assignment() -> None:
    """A callback is a parameter of the constructor, or is registered in a NotifierChain."""
    assert list(public_callables("class A:\n def f(self):\n  self.on_x: Callable[[], None] = f")) == [3]
    top = Path(daxemu.__file__).parent
    found = [
        f"{path.relative_to(top)}:{line}"
        for path in sorted(top.rglob("*.py"))
        for line in public_callables(path.read_text())
    ]
    assert found == []
