"""The command line: one file for each group of verbs. It resolves paths, asks the supervisor, prints.

Errors are one line on stderr that says what to do; exit statuses are those of errors.py; ``--json`` prints
one JSON object.
"""
