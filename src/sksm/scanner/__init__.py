"""What to merge in running processes, and when."""
