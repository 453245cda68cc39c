"""A scanner in user space, `sksm watch`, beside the kernel's own, ksmd.

Each experiment has real programs run the same script several times: with nobody
looking for twins in their memory, and with a scanner. Memory and processor time
are read all the while, the scanner's own included.
"""
