"""The kernel half, built and tested: patches, a small kernel, guests to boot it in."""
