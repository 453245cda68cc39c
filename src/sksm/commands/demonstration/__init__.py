"""The demonstration: real data, five processes, and the kernel's word for it."""
