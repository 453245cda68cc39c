"""Speed and cost of sksm, beside the floor and a peer measured in the same run.

Absolute figures say more about the machine than about the program, so what
counts are ratios: each round measures the floor and then ours, and is one ratio.
"""
