"""Comparison of repair strategies under the same faults.

Parts: plans, fault generators, workloads, trials, reports, fleets.

Layer: above the client and the supervisor. A trial uses its mount through the command line and daxemu.client
only, as a user's script would. A trial knows a strategy by its name alone. No counterpart in Linux.

Invariants:

- The faults of a trial depend on (plan seed, fault plan, repetition) and on nothing else.
- A finished trial is one line of JSON, never changed afterwards.
- The device, the mount and the directories of a trial are removed when the trial ends.
"""
