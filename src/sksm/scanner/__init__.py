"""What to merge in running processes, and when: policy, and no system calls."""
