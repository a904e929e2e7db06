"""Command line: one file for each group of verbs. A verb resolves paths, asks the supervisor and prints.

An error is one line on stderr: the finding and the remedy. errors.py has the exit statuses. ``--json``
prints one JSON object.
"""
