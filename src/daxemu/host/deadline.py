"""One deadline for work of several steps: each step gets what is left, so that the sum is limited."""

from __future__ import annotations

import time


class Deadline:
    """A moment, ``seconds`` after this object is made."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self, keep: float = 0.0) -> float:
        """Return the seconds that a step may take, if ``keep`` seconds must be left for the steps after it;
        0 if there are none.
        """
        return max(0.0, self._until - keep - time.monotonic())
