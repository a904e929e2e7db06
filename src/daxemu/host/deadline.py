"""One deadline for work of several steps: each step gets the time left, so the sum is limited."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


class Deadline:
    """Moment ``seconds`` after the construction of this object."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self, keep: float = 0.0) -> float:
        """Return the time limit of a step in seconds, with ``keep`` seconds reserved for later steps; 0 if no
        time is left.
        """
        return max(0.0, self._until - keep - time.monotonic())

    def run(self, what: Callable[[], Result], keep: float = 0.0) -> Result:
        """Call ``what`` in a thread, and wait for the result at most as long as :meth:`left`. Exceptions of
        ``what`` propagate.

        Raises TimeoutError. The thread then goes on, and does not keep the process from ending: for calls
        that wait for another filesystem and take no time limit.
        """
        made: Future[Result] = Future()

        def work() -> None:
            try:
                made.set_result(what())
            except BaseException as error:  # noqa: BLE001 - raised in the caller
                made.set_exception(error)

        Thread(target=work, name="deadline", daemon=True).start()
        return made.result(self.left(keep))
