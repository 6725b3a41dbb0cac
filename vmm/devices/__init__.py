"""Devices and the buses they sit on, the same for every architecture: offsets in, bytes out."""
