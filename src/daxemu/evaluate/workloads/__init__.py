"""Workloads of a trial, one module each. After the trial, a workload reports lost and wrong bytes of its
data.
"""
