"""Page frames and their failures. Knows no device and no filesystem.

Counterpart in Linux: mm/memory-failure.c (``memory_failure``), include/linux/memremap.h and mm/memremap.c
(``pagemap``).

How a failure passes through: :meth:`MemoryFailures.memory_failure` classifies a range of pfns and calls its
owner's ``->memory_failure``; somewhere below the filesystem answers with
:meth:`MemoryFailures.mf_dax_kill_procs` for each file range that is hurt. Those calls only *record*: the
result is an :class:`Incident`, a value. ``host`` carries it out (collects the processes that map it, unmaps,
signals as :func:`collect_procs` chose) and gives it back to :meth:`MemoryFailures.action_result`.

Invariants
- One call serves one range, however many pages it has.
- The core never waits: between ``memory_failure`` and ``action_result`` anything may happen, another failure
  included.
- Every incident ends in exactly one ``action_result``.
"""
