"""Measurements; run by hand, as they depend on the machine."""
