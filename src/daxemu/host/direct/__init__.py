"""Direct mappings: programs under ``daxemu run`` map the media itself, in place of the FUSE page cache.

``syscalls``        system calls that an agent makes in an address space
``agent``           a process that shares the memory of a program, and makes batches of system calls
``userfaultfd``     faults and events of an address space, and the answers
``address_spaces``  one agent and one userfaultfd for each address space: making, fork, exec, exit

Counterpart in Linux: the part of fs/dax.c and mm/memory.c that puts pages of the media into page tables.
"""
