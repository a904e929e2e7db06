"""The only code that touches the real kernel: the FUSE mount, /proc, ptrace.

Counterpart in Linux: the VFS (``fuse``), the page cache and its rmap walks (``page_cache``, ``proc``), signal
delivery (``tracer``). The package carries out what the core decided.

``fuse``      the mount: session, requests, notifications, layouts in C, the watchdog
``proc``      /proc as typed values: mounts, processes, threads, present pages
``tracer``    exact SIGBUS by ptrace(2), in a process of its own
``victims``   the hot loops of collecting and signalling in C
``run``       ``daxemu run``: seccomp(2) user notification
``mappings``  the seam: the only interface to the mappings of processes
``page_cache``  the page cache as mappings, one implementation of the seam; ``mount_parts`` its construction
``direct``    direct mappings of the media, the other implementation: agents, userfaultfds

Rules, each learned from a deadlock
- Only a worker thread revokes a range. The kernel writes dirty pages back to the supervisor during the call.
- The event loop never waits for the tracer without a time limit, nor touches a file on its own mount.
- A FUSE request for poison is answered with an error for its whole range. A short answer means end of file.
"""
