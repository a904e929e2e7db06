"""`daxemu run`: madvise(2) of a command answered by the supervisor."""
