"""Page frames and their failures. Imports no device and no filesystem.

Counterpart in Linux: mm/memory-failure.c (``memory_failure``), include/linux/memremap.h and mm/memremap.c
(``pagemap``).

The path of a failure: :meth:`MemoryFailures.memory_failure` classifies a range of pfns and calls the
``->memory_failure`` of its driver. The filesystem below the driver calls
:meth:`MemoryFailures.mf_dax_kill_procs` for each failed file range. Those calls only *record*: the result is
an :class:`Incident`, a value. ``host`` executes the incident: collect the processes with a page present,
unmap the pages, signal the threads that :func:`collect_procs` chose. ``host`` then passes the incident to
:meth:`MemoryFailures.action_result`.

Invariants
- One call serves one range, of any number of pages.
- The core never waits. Between ``memory_failure`` and ``action_result`` other calls run, even another
  failure.
- Every incident ends in exactly one ``action_result``.
"""
