"""Strict guests: all private memory is out of the reach of the host's user space, and is filled
by a loader inside the guest."""
