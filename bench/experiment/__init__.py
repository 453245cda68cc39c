"""The proposal's experiment: a thousand processes with patched code."""
