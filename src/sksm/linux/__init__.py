"""The Linux interfaces sksm stands on, and nothing else.

Each module mirrors one kernel header, or one folder of /proc or /sys, and keeps
its names. A wrapper makes exactly one system call, raises `OSError`, and knows
nothing of merging.
"""
