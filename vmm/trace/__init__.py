"""Observers: what happens to a guest is written down here, and read again. Decides nothing."""
