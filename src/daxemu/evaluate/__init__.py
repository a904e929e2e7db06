"""Comparing repair strategies on the same faults: plans, fault generators, workloads, trials, reports,
fleets.

Above the client and the supervisor: a trial talks to its mount through the command line and daxemu.client, as
any user's script would, and knows nothing of a strategy but its name. No counterpart in Linux.

Invariants: a fault is a function of (plan seed, fault plan, repetition) and of nothing else; a finished trial
is one line of JSON, never changed afterwards; a trial's machine is gone when the trial is.
"""
