"""What real programs do when memory goes bad: unmodified ones, with data of their own on a mount, in one
situation after another.

No counterpart in Linux. Above evaluate, whose machines it uses. An outcome is what was seen of a program,
which runs in processes of its own; nothing here knows beforehand what a program will do. Every wait has a
limit, so that a hang is an outcome, too, and only processes of the program touch a mount that was hurt.
"""
