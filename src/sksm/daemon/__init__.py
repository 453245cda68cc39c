"""The one writer of a store, and how its clients talk to it."""
