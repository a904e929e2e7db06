"""/proc: mounts, processes, threads and page tables, as typed values."""
