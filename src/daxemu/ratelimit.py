"""printk_ratelimit(): so many messages of a kind in an interval, and then how many more there were
(lib/ratelimit.c).

Who has the messages has the clock, too: seconds, from wherever they count.
"""

from __future__ import annotations

DEFAULT_INTERVAL = 5.0
DEFAULT_BURST = 10
"""As linux/ratelimit_types.h has them."""


class Ratelimit:
    """``struct ratelimit_state``: not more than ``burst`` in every ``interval`` seconds."""

    def __init__(self, interval: float = DEFAULT_INTERVAL, burst: int = DEFAULT_BURST) -> None:
        self._interval = interval
        self._burst = burst
        self._left = burst
        self._begin: float | None = None
        self._missed = 0

    def ratelimit(self, now: float) -> tuple[bool, int]:
        """``___ratelimit()``: whether to go ahead with a message, and how many were suppressed in an interval
        that is over now.
        """
        if self._begin is None:
            self._begin = now
        suppressed = 0
        if not self._begin <= now <= self._begin + self._interval:  # a clock can be set back
            self._begin, self._left = now, self._burst
            suppressed = self.release()
        if self._left:
            self._left -= 1
            return True, suppressed
        self._missed += 1
        return False, suppressed

    def release(self) -> int:
        """``ratelimit_state_exit()``: how many were suppressed that nobody was told of."""
        missed, self._missed = self._missed, 0
        return missed


def suppressed_line(func: str, missed: int) -> str:
    """What the kernel says of them; ``func`` is where they come from."""
    return f"{func}: {missed} callbacks suppressed"
