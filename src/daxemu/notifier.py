"""Notifier chain: functions that an object calls at a change of its own (kernel/notifier.c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec

P = ParamSpec("P")


class NotifierChain(Generic[P]):
    """Subscribed functions, called in the order of registration. An exception of a function propagates."""

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: tuple[Callable[P, None], ...] = ()

    def register(self, call: Callable[P, None]) -> None:
        """Call ``call`` at each change from now on (``blocking_notifier_chain_register()``)."""
        self._calls = (*self._calls, call)

    def unregister(self, call: Callable[P, None]) -> None:
        """Undo :meth:`register`. Does nothing for a function that is not registered."""
        self._calls = tuple(other for other in self._calls if other != call)

    def call_chain(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Call every registered function with these arguments (``blocking_notifier_call_chain()``)."""
        for call in self._calls:
            call(*args, **kwargs)
