"""Behaviour of real programs under memory failure.

Unmodified programs with data on a mount go through one situation after another. Layer: above evaluate, which
makes the machines. No counterpart in Linux.

Rules:

- A behaviour is observed, never predicted. A program runs in processes of its own.
- Every wait has a limit, so a hang is also a behaviour.
- After an injection, only processes of the program access the mount.
"""
