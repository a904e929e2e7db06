"""Exact SIGBUS into unmodified processes by ptrace(2)."""
