"""What runs on a mount during a trial, and can say afterwards what of its data is gone or wrong. One file
each.
"""
