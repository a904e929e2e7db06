"""The only code that touches the real kernel: the FUSE mount, /proc, ptrace.

Counterpart in Linux: what lies below a filesystem and beside it - the VFS (``operations``), the page cache
and its rmap walks (``mappings``, ``tasks``), signal delivery (``tracer``). It carries out what the core
decided.

Rules, each learned from a deadlock
- A range is revoked from a worker thread only. The kernel writes dirty pages back to us while we wait for it.
- The event loop never waits for the tracer without a time limit, nor touches a file on its own mount.
- A FUSE request that meets poison is answered with an error for the whole of it. A short answer means end of
  file.
"""
