"""Requests of the control socket, one module a group. A verb takes only the parts that it needs.

``machine`` has the table from the type of a request to its verb.
"""
