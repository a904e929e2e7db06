"""Verbs: functions that execute the requests of the control socket, one module a group.

A verb takes only the parts of the machine that the verb needs. ``supervisor.machine`` has the table from the
type of a request to its verb.
"""
